"""Files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble_kd import EnsembleKDError
from ensemble_kd.internal import (
    append,
    load,
    replacing,
    save,
    sync,
)


def write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def test_a_file_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "a.tmp").write_bytes(b"what a killed process left")
    for content in (b"one", b"two"):
        write(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content
        assert os.listdir(tmp_path) == ["a"]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        order.append(("fsync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def replaced(*paths: Path) -> None:
        order.append(("replace",))
        replace(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write(tmp_path / "a", b"all of it")
    (name, inode, size), renamed, (folder, folder_inode, _) = order
    assert (name, inode, size) == ("fsync", (tmp_path / "a").stat().st_ino, 9)  # all bytes, not what was flushed so far
    assert renamed == ("replace",)
    assert (folder, folder_inode) == ("fsync", tmp_path.stat().st_ino)


def fail_with(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


ERRORS = [OSError(28, "No space left on device"), RuntimeError("torn"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=["OSError", "RuntimeError", "KeyboardInterrupt"])
def test_a_block_that_fails_leaves_the_older_file_alone(error: BaseException, tmp_path: Path) -> None:
    """The block's own errors, a reader's say, are not called a failure to write."""
    write(tmp_path / "a", b"older")
    with pytest.raises(type(error)) as caught, replacing(tmp_path / "a") as file:  # noqa: PT012
        file.write(b"half of it")
        file.flush()
        raise error
    assert caught.value is error
    assert (tmp_path / "a").read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", ERRORS, ids=["OSError", "RuntimeError", "KeyboardInterrupt"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_older_file_alone(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write(path, b"older")
    explained = isinstance(error, OSError)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail_with(error))
        with pytest.raises(EnsembleKDError if explained else type(error)) as caught:
            write(path, b"newer")
    if explained:
        text = f"write: expected a file that can be written, got {path} (No space left on device). Free some room"
        assert str(caught.value).startswith(text)
        assert caught.value.__cause__ is error
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["a"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from ensemble_kd.internal.files import append, load, replacing, save, sync
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with replacing(Path(sys.argv[1])) as file:
    {write}
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="no limits on the size of files")
@pytest.mark.parametrize("writing", ["torch.save(torch.zeros(100_000), file)", "file.write(bytes(200_000))"])
def test_a_full_disk(writing: str, tmp_path: Path) -> None:
    """torch.save hides the system's error under a RuntimeError of its own."""
    write(tmp_path / "a", b"older")
    code = LIMITED.format(write=writing)
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ensemble_kd.errors.EnsembleKDError: write: expected a file that can be written, got {tmp_path}"
    )
    assert "(File too large). Free some room" in last
    assert (tmp_path / "a").read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("path", ["none/a", "a/b"], ids=["no folder", "a file for a folder"])
def test_a_place_that_cannot_be_written(path: str, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(EnsembleKDError, match=r"^write: expected a file that can be written, got .*(No such|Not a)"):
        write(tmp_path / path, b"x")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "sealed").mkdir(mode=0o500)
    with pytest.raises(EnsembleKDError, match=r"Permission denied"):
        write(tmp_path / "sealed" / "a", b"x")


@pytest.mark.slow
def test_a_killed_process_leaves_the_older_file(tmp_path: Path) -> None:
    write(tmp_path / "a", b"older")
    code = (
        "import os, signal, sys; from pathlib import Path; from ensemble_kd.internal.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == b"older"
    write(tmp_path / "a", b"newer")
    assert os.listdir(tmp_path) == ["a"]


CONTENT: dict[str, Any] = {
    "weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False])},
    "at": {"epoch": 3, "batch": 0},
    "history": [{"valid": 0.25, "name": "ensemble"}, None],
}


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save(path, CONTENT)
    assert same(load(path), CONTENT)
    assert os.listdir(tmp_path) == ["last.pt"]
    save(path, {"epoch": 1})  # over an old one
    assert load(path) == {"epoch": 1}


def test_every_length_of_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save(path, CONTENT)
    whole = path.read_bytes()
    for length in {*range(0, len(whole) - 1, 97), 1, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(
            EnsembleKDError, match=r"^checkpoint: expected a whole checkpoint of ensemble_kd, got .*last"
        ):
            load(path)


def test_no_file_no_checkpoint_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(EnsembleKDError, match=r"a file that exists, got .*none\.pt\. Check the path"):
        load(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(EnsembleKDError, match="a whole checkpoint"):
        load(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "other.pt")
    with pytest.raises(EnsembleKDError, match=r"a whole checkpoint .*its checksum is missing or another"):
        load(tmp_path / "other.pt")


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("sprung",)


def test_loading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "trap.pt", {"model": Trap()})
    with pytest.raises(EnsembleKDError, match="UnpicklingError"):
        load(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "sprung").exists()  # the trap would have worked


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """torch.load alone takes many of them for other content; of one in the directory it reads foreign memory."""
    path = tmp_path / "last.pt"
    save(path, CONTENT)
    whole = path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(EnsembleKDError, match="a whole checkpoint of ensemble_kd"):
            load(path)


def test_swapped_and_foreign_ends_are_found(tmp_path: Path) -> None:
    save(tmp_path / "a", CONTENT)
    save(tmp_path / "b", {"epoch": 4})
    one, other = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    for mixed in (one + other, one[:-30] + other[-30:], one + b"\n", one[len(one) // 2 :]):
        (tmp_path / "c").write_bytes(mixed)
        with pytest.raises(EnsembleKDError, match="a whole checkpoint of ensemble_kd"):
            load(tmp_path / "c")


def test_large_files_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a", CONTENT)
    size = (tmp_path / "a").stat().st_size
    summed = size - len("ensemble_kd 00000000\n")
    for piece in (7, summed - 1, summed, size):  # the last piece may be a single byte
        monkeypatch.setattr("ensemble_kd.internal.files.PIECE", piece)
        assert same(load(tmp_path / "a"), CONTENT)


def test_torch_reads_what_is_saved(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", CONTENT)
    assert same(torch.load(tmp_path / "a.pt", weights_only=True), CONTENT)


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "log"
    sync(path)
    assert not path.exists()
    for line in (b"one\n", b"two\n"):
        append(path, line)
        sync(path)
    assert path.read_bytes() == b"one\ntwo\n"
    with pytest.raises(EnsembleKDError, match="a file that can be written"):
        append(tmp_path / "none" / "log", b"x")
