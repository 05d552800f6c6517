"""Files that are written whole or not at all, and verified when they are read.

Writing goes to a temporary file, which is synced to the disk and then renamed. Reading compares a checksum first.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ensemble_kd.errors import EnsembleKDError

PIECE = 1 << 20  # bytes that are read together


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` once all of it is on the disk, and never before.

    If the block fails, ``path`` stays as it was, and nothing is left beside it. If the process is killed, a part may
    stay at ``path`` + ".tmp"; the next write removes it.

    Raises:
        EnsembleKDError: the file cannot be written (disk full, read-only folder).

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "a")) as file:
        ...         _ = file.write(b"all of it")
        ...     Path(folder, "a").read_bytes()
        b'all of it'
    """
    temporary = path.with_name(path.name + ".tmp")
    with _explained(path):
        raw = _Raw(temporary, "w")
    try:
        with raw:
            file = io.BufferedWriter(raw)
            yield file
            with _explained(path):
                file.flush()
                os.fsync(raw.fileno())
        with _explained(path):
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # The writer of the block may have hidden the reason under an error of its own, as torch.save does.
        if raw.failure is not None and not isinstance(error, EnsembleKDError):
            raise _unwritable(path, raw.failure) from error
        raise


def make_folder(where: str, folder: Path) -> None:
    """Make a folder and those above it, if they are missing.

    Raises:
        EnsembleKDError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = "Choose a folder that you may write to."
        raise EnsembleKDError(where, "a folder that can be made", f"{folder} ({error.strerror})", fix) from error


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, so that a renamed file keeps its new name if the power fails."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file, which is made if it is missing.

    Raises:
        EnsembleKDError: the file cannot be written.
    """
    with _explained(path), path.open("ab") as file:
        file.write(data)


def sync(path: Path) -> None:
    """Bring all that was appended to a file to the disk; nothing happens if there is no such file.

    Raises:
        EnsembleKDError: the file cannot be written.
    """
    with _explained(path), suppress(FileNotFoundError), path.open("r+b") as file:
        os.fsync(file.fileno())


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, strings, and lists and dicts of them) to ``path``, whole or not at all.

    Raises:
        EnsembleKDError: the file cannot be written.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save(Path(folder, "last.pt"), {"epoch": 3})
        ...     load(Path(folder, "last.pt"))
        {'epoch': 3}
    """
    with replacing(path) as file:
        summed = _Summed(file)
        torch.save(dict(content), summed)  # type: ignore[arg-type]
        file.write(_mark(summed.checksum))


def load(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a file of ``save``. Its checksum is compared first, and no code that it may contain is run.

    Of a file with a flipped bit, torch.load alone often returns other content without an error.

    Raises:
        EnsembleKDError: no such file, or not a whole one.
    """
    try:
        with path.open("rb") as file:
            _verify(file)
            file.seek(0)
            content = torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        fix = "Check the path, or start without resume."
        raise EnsembleKDError("checkpoint", "a file that exists", str(path), fix) from error
    except Exception as error:  # torch raises many kinds for what is no checkpoint
        got = f"{path} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'unreadable'})"
        fix = "The file is damaged, cut short or something else: use another checkpoint, or start anew."
        raise EnsembleKDError("checkpoint", "a whole checkpoint of ensemble_kd", got, fix) from error
    if not isinstance(content, dict):
        got = f"{path}, which holds a {type(content).__name__}"
        raise EnsembleKDError("checkpoint", "a checkpoint of ensemble_kd", got, "Pass last.pt or best.pt of a run.")
    return content


class _Summed:
    """A file to write to, with a checksum of all that was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.checksum = file, 0

    def write(self, data: bytes) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _mark(checksum: int) -> bytes:
    return b"ensemble_kd %08x\n" % checksum


def _verify(file: BinaryIO) -> None:
    """Compare the whole file with the mark at its end.

    The archive's own checksums cover its members, but not the directory: of one flipped bit there, torch.load makes
    tensors of uninitialised memory.
    """
    left, checksum = file.seek(0, os.SEEK_END) - len(_mark(0)), 0
    file.seek(0)
    while left > 0 and (piece := file.read(min(left, PIECE))):
        checksum, left = zlib.crc32(piece, checksum), left - len(piece)
    if file.read() != _mark(checksum):
        raise OSError("its checksum is missing or another")


class _Raw(io.FileIO):
    """A file that remembers the first error of the system while it was written."""

    failure: OSError | None = None

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            self.failure = self.failure or error
            raise


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> EnsembleKDError:
    fix = "Free some room, or choose a folder that you may write to; what stood there before is unchanged."
    return EnsembleKDError("write", "a file that can be written", f"{path} ({error.strerror or error})", fix)
