"""One run at a time writes into a folder, and none replaces another unasked."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ensemble_kd import EnsembleKDError
from ensemble_kd.distributed import Place
from ensemble_kd.internal import files
from ensemble_kd.training import folder as posix
from ensemble_kd.training.folder import LOCK, claimed, locked
from tests.training.runs import sasrec, train
from tests.training.test_resume import Killed

HOLDER = """
import sys, time
from pathlib import Path
from ensemble_kd.training.folder import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""
IN_USE = r"^fit: expected an output_dir for one run, got .*, in use by process {} on \S+\. Wait for it to end"


def test_two_processes(tmp_path: Path) -> None:
    """The lock names its holder, and ends with it however it ends."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(EnsembleKDError, match=IN_USE.format(holder.pid)):
            train(sasrec(losses=0), epochs=1, output_dir=tmp_path)
        assert os.listdir(tmp_path) == [".lock"]
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    assert os.listdir(tmp_path) == [".lock"]
    train(sasrec(losses=0), epochs=1, output_dir=tmp_path)
    assert ".lock" not in os.listdir(tmp_path)


def test_two_runs_in_one_process(tmp_path: Path) -> None:
    def second(entry: Mapping[str, Any]) -> None:
        with pytest.raises(EnsembleKDError, match=IN_USE.format(os.getpid())):
            train(sasrec(losses=0), epochs=1, output_dir=tmp_path, overwrite=True)

    assert len(train(sasrec(losses=0), epochs=1, output_dir=tmp_path, callback=second).history) == 1


def test_a_lock_is_taken_by_one_of_many(tmp_path: Path) -> None:
    """Each removes the file as it leaves: no two are ever inside together."""
    inside, most, taken = 0, 0, 0

    def run() -> None:
        nonlocal inside, most, taken
        for _ in range(200):
            try:
                with locked(tmp_path):
                    inside += 1
                    most, taken = max(most, inside), taken + 1
                    inside -= 1
            except EnsembleKDError:
                pass

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert taken >= 4
    assert os.listdir(tmp_path) == []


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_is_not_replaced_unasked(tmp_path: Path) -> None:
    train(sasrec(losses=0), epochs=1, output_dir=tmp_path)
    before = content(tmp_path)
    text = r"^fit: expected an output_dir without a run, got .*, which has last\.pt, best\.pt, log\.jsonl\. Pass"
    with pytest.raises(EnsembleKDError, match=text):
        train(sasrec(losses=0), epochs=1, output_dir=tmp_path)
    assert content(tmp_path) == before
    train(sasrec(losses=0), epochs=1, output_dir=tmp_path, overwrite=True, seed=1)
    after = content(tmp_path)
    events = [[name for name in files if name.startswith("events.")] for files in (before, after)]
    assert len(events[0]) == len(events[1])  # 1 with TensorBoard, 0 without
    names = before.keys() - events[0]
    assert names == after.keys() - events[1]
    assert all(after[name] != before[name] for name in names)
    assert after["log.jsonl"].count(b"\n") == before["log.jsonl"].count(b"\n")


@pytest.mark.parametrize("left", ["best.pt", "log.jsonl"])
def test_a_run_without_its_last_checkpoint_is_not_replaced(left: str, tmp_path: Path) -> None:
    train(sasrec(losses=0), epochs=1, output_dir=tmp_path)
    for name in {"last.pt", "best.pt", "log.jsonl"} - {left}:
        (tmp_path / name).unlink()
    before = content(tmp_path)
    with pytest.raises(EnsembleKDError, match=rf"^resume: expected last\.pt in .*, got {left} alone\. Put"):
        train(sasrec(losses=0), epochs=1, output_dir=tmp_path, resume=True)
    with pytest.raises(EnsembleKDError, match=rf"which has {left}\. Pass resume=True"):
        train(sasrec(losses=0), epochs=1, output_dir=tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("where", ["last.pt", "best.pt", "log.jsonl"])
def test_a_replacement_killed_at_its_start(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands there afterwards is one run: the older one whole, or the new one at its first step."""
    train(sasrec(losses=0), epochs=1, output_dir=tmp_path, schedule=lambda epoch, epochs: 1.0)
    curves = tmp_path / "events.out.tfevents.0.older"  # as TensorBoard's, also where it is not installed
    curves.write_bytes(b"curves")
    before = content(tmp_path)

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.name == where:
            raise Killed
        os.unlink(self)

    with monkeypatch.context() as patch:
        if where == "last.pt":
            patch.setattr("os.replace", lambda *paths: killed(Path(paths[1])))
        else:
            patch.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            train(sasrec(losses=0), epochs=2, output_dir=tmp_path, overwrite=True, schedule=lambda epoch, epochs: 1.0)
    if where == "last.pt":
        assert content(tmp_path) == before
    else:
        assert files.load(tmp_path / "last.pt")["progress"]["step"] == 0
        assert not curves.exists()
        found = train(sasrec(losses=0), epochs=2, output_dir=tmp_path, resume=True, schedule=lambda epoch, epochs: 1.0)
        assert len(found.history) == 2
        assert content(tmp_path)["log.jsonl"].count(b"epoch") > before["log.jsonl"].count(b"epoch")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(EnsembleKDError, match=r"^fit: expected an output_dir that can be made, got .*Not a directory"),
        claimed(tmp_path / "file" / "run", Place(), resume=False, overwrite=False),
    ):
        pass


def test_a_folder_without_locks_is_used_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked"), locked(tmp_path):
        pass


class Locking(ModuleType):
    """The one function of msvcrt, which Windows alone has, as its manual describes it.

    It locks bytes from where the file stands, for one handle, even against others of the same process. What is locked
    no other handle can read. The lock ends with the handle.
    """

    LK_NBLCK = 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.taken: dict[tuple[int, int], int] = {}  # (file, byte) -> handle

    def locking(self, handle: int, mode: int, count: int) -> None:
        assert (mode, count) == (self.LK_NBLCK, 1)
        place = os.fstat(handle).st_ino, os.lseek(handle, 0, os.SEEK_CUR)
        if self.taken.get(place, handle) != handle:
            raise OSError(errno.EACCES, "Permission denied")
        self.taken[place] = handle

    def close(self, handle: int) -> None:
        self.taken = {place: owner for place, owner in self.taken.items() if owner != handle}


def test_the_lock_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls run here against a description of msvcrt; CI has no Windows."""
    windows = Locking()
    spec = importlib.util.spec_from_file_location("folder_on_windows", posix.__file__)
    assert spec is not None
    assert spec.loader is not None
    folder = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "msvcrt", windows)
        patch.setattr(sys, "platform", "win32")
        spec.loader.exec_module(folder)
    folder.os = SimpleNamespace(**{**vars(os), "name": "nt"})  # type: ignore[attr-defined]
    path, holder = tmp_path / LOCK, IN_USE.format(os.getpid())
    for _ in range(2):
        with folder.locked(tmp_path):
            (((file, byte), handle),) = windows.taken.items()
            assert file == path.stat().st_ino
            assert byte >= path.stat().st_size > 0  # else no other run could read whose lock it is
            with pytest.raises(EnsembleKDError, match=holder), folder.locked(tmp_path):
                pass
            assert path.exists()
            os.fstat(handle)  # still open, by which the lock is kept
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)
        windows.close(handle)
        assert not path.exists()
