"""Sequences on disk: what is written is read, an epoch has every window once, and training and evaluation work."""

from __future__ import annotations

import os
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
    opening,
    synthetic,
    write_sequences,
    writing,
)
from ensemble_kd.encoders import SASRec
from ensemble_kd.evaluation import evaluate
from tests.training.runs import assert_same_checkpoint

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


def test_drawn_windows_predict_every_item_once(folder: Path) -> None:
    """Each block draws for itself, so that the windows are others than those in memory, but of the same items."""
    data = MappedSequences(folder, block=BLOCK)
    plans = [BlockPlan(data.train_windows(6, None, 2, (0, epoch)), 16, 0, epoch) for epoch in (0, 0, 1)]
    rows = [rows_of(list(plan.batches())) for plan in plans]
    predicted = [sorted(item for row in each for item in row[1:]) for each in rows]
    wanted = sorted(item for row in sequences_of(DATA) for item in row[1:-2].tolist())
    assert predicted == [wanted] * 3
    assert rows[0] == rows[1] != rows[2]


def test_windows_end_where_those_in_memory_do(folder: Path) -> None:
    data = MappedSequences(folder, block=BLOCK)
    every = BlockPlan(data.train_windows(6, None, 2, prefixes="all"), 16, 0, 0)
    assert rows_of(list(every.batches())) == rows_of([DATA.train_windows(6, None, 2, prefixes="all")])
    more = [BlockPlan(data.train_windows(6, 2, 2, (0, epoch), "one"), 16, 0, epoch) for epoch in (0, 0, 1)]
    rows = [rows_of(list(plan.batches())) for plan in more]
    assert rows[0] == rows[1] != rows[2]
    assert {len(each) for each in rows} == {len(DATA.train_windows(6, 2, 2, (0, 0), "one"))}


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


