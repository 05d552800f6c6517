"""Items held back: by leave-one-out, by cuts of each user's items, or none."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble_kd import EnsembleKD
from ensemble_kd.data import Cuts, MappedSequences, SequenceData, write_sequences
from ensemble_kd.encoders import SASRec
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.evaluation import evaluate, evaluate_popularity

ROWS = st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=7), min_size=1, max_size=5)


def rows_of(items: torch.Tensor, offsets: torch.Tensor) -> list[list[int]]:
    return [items[a:b].tolist() for a, b in itertools.pairwise(offsets)]


@given(ROWS)
def test_leave_one_out_in_plain_python(rows: list[list[int]]) -> None:
    data = SequenceData.from_sequences(rows)
    assert rows_of(*data.history("train")) == [row[:-2] for row in rows]
    assert rows_of(*data.history("valid")) == [row[:-2] for row in rows]
    assert rows_of(*data.history("test")) == [row[:-1] for row in rows]
    assert rows_of(*data.history("all")) == rows
    assert data.target("valid").tolist() == [row[-2] for row in rows]
    assert data.target("test").tolist() == [row[-1] for row in rows]
    assert data.inputs("all", 3).tolist() == [row[-3:] for row in rows]


@given(ROWS)
def test_nothing_held_out_trains_on_everything(rows: list[list[int]]) -> None:
    data = SequenceData.from_sequences(rows).with_holdout("none")
    assert rows_of(*data.history("train")) == rows
    assert data.train_windows(7).shape[0] == len(rows)
    assert data.popularity().sum() == sum(map(len, rows))
    assert not data.has_targets("valid")
    assert not data.has_targets("test")
    assert data.target("test").numel() == data.inputs("test", 3).numel() == 0
    assert rows_of(*data.with_holdout("last").history("train")) == [row[:-2] for row in rows]


@given(st.data(), ROWS)
def test_cuts_in_plain_python(draws: Any, rows: list[list[int]]) -> None:
    train = [draws.draw(st.integers(0, len(row) - 1)) for row in rows]
    valid = [draws.draw(st.sampled_from([-1, *range(max(t, 1), len(r))])) for t, r in zip(train, rows, strict=True)]
    test = [draws.draw(st.sampled_from([-1, *range(max(t, 1), len(r))])) for t, r in zip(train, rows, strict=True)]
    cuts = Cuts(*map(torch.tensor, (train, valid, test)), name="by hand")
    data = SequenceData.from_sequences(rows, holdout=cuts)
    assert rows_of(*data.history("train")) == [row[:cut] for row, cut in zip(rows, train, strict=True)]
    for split, places in (("valid", valid), ("test", test)):
        users = [u for u, cut in enumerate(places) if cut >= 0]
        assert data.users_of(split).tolist() == users  # type: ignore[arg-type]
        assert rows_of(*data.history(split)) == [rows[u][: places[u]] for u in users]  # type: ignore[arg-type]
        assert data.target(split).tolist() == [rows[u][places[u]] for u in users]  # type: ignore[arg-type]
        shown = [[i for i in row if i] for row in data.inputs(split, 2).tolist()]  # type: ignore[arg-type]
        assert shown == [rows[u][: places[u]][-2:] for u in users]
        assert data.has_targets(split) == bool(users)  # type: ignore[arg-type]


def test_cuts_change_the_checksum_and_are_checked() -> None:
    rows = [[1, 2, 3, 4], [4, 3]]

    def cut(train: list[int], valid: list[int], test: list[int]) -> SequenceData:
        cuts = Cuts(*map(torch.tensor, (train, valid, test)), name="by hand")
        return SequenceData.from_sequences(rows, holdout=cuts)

    assert cut([2, 1], [2, 1], [3, -1]).checksum != cut([1, 1], [2, 1], [3, -1]).checksum
    for arguments, words in (
        (([5, 1], [-1, -1], [-1, -1]), "train within each user's items, got 5 of 4 items of user 0"),
        (([2, 1], [1, -1], [-1, -1]), "valid within each user's items, got 1 of 4 items of user 0"),
        (([0, 0], [-1, 0], [-1, -1]), "valid within each user's items, got 0 of 2 items of user 1"),
        (([2, 1], [-1, -1], [-1, 2]), "test within each user's items, got 2 of 2 items of user 1"),
        (([2], [-1], [-1]), r"train int64 of shape \(2,\)"),
    ):
        with pytest.raises(EnsembleKDError, match=words):
            cut(*arguments)
    with pytest.raises(EnsembleKDError, match="holdout 'last' or 'none', got 'first'"):
        SequenceData.from_sequences(rows, holdout="first")  # type: ignore[arg-type]
    assert SequenceData.from_sequences([[5]], holdout="none").num_users == 1


def test_the_newest_items_alone() -> None:
    data = SequenceData.from_sequences([[1, 2, 3, 4, 5], [5, 4, 3]]).newest(4)
    assert rows_of(*data.history("all")) == [[2, 3, 4, 5], [5, 4, 3]]
    assert (data.target("test").tolist(), data.num_items) == ([5, 3], 5)
    with pytest.raises(EnsembleKDError, match="count, a whole number >= 3"):
        data.newest(2)
    assert data.with_holdout("none").newest(1).items.tolist() == [5, 3]


def test_evaluation_ranks_those_who_have_a_target() -> None:
    """The ranks are those of the same users and targets under leave-one-out."""
    rows = [[1, 2, 3, 4, 5], [5, 4, 3, 1], [2, 4, 1]]
    model = EnsembleKD(lambda: SASRec(6, d_model=4, max_len=5), n=2).eval()
    data = SequenceData.from_sequences(rows, num_items=6)
    whole = evaluate(model, data, "test")
    cuts = Cuts(torch.tensor([2, 4, 1]), torch.tensor([-1, -1, -1]), torch.tensor([4, -1, 2]), "from noon on")
    some = evaluate(model, SequenceData.from_sequences(rows, num_items=6, holdout=cuts), "test")
    assert some.protocol.startswith("from noon on test, 2 users, all 6 items ranked")
    assert some.ranks["ensemble"].tolist() == whole.ranks["ensemble"][[0, 2]].tolist()
    for call in (lambda d: evaluate(model, d, "valid"), lambda d: evaluate_popularity(d, "valid")):
        with pytest.raises(EnsembleKDError, match=r"a valid target, got none \(nothing held out\)"):
            call(data.with_holdout("none"))  # type: ignore[no-untyped-call]


def test_on_disk_as_in_memory(tmp_path: Any) -> None:
    rows = [[1, 2, 3, 4, 5], [5, 4, 3], [2, 2, 1, 4]]
    write_sequences(tmp_path, rows, num_items=5)
    for holdout in ("last", "none"):
        mapped = MappedSequences(tmp_path, block=4, holdout=holdout)  # type: ignore[arg-type]
        memory = SequenceData.from_sequences(rows, holdout=holdout)  # type: ignore[arg-type]
        assert len(mapped.train_windows(3)) == len(memory.train_windows(3))
        assert [data.holdout for data in mapped.pieces()] == [holdout] * mapped.num_blocks
        assert mapped.has_targets("valid") == memory.has_targets("valid")
        assert mapped.held_out == memory.held_out
    with pytest.raises(EnsembleKDError, match="holdout 'last' or 'none'"):
        MappedSequences(tmp_path, holdout="first")  # type: ignore[arg-type]
