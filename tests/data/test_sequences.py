"""Splits and windows against loops over lists, and what sequences are refused."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kd.data import ItemAttributes, SequenceData, Split
from ensemble_kd.errors import EnsembleKDError

quick = settings(deadline=None, max_examples=60)
sequences = st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=14), min_size=1, max_size=6)


def rows(split: Split, lists: list[list[int]]) -> list[list[int]]:
    return [row[: {"train": -2, "valid": -2, "test": -1}[split]] for row in lists]


def pad(row: list[int], width: int) -> list[int]:
    return [0] * (width - len(row)) + row


@quick
@given(sequences, st.integers(1, 16), st.sampled_from(["train", "valid", "test"]))
def test_history_and_inputs_equal_slices(lists: list[list[int]], width: int, split: Split) -> None:
    data = SequenceData.from_sequences(lists)
    want = rows(split, lists)
    items, offsets = data.history(split)
    assert [items[a:b].tolist() for a, b in itertools.pairwise(offsets)] == want
    assert data.inputs(split, width).tolist() == [pad(row[-width:], width) for row in want]
    assert data.max_history == max(len(row) for row in rows("test", lists))


@quick
@given(sequences)
def test_targets_and_sizes(lists: list[list[int]]) -> None:
    data = SequenceData.from_sequences(lists)
    assert data.target("test").tolist() == [row[-1] for row in lists]
    assert data.target("valid").tolist() == [row[-2] for row in lists]
    assert (data.num_users, data.num_interactions) == (len(lists), sum(map(len, lists)))
    assert data.num_items == max(max(row) for row in lists)


@quick
@given(sequences)
def test_popularity_counts_the_training_part(lists: list[list[int]]) -> None:
    data = SequenceData.from_sequences(lists, num_items=9)
    flat = [item for row in rows("train", lists) for item in row]
    assert data.popularity().tolist() == [0.0] + [float(flat.count(item)) for item in range(1, 10)]


def test_no_held_out_item_reaches_training() -> None:
    # Every item is one of a kind, so an item names its place.
    lists = [list(range(100 * u + 1, 100 * u + 1 + length)) for u, length in enumerate((3, 7, 40))]
    data = SequenceData.from_sequences(lists)
    held_out = set(data.target("valid").tolist()) | set(data.target("test").tolist())
    for max_len, step in ((1, 1), (5, 1), (5, 3), (50, 1)):
        assert held_out.isdisjoint(data.train_windows(max_len, step).flatten().tolist())
    assert held_out.isdisjoint(data.inputs("valid", 50).flatten().tolist())
    assert set(data.target("test").tolist()).isdisjoint(data.inputs("test", 50).flatten().tolist())
    assert data.popularity()[sorted(held_out)].sum() == 0


def windows_by_loop(lists: list[list[int]], width: int, step: int, min_len: int) -> list[list[int]]:
    windows: list[list[int]] = []
    for row in rows("train", lists):
        if len(row) < min_len:
            continue
        if len(row) <= width:
            windows.append(pad(row, width))
            continue
        starts = {0}
        start = len(row) - width
        while start > 0:
            starts.add(start)
            start -= step
        windows += [row[start : start + width] for start in sorted(starts)]
    return windows


@quick
@given(sequences, st.integers(1, 8), st.integers(1, 5))
def test_windows_equal_the_loop(lists: list[list[int]], width: int, step: int) -> None:
    data = SequenceData.from_sequences(lists)
    for min_len in range(1, max(len(row) for row in lists) - 1):
        got = data.train_windows(width, step, min_len)
        assert got.dtype == torch.int64
        assert got.tolist() == windows_by_loop(lists, width, step, min_len)


@quick
@given(sequences, st.integers(2, 8), st.integers(0, 3), st.integers(0, 99))
def test_drawn_windows_predict_every_item_once(lists: list[list[int]], width: int, shared: int, seed: int) -> None:
    """Of a user's windows, what follows the shared items are the user's items from there on, in order."""
    shared = min(shared, width - 1)
    lists = [row for row in lists if len(row) - 2 > shared] or [list(range(1, shared + 4))]
    got = SequenceData.from_sequences(lists, num_items=60).train_windows(width, None, shared + 1, (seed, 3)).tolist()
    windows = [[item for item in row if item] for row in got]
    for row, padded in zip(windows, got, strict=True):
        assert len(row) > shared
        assert padded == pad(row, width)
    assert [i for row in windows for i in row[shared:]] == [i for row in lists for i in row[shared:-2]]
    for row in lists:
        own, done = [], 0
        while done < len(row) - 2 - shared:
            own.append(windows.pop(0))
            assert own[-1][:shared] == row[done : done + shared]
            done += len(own[-1]) - shared
        assert all(len(window) == width for window in own[1:-1])
        assert len(own) == 1 or len(row) - 2 > width


def test_each_epoch_draws_other_places() -> None:
    data = SequenceData.from_sequences([list(range(1, 40))] * 20)
    first, again, other = (data.train_windows(6, None, 2, seed) for seed in ((0, 0), (0, 0), (0, 1)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    newest = [int((row != 0).sum()) for row in first if row[-1] == 37]
    assert len(set(newest)) == 5  # every length that a last window can have: 1 to 5 items that are predicted


@quick
@given(sequences, st.integers(1, 8), st.integers(1, 3))
def test_a_window_ends_at_every_item(lists: list[list[int]], width: int, least: int) -> None:
    least = min(least, width)
    lists = [row for row in lists if len(row) - 2 >= least] or [list(range(1, least + 3))]
    got = SequenceData.from_sequences(lists).train_windows(width, None, least, prefixes="all").tolist()
    assert got == [pad(row[:end][-width:], width) for row in lists for end in range(least, len(row) - 1)]


@quick
@given(sequences, st.integers(2, 8), st.integers(1, 3), st.sampled_from([None, 1, 3]), st.integers(0, 99))
def test_a_window_comes_a_second_time_without_its_newest_items(
    lists: list[list[int]], width: int, least: int, step: int | None, seed: int
) -> None:
    least = min(least, width)
    lists = [row for row in lists if len(row) - 2 >= least] or [list(range(1, least + 3))]
    data = SequenceData.from_sequences(lists)
    whole = data.train_windows(width, step, least, (seed,)).tolist()
    both = data.train_windows(width, step, least, (seed,), prefixes="one").tolist()
    assert both[: len(whole)] == whole
    longer = [[item for item in row if item] for row in whole if sum(map(bool, row)) > least]
    assert len(both) - len(whole) == len(longer)
    for row, more in zip(longer, both[len(whole) :], strict=True):
        kept = [item for item in more if item]
        assert least <= len(kept) < len(row)
        assert more == pad(row[: len(kept)], width)


def test_each_epoch_draws_other_ends() -> None:
    data = SequenceData.from_sequences([list(range(1, 8))] * 40)
    first, again, other = (data.train_windows(9, None, 2, seed, "one")[40:] for seed in ((0, 0), (0, 0), (0, 1)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert {int((row != 0).sum()) for row in first} == {2, 3, 4}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prefixes": "two"}, "expected prefixes 'none', 'one' or 'all', got 'two'"),
        ({"prefixes": "all"}, 'expected step None with prefixes="all", got 1'),
    ],
)
def test_prefixes_that_cannot_be_had(more: dict[str, Any], message: str) -> None:
    with pytest.raises(EnsembleKDError, match=re.escape(message)):
        SequenceData.from_sequences([[1, 2, 3, 4]]).train_windows(5, **more)


def test_windows_of_too_short_users_are_an_error() -> None:
    with pytest.raises(EnsembleKDError, match="expected a user with 3 training items, got at most 2"):
        SequenceData.from_sequences([[1, 2, 3, 4]]).train_windows(5, min_len=3)


def test_sequence_data_refuses() -> None:
    items, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 3])
    cases = [
        ((items.float(), offsets, 3), "flat int64 items on the CPU"),
        ((items, offsets[None], 3), "flat int64 offsets on the CPU"),
        ((items, torch.tensor([0, 2]), 3), r"offsets from 0 to 3"),
        ((items, torch.tensor([0]), 3), r"at least one user"),
        ((items, torch.tensor([0, 1, 3]), 3), r"at least 3 items per user, got 1 of user 0"),
        ((items - 1, offsets, 3), r"item ids in 1\.\.3, got 0\.\.2"),
        ((items, offsets, 2), r"item ids in 1\.\.2, got 1\.\.3"),
        ((items, offsets, 3, ItemAttributes.from_dict({1: [1]}, 2)), "item_attributes of length 3, got 2"),
        ((items, offsets, 3, None, ("a",)), "item_names of length 3, got 1"),
        ((items, offsets, 3, None, None, ("a", "b")), "user_names of length 1, got 2"),
    ]
    for arguments, words in cases:
        with pytest.raises(EnsembleKDError, match=words):
            SequenceData(*arguments)
    for made in ((items.numpy(), offsets, 3), (items, [0, 3], 3)):
        with pytest.raises(EnsembleKDError, match=r"as a tensor, got .*Use SequenceData\.from_sequences"):
            SequenceData(*made)
    data = SequenceData(items, offsets, np.int64(3))
    assert type(data.num_items) is int
    with pytest.raises(EnsembleKDError, match="split 'valid' or 'test', got 'train'"):
        data.target("train")
    with pytest.raises(EnsembleKDError, match="split 'train', 'valid', 'test' or 'all', got 'dev'"):
        data.history("dev")  # type: ignore[arg-type]
    for call in (lambda: data.inputs("test", 0), lambda: data.train_windows(0), lambda: data.train_windows(2, 0)):
        with pytest.raises(EnsembleKDError, match=">= 1, got 0"):
            call()
    with pytest.raises(EnsembleKDError, match="at least one sequence"):
        SequenceData.from_sequences([])


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ([[1, 1.5, 2]], r"at least 3 whole numbers per user, got float64 \(3,\) of user 0"),
        ([[1, 2, 3], [1, True, 2]], "at least 3 whole numbers per user, got object .* of user 1"),
        ([[1, 2, [3]]], "at least 3 whole numbers per user, got object"),
        ([["1", "2", "3"]], "at least 3 whole numbers per user, got <U1"),
        ([1, 2, 3], r"at least 3 whole numbers per user, got int64 \(\) of user 0"),
        ([[1, 2]], r"at least 3 whole numbers per user, got int64 \(2,\) of user 0"),
        ([[1, 2, 2**62]], r"item ids in 1\.\.2147483646, got 1\.\.4611686018427387904 of user 0"),
        ([[1, 2, 2**64]], "at least 3 whole numbers per user, got object|item ids in"),
        ([[1, 2, 0]], r"item ids in .*, got 0\.\.2 of user 0"),
    ],
)
def test_sequences_of_anything_else_are_refused(lists: list[list[int]], words: str) -> None:
    with pytest.raises(EnsembleKDError, match=words):
        SequenceData.from_sequences(lists)


def test_sequences_may_be_arrays_and_tensors() -> None:
    rows = [[3, 1, 2], [2, 2, 4, 1]]
    plain = SequenceData.from_sequences(rows)
    for kind in (np.array, torch.tensor, tuple, iter, lambda row: np.array(row, dtype=np.uint8)):
        data = SequenceData.from_sequences([kind(row) for row in rows])
        assert data.checksum == plain.checksum
    assert type(SequenceData.from_sequences(rows, num_items=np.int32(4)).num_items) is int