def data_files(folder: Path) -> list[Path]:
    """The items' file, the offsets' file and about.json."""
    return [*sorted(folder.glob("*.int*")), folder / "about.json"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Every byte of every file, changed in one bit, cut off, or added: an error before anything is read."""
    sequences = [[1, 2, 3], [3, 2, 1, 4]]
    write_sequences(tmp_path, sequences, num_items=4)
    flips = 0
    for path in data_files(tmp_path):
        whole = path.read_bytes()
        damaged = [whole[:-1], whole + b"0", b""]
        for place in range(len(whole)):
            for bit in (0, 7):
                changed = bytearray(whole)
                changed[place] ^= 1 << bit
                damaged.append(bytes(changed))
        for content in damaged:
            path.write_bytes(content)
            with pytest.raises(EnsembleKDError, match="MappedSequences: expected"):
                MappedSequences(tmp_path)
            flips += 1
        path.write_bytes(whole)
        path.unlink()
        with pytest.raises(EnsembleKDError, match="Write it"):
            MappedSequences(tmp_path)
        path.write_bytes(whole)
    assert flips > 500
    assert MappedSequences(tmp_path).num_users == 2


def test_offsets_that_lead_anywhere_are_refused_without_checksums(tmp_path: Path) -> None:
    """A reader that trusted them would ask for as much memory as they say."""
    write_sequences(tmp_path, [[1, 2, 3], [3, 2, 1, 4], [1, 2, 3]], num_items=4)
    path = next(tmp_path.glob("offsets-*"))
    for offsets in ([0, 2**40, 7, 10], [0, 3, 5, 10], [0, 7, 3, 10], [3, 6, 9, 12], [0, -3, 3, 10]):
        path.write_bytes(np.array(offsets, dtype="<i8").tobytes())
        with pytest.raises(EnsembleKDError, match="expected offsets that rise from 0 to 10"):
            MappedSequences(tmp_path, verify=False)


def test_checksums_are_compared_once_per_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sequences(tmp_path, [[1, 2, 3], [3, 2, 1, 4]], num_items=4)
    read: list[int] = []
    crc32 = opening.zlib.crc32
    monkeypatch.setattr(opening.zlib, "crc32", lambda data, start=0: read.append(len(data)) or crc32(data, start))
    MappedSequences(tmp_path, verify=False)
    without = len(read)
    MappedSequences(tmp_path)
    assert len(read) == 2 * without + 2  # two files
    MappedSequences(tmp_path)
    assert len(read) == 3 * without + 2


def test_new_sequences_leave_open_ones_alone(tmp_path: Path) -> None:
    """What is open stays readable to its last item, where a file cut short under it would end the process."""
    old = [np.full(5000, user % 7 + 1) for user in range(60)]
    write_sequences(tmp_path, old, num_items=7)
    data = MappedSequences(tmp_path, block=1000)
    for attempt in range(3):
        write_sequences(tmp_path, [[1, 2, 3], [attempt + 1, 2, 1]], num_items=3)
        assert torch.equal(torch.cat([piece.items for piece in data.pieces()]), torch.from_numpy(np.concatenate(old)))
        assert MappedSequences(tmp_path).num_users == 2
        assert len(data_files(tmp_path)) == len(list(tmp_path.iterdir())) == 3  # nothing of the old ones is left


def test_sequences_that_fail_leave_the_old_ones(tmp_path: Path) -> None:
    write_sequences(tmp_path, [[1, 2, 3]], num_items=4)
    for bad in ([[3, 2, 1], [1, 2]], []):
        with pytest.raises(EnsembleKDError):
            write_sequences(tmp_path, bad, num_items=4)
        assert next(MappedSequences(tmp_path).pieces()).items.tolist() == [1, 2, 3]
        assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "writing").mkdir()
    (tmp_path / "writing" / "items").write_bytes(b"of a killed process")
    write_sequences(tmp_path, [[3, 2, 1]], num_items=np.int64(4))  # type: ignore[arg-type]
    assert next(MappedSequences(tmp_path).pieces()).items.tolist() == [3, 2, 1]
    with pytest.raises(EnsembleKDError, match="write_sequences: expected a folder that can be written"):
        write_sequences(tmp_path / "about.json", [[1, 2, 3]], num_items=4)


def test_a_kill_at_any_operation_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of the system's in turn is the last one."""

    class Stop(BaseException):
        pass

    done = False
    last = 0
    while not done:
        folder = tmp_path / str(last)
        write_sequences(folder, [[1, 2, 3]], num_items=4)
        calls = 0

        def counted(call: Any, last: int = last) -> Any:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > last:
                    raise Stop
                return call(*arguments, **options)

            return wrapped

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "mkdir")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            patch.setattr(writing.shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing up
            try:
                write_sequences(folder, [[4, 3, 2, 1]], num_items=4)
                done = True
            except Stop:
                pass
        assert next(MappedSequences(folder).pieces()).items.tolist() in ([1, 2, 3], [4, 3, 2, 1])
        write_sequences(folder, [[2, 2, 2]], num_items=4)
        assert next(MappedSequences(folder).pieces()).items.tolist() == [2, 2, 2]
        last += 1
    assert last > 8


def test_a_reader_that_meets_a_writer_opens_the_new_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sequences(tmp_path, [[1, 2, 3]], num_items=4)
    read_about, calls = opening._read_about, 0

    def meanwhile(folder: Path) -> dict[str, Any]:
        nonlocal calls
        about, calls = read_about(folder), calls + 1
        if calls == 1:
            write_sequences(tmp_path, [[4, 3, 2, 1]], num_items=4)
        return about

    monkeypatch.setattr(opening, "_read_about", meanwhile)
    assert next(MappedSequences(tmp_path).pieces()).items.tolist() == [4, 3, 2, 1]


def test_processes_without_blocks_are_refused(folder: Path) -> None:
    windows = MappedSequences(folder).train_windows(6)  # one block holds all
    with pytest.raises(EnsembleKDError, match="expected 2 blocks with windows or more, got 1"):
        BlockPlan(windows, 8, 0, 0, part=(0, 2))
    with pytest.raises(EnsembleKDError, match="batch_size, a whole number >= 2, got 1"):
        BlockPlan(windows, 1, 0, 0, part=(0, 2))
