"""Sequences on disk: what is written is read, an epoch has every window once, and training and evaluation work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ensemble_kd import EnsembleKD, EnsembleKDError, fit
from ensemble_kd.data import (
    BlockPlan,
    MappedSequences,
    SequenceData,
    synthetic,
    write_sequences,
)
from ensemble_kd.encoders import SASRec
from ensemble_kd.evaluation import evaluate
from tests.training.test_fit import assert_same_checkpoint

DATA = synthetic(num_users=90, num_items=80, num_clusters=8, max_len=14)
BLOCK = 40  # interactions: several groups of blocks, even for one process


def sequences_of(data: SequenceData) -> list[np.ndarray[Any, Any]]:
    return [part.numpy() for part in data.items.tensor_split(data.offsets[1:-1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mapped")
    write_sequences(folder, iter(sequences_of(DATA)), num_items=DATA.num_items)
    return folder


def rows_of(batches: list[Tensor]) -> list[tuple[int, ...]]:
    return sorted(tuple(item for item in row if item) for batch in batches for row in batch.tolist())


def test_what_is_written_is_read(folder: Path) -> None:
    data = MappedSequences(folder, block=BLOCK)
    assert (data.num_users, data.num_items) == (DATA.num_users, DATA.num_items)
    assert data.num_interactions == DATA.num_interactions
    pieces = list(data.pieces())
    assert len(pieces) == data.num_blocks > 16
    assert torch.equal(torch.cat([piece.items for piece in pieces]), DATA.items)
    assert torch.equal(torch.cat([piece.offsets.diff() for piece in pieces]), DATA.offsets.diff())
    assert max(piece.num_interactions for piece in pieces) < BLOCK + int(DATA.offsets.diff().max())


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("batch_size", "step", "min_len"), [(16, 1, 2), (5, 3, 1), (3, 2, 4)])
def test_every_window_is_in_one_batch_of_one_process(
    folder: Path, processes: int, batch_size: int, step: int, min_len: int
) -> None:
    windows = MappedSequences(folder, block=BLOCK).train_windows(6, step, min_len)
    expected = DATA.train_windows(6, step, min_len)
    assert len(windows) == len(expected)
    plans = [BlockPlan(windows, batch_size, 7, 1, (rank, processes)) for rank in range(processes)]
    found = [list(plan.batches()) for plan in plans]
    assert {len(batches) for batches in found} == {len(plans[0])}
    assert rows_of([batch for batches in found for batch in batches]) == rows_of([expected])
    for parts in zip(*found, strict=True):
        assert len({part.shape[1] for part in parts}) == 1
        assert min(map(len, parts)) >= 1
        assert sum(map(len, parts)) >= 2
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 + batch_size // 2
        assert min(int((part[:, 0] == 0).all()) for part in parts) == 0  # no column is padding throughout


def test_processes_read_blocks_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = [[], []]
    items_of = MappedSequences.items_of
    for rank in range(2):
        data = MappedSequences(folder, block=BLOCK)
        monkeypatch.setattr(MappedSequences, "items_of", lambda d, i, r=rank: read[r].append(i) or items_of(d, i))
        list(BlockPlan(data.train_windows(6), 8, 0, 0, part=(rank, 2)).batches())
    assert not set(read[0]) & set(read[1])
    assert sorted(read[0] + read[1]) == list(range(data.num_blocks))


def test_an_epoch_goes_on_where_it_stopped(folder: Path) -> None:
    windows = MappedSequences(folder, block=BLOCK).train_windows(6)
    plan = BlockPlan(windows, 8, seed=1, epoch=2)
    whole = list(plan.batches())
    for start in (0, 1, len(plan) // 2, len(plan) - 1, len(plan)):
        rest = list(BlockPlan(windows, 8, seed=1, epoch=2).batches(start))
        assert len(rest) == len(whole) - start
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[start:], strict=True))
    other = next(iter(BlockPlan(windows, 8, seed=1, epoch=3).batches()))
    assert rows_of([other]) != rows_of(whole[:1])


def sasrec() -> EnsembleKD:
    return EnsembleKD(lambda: SASRec(80, d_model=4, num_layers=1, max_len=6), n=2)


class Killed(Exception):
    pass


def test_fit_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    data = MappedSequences(folder, block=BLOCK)
    options: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 1e-2, "progress": False, "log_every": 1}

    def kill(entry: Mapping[str, Any]) -> None:
        if entry["step"] == 5:
            raise Killed

    whole, again = sasrec(), sasrec()
    result = fit(whole, data, output_dir=tmp_path / "whole", **options)
    assert result.history[1]["train"]["nip"] < result.history[0]["train"]["nip"]
    with pytest.raises(Killed):
        fit(sasrec(), data, output_dir=tmp_path / "again", checkpoint_every_s=0.0, callback=kill, **options)
    fit(again, data, output_dir=tmp_path / "again", resume=True, **options)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))
    assert_same_checkpoint(tmp_path / "whole" / "last.pt", tmp_path / "again" / "last.pt")
    other = MappedSequences(folder, block=2 * BLOCK)
    with pytest.raises(EnsembleKDError, match=r"block=40.* then, .*block=80"):
        fit(sasrec(), other, output_dir=tmp_path / "again", resume=True, **options)


@pytest.mark.parametrize("exclude", ["none", "window", "history"])
def test_evaluation_is_that_of_data_in_memory(folder: Path, exclude: Any) -> None:
    model = sasrec()
    found = evaluate(model, MappedSequences(folder, block=BLOCK), "test", exclude=exclude)
    expected = evaluate(model, DATA, "test", exclude=exclude)
    assert found.protocol == expected.protocol
    assert found.rows == expected.rows
    assert all(torch.equal(ranks, expected.ranks[name]) for name, ranks in found.ranks.items())


@pytest.mark.parametrize(
    ("sequences", "text"),
    [
        ([], "at least one sequence, got none"),
        ([[1, 2, 3], [1, 2]], "at least 3 whole numbers per user, got int64 .2,. of user 1"),
        ([[1.0, 2.0, 3.0]], "at least 3 whole numbers per user, got float64"),
        ([[1, 2, 9]], "item ids in 1..5, got 1..9 of user 0"),
        ([[0, 1, 2]], "item ids in 1..5, got 0..2 of user 0"),
    ],
)
def test_sequences_that_cannot_be_used_are_refused(sequences: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(EnsembleKDError, match=text):
        write_sequences(tmp_path, sequences, num_items=5)
    with pytest.raises(EnsembleKDError, match="expected a folder of whole sequences"):  # nothing half written is read
        MappedSequences(tmp_path)


def test_an_older_set_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """A reader that has the older set mapped goes on reading it; a set that is refused replaces nothing."""
    write_sequences(tmp_path, [[1, 2, 3], [3, 2, 1, 4]], num_items=4)
    older = MappedSequences(tmp_path)
    with pytest.raises(EnsembleKDError, match=r"item ids in 1\.\.4"):
        write_sequences(tmp_path, [[1, 2, 3, 4, 4], [5, 1, 2]], num_items=4)
    assert MappedSequences(tmp_path).num_interactions == 7
    write_sequences(tmp_path, [[4, 4, 4]], num_items=4)
    assert older.items_of(0).tolist() == [1, 2, 3, 3, 2, 1, 4]
    assert MappedSequences(tmp_path).items_of(0).tolist() == [4, 4, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", "items.int32", "offsets.int64"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    write_sequences(tmp_path, [[1, 2, 3], [3, 2, 1, 4]], num_items=4)
    items = tmp_path / "items.int32"
    items.write_bytes(items.read_bytes()[:-4])
    with pytest.raises(EnsembleKDError, match="Write it with write_sequences, to the end"):
        MappedSequences(tmp_path)


def test_processes_without_blocks_are_refused(folder: Path) -> None:
    windows = MappedSequences(folder).train_windows(6)  # one block holds all
    with pytest.raises(EnsembleKDError, match="expected 2 blocks with windows or more, got 1"):
        BlockPlan(windows, 8, 0, 0, part=(0, 2))
    with pytest.raises(EnsembleKDError, match="batch_size, a whole number >= 2, got 1"):
        BlockPlan(windows, 1, 0, 0, part=(0, 2))
