"""Files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble_kd import EnsembleKDError
from ensemble_kd.files import replacing


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
from ensemble_kd.files import replacing
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
        "import os, signal, sys; from pathlib import Path; from ensemble_kd.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == b"older"
    write(tmp_path / "a", b"newer")
    assert os.listdir(tmp_path) == ["a"]


def test_torch_can_write_to_it(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.pt") as file:
        torch.save({"x": torch.arange(5)}, file)
    assert torch.equal(torch.load(tmp_path / "a.pt")["x"], torch.arange(5))
