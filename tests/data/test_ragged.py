"""Rows of unlike lengths as flat items: each function by a loop over rows, in lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble_kd.data import left_padded
from ensemble_kd.data.ragged import drawn_spans, prefix_spans, window_spans
from ensemble_kd.errors import EnsembleKDError

TOTALS = st.lists(st.integers(0, 9), max_size=6)


def flat(totals: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of each row's first entry, and the numbers of entries."""
    sizes = torch.tensor(totals, dtype=torch.int64)
    return sizes.cumsum(0) - sizes, sizes


def spans(found: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[int, int]]:
    return list(zip(*(each.tolist() for each in found), strict=True))


@given(total=st.integers(0, 8), width=st.integers(1, 9), data=st.data())
def test_rows_stand_at_the_right(total: int, width: int, data: st.DataObject) -> None:
    ends = data.draw(st.lists(st.integers(0, total), max_size=5))
    lengths = [data.draw(st.integers(0, min(end, width))) for end in ends]
    items = list(range(1, total + 1))
    rows = left_padded(
        torch.arange(1, total + 1), *(torch.tensor(x, dtype=torch.int64) for x in (ends, lengths)), width
    )
    expected = [[0] * (width - n) + items[end - n : end] for end, n in zip(ends, lengths, strict=True)]
    assert rows.tolist() == expected


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"items": torch.tensor([0.5])}, "expected items, "),
        ({"ends": torch.tensor([0.5, 1.0])}, "expected ends, "),
        ({"lengths": torch.tensor([1])}, "expected lengths, "),
        ({"ends": torch.tensor([-1, 3])}, "expected ends in 0..3, got -1..3"),
        ({"ends": torch.tensor([1, 4])}, "expected ends in 0..3, got 1..4"),
        ({"lengths": torch.tensor([-1, 2])}, "expected lengths in 0..2, got -1..2"),
        ({"lengths": torch.tensor([0, 3])}, "expected lengths in 0..2, got 0..3"),
        ({"width": 0}, "expected width, "),
    ],
)
def test_rows_that_are_not_there_are_refused(changed: dict[str, Any], text: str) -> None:
    usual = {
        "items": torch.tensor([1, 2, 3]), "ends": torch.tensor([1, 3]), "lengths": torch.tensor([1, 2]), "width": 2
    }  # fmt: skip
    with pytest.raises(EnsembleKDError, match=text.replace(".", r"\.")):
        left_padded(**{**usual, **changed})


@given(totals=TOTALS, width=st.integers(1, 5), step=st.integers(1, 5))
def test_windows_go_back_from_the_newest_entry(totals: list[int], width: int, step: int) -> None:
    expected, start = [], 0
    for total in totals:
        firsts, first = [], max(total - width, 0)
        while total:
            firsts.append(max(first, 0))
            if first <= 0:
                break
            first -= step
        expected += [(start + first + min(width, total), min(width, total)) for first in reversed(firsts)]
        start += total
    assert spans(window_spans(*flat(totals), width, step)) == expected


@given(totals=TOTALS, width=st.integers(2, 5), shared=st.integers(0, 3), seed=st.integers(0, 99))
def test_drawn_windows_have_each_later_entry_once(totals: list[int], width: int, shared: int, seed: int) -> None:
    shared = min(shared, width - 1)
    found = spans(drawn_spans(*flat(totals), width, shared, np.random.default_rng(seed)))
    predicted = [place for end, length in found for place in range(end - length + shared, end)]
    starts = flat(totals)[0].tolist()
    later = [start + i for start, total in zip(starts, totals, strict=True) for i in range(shared, total)]
    assert predicted == later
    assert all(shared < length <= width for _, length in found)


@given(totals=TOTALS, width=st.integers(1, 5), least=st.integers(1, 3))
def test_prefixes_end_at_every_entry_but_the_first(totals: list[int], width: int, least: int) -> None:
    expected = [
        (start + upto, min(upto, width))
        for start, total in zip(flat(totals)[0].tolist(), totals, strict=True)
        for upto in range(least, total + 1)
    ]
    assert spans(prefix_spans(*flat(totals), width, least)) == expected
