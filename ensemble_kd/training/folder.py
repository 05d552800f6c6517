"""The folder of a run: one run at a time writes into it, and none replaces another unasked."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ensemble_kd.distributed import Place, agree, gather_objects
from ensemble_kd.errors import EnsembleKDError

LAST, BEST, LOG, LOCK = "last.pt", "best.pt", "log.jsonl", ".lock"


@contextmanager
def claimed(folder: Path | None, place: Place, *, resume: bool, overwrite: bool) -> Iterator[bool]:
    """Claim a folder for one run within the block, and give True if there is a run to go on with.

    The first process makes the folder and has its lock; all call it together, and each raises what the first does.

    Args:
        folder: of the run; None: there is none.
        place: of this process.
        resume: go on with the run in the folder, if there is one.
        overwrite: replace it.

    Raises:
        EnsembleKDError: a folder that another run uses or has used, that cannot be made, or that lacks its last.pt.
    """
    with ExitStack() as stack:
        error: EnsembleKDError | None = None
        resumes = False
        if folder is not None and place.is_first:
            try:
                _make(folder)
                stack.enter_context(locked(folder))
                resumes = _resumes(folder, resume=resume, overwrite=overwrite)
            except EnsembleKDError as found:
                error = found
        for raised in gather_objects(error, place):
            if raised is not None:
                raise raised
        yield agree(resumes, place)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = "Choose a folder that you may write to."
        raise EnsembleKDError("fit", "an output_dir that can be made", f"{folder} ({error.strerror})", fix) from error


def _resumes(folder: Path, *, resume: bool, overwrite: bool) -> bool:
    has_last = (folder / LAST).exists()
    left = [name for name in (LAST, BEST, LOG) if (folder / name).exists()]
    if overwrite or not left:
        return False
    if not resume:
        fix = "Pass resume=True to go on with that run, overwrite=True to replace it, or choose another output_dir."
        raise EnsembleKDError("fit", "an output_dir without a run", f"{folder}, which has {', '.join(left)}", fix)
    if not has_last:
        fix = "Put last.pt back, choose another output_dir, or start anew with overwrite=True in place of resume=True."
        raise EnsembleKDError("resume", f"{LAST} in {folder}", f"{' and '.join(left)} alone", fix)
    return True


def forget(folder: Path, *, curves: bool) -> None:
    """Remove what an older run left beside its last.pt, which the new run has replaced.

    Args:
        folder: of the run.
        curves: remove TensorBoard's events, too, so that it does not draw the curves of both runs.
    """
    events = folder.glob("events.out.tfevents.*") if curves else ()
    for path in (*events, folder / BEST, folder / LOG):
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs, in this process and in others, out of a folder within the block.

    The operating system releases the lock when the process ends, however it ends.

    Raises:
        EnsembleKDError: another run has the lock, with its process and host.
    """
    path = folder / LOCK
    file = _acquired(path)
    try:
        yield
    finally:
        if os.name == "posix":  # before it is released: a waiting run that has opened the old file looks again
            path.unlink(missing_ok=True)
        file.close()
        if os.name != "posix":
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _acquired(path: Path) -> BinaryIO:
    while True:
        try:
            file = path.open("a+b")
        except OSError as error:
            fix = "Choose a folder that you may write to."
            got = f"{path.parent} ({error.strerror})"
            raise EnsembleKDError("fit", "an output_dir that can be written", got, fix) from error
        if not _lock(file):
            file.seek(0)
            holder = file.read().decode(errors="replace") or "another process"
            file.close()
            fix = "Wait for it to end, or choose another output_dir."
            raise EnsembleKDError("fit", "an output_dir for one run", f"{path.parent}, in use by {holder}", fix)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # the run that had it has ended meanwhile, and removed it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    file.flush()
    return file


if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> bool:
        file.seek(1 << 30)  # not the bytes that name the holder: others read them
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        file.seek(0)
        return True

else:
    import fcntl

    def _lock(file: BinaryIO) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # a network folder without locks
            warnings.warn(f"fit: {file.name} cannot be locked ({error.strerror}): start no second run", stacklevel=2)
        return True
