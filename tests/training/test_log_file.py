"""log.jsonl: no kill loses an entry that a checkpoint counts, and damage is one clear error."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ensemble_kd import EnsembleKDError
from ensemble_kd.training.log import RunLog
from tests.training.runs import log_of, sasrec, train
from tests.training.test_resume import Killed


def opened(folder: Path, entries: int) -> RunLog:
    log = RunLog(folder, None, progress=False)
    assert log.open(entries=entries, step=0) == entries
    log.close()
    return log


def write(folder: Path, *steps: int) -> bytes:
    log = opened(folder, 0)
    for step in steps:
        log.write({"kind": "step", "step": step})
    return (folder / "log.jsonl").read_bytes()


@pytest.fixture(autouse=True)
def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)


def test_entries_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    opened(tmp_path, 2).write({"kind": "step", "step": 33})
    assert [entry["step"] for entry in log_of(tmp_path)] == [1, 2, 33]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_kill_while_the_log_is_shortened_loses_nothing(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(tmp_path, 1, 2, 3)

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, step, killed)
        with pytest.raises(Killed):
            opened(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_bytes() == whole
    opened(tmp_path, 2)
    assert [entry["step"] for entry in log_of(tmp_path)] == [1, 2]


def test_a_log_that_is_right_is_not_touched(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    before = (tmp_path / "log.jsonl").stat()
    opened(tmp_path, 2)
    after = (tmp_path / "log.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda whole: whole[:-5], 3),
        (lambda whole: whole[:-1], 3),
        (lambda whole: b"\xff" + whole, 1),
        (lambda whole: whole.replace(b"2}", b"2"), 2),
        (lambda whole: b"[1]\n" + whole, 1),
        (lambda whole: b"", 1),
        (lambda whole: b"[" * 100_000 + b"\n" + whole, 1),
    ],
    ids=["torn", "no newline", "not text", "not JSON", "not an entry", "empty", "nested"],
)
def test_a_damaged_log_is_one_clear_error(damage: Any, line: int, tmp_path: Path) -> None:
    damaged = damage(write(tmp_path, 1, 2, 3))
    (tmp_path / "log.jsonl").write_bytes(damaged)
    text = rf"^resume: expected log\.jsonl with 3 entries, got .*log\.jsonl, damaged at line {line}\. Move it away"
    with pytest.raises(EnsembleKDError, match=text):
        opened(tmp_path, 3)
    assert (tmp_path / "log.jsonl").read_bytes() == damaged


def test_a_torn_entry_that_no_checkpoint_counts_is_cut(tmp_path: Path) -> None:
    whole = write(tmp_path, 1, 2)
    (tmp_path / "log.jsonl").write_bytes(whole + b"\xff{")
    opened(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_bytes() == whole


def test_a_log_that_was_moved_away_begins_anew(tmp_path: Path) -> None:
    def stop(entry: Mapping[str, Any]) -> None:
        if entry["step"] == 6:
            raise Killed

    with pytest.raises(Killed):
        train(sasrec(losses=0), output_dir=tmp_path, callback=stop)
    (tmp_path / "log.jsonl").write_bytes(b"damaged")
    with pytest.raises(EnsembleKDError, match="Move it away, and the run goes on with a new log"):
        train(sasrec(losses=0), output_dir=tmp_path, resume=True)
    (tmp_path / "log.jsonl").rename(tmp_path / "damaged.jsonl")
    with pytest.raises(Killed):
        train(sasrec(losses=0), output_dir=tmp_path, resume=True, callback=stop)
    assert [entry["step"] for entry in log_of(tmp_path)] == [6]
    train(sasrec(losses=0), output_dir=tmp_path, resume=True)
    assert [entry["step"] for entry in log_of(tmp_path)] == [6, 8, 9, 12, 12]


def test_entries_are_on_the_disk_before_a_checkpoint_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = [0]
    fsync, replace = os.fsync, os.replace

    def noted(descriptor: int) -> None:
        if (tmp_path / "log.jsonl").exists() and os.path.samestat(
            os.fstat(descriptor), (tmp_path / "log.jsonl").stat()
        ):
            synced.append((tmp_path / "log.jsonl").read_bytes().count(b"\n"))
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        if Path(target).name == "last.pt" and (tmp_path / "log.jsonl").exists():
            assert synced[-1] == len((tmp_path / "log.jsonl").read_text().splitlines())
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", replaced)
    train(sasrec(losses=0), epochs=2, output_dir=tmp_path)
    assert len(synced) > 4
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["kind"] == "epoch"
