"""Files that are written whole or not at all: a temporary file, synced to the disk, then renamed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ensemble_kd.errors import EnsembleKDError


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


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, so that a renamed file keeps its new name if the power fails."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
