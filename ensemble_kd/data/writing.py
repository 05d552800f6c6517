"""Writing sequences to a folder as they come: it changes from the old content to the new in one step."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ensemble_kd.data.rows import MOST_ITEMS, as_row
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import file_path, instance, replacing, sync_folder, whole

ABOUT, PART = "about.json", "writing"
ITEMS, OFFSETS = "items-{}.int32", "offsets-{}.int64"


def write_sequences(folder: str | PathLike[str], sequences: Iterable[Iterable[int]], *, num_items: int) -> None:
    """Write users' sequences to a folder, one after the other, with one of them in memory at a time.

    A folder that already has sequences keeps them until all new ones are on the disk. about.json then names the new
    files, and the old ones are removed. A process that has the old ones open reads on undisturbed (on Windows they stay
    until the next call). A killed process leaves the old content and a folder "writing", which the next call removes.
    Two processes must not write to one folder at the same time.

    Args:
        folder: receives the items (int32), the offsets (int64) and about.json; made if it is missing.
        sequences: item ids of each user, oldest first, at least 3, from 1 to ``num_items``; arrays are fastest.
        num_items: v.

    Raises:
        EnsembleKDError: no user, a user of fewer than 3 items, ids out of range, or a folder that cannot be written.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from ensemble_kd.data import MappedSequences
        >>> with TemporaryDirectory() as folder:
        ...     write_sequences(folder, [[1, 2, 3, 4], [4, 3, 2]], num_items=4)
        ...     MappedSequences(folder)
        MappedSequences(num_users=2, num_items=4, num_interactions=7, num_attributes=0, block=65536)
    """
    path = file_path("write_sequences", "folder", folder)
    instance("write_sequences", "sequences", sequences, Iterable, "Pass one sequence of item ids for each user.")
    num_items = whole("write_sequences", "num_items", num_items, least=1, most=MOST_ITEMS)
    part = path / PART
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        about = _write(part, sequences, num_items)
        for name in about["files"]:
            os.replace(part / name, path / name)
        sync_folder(path)
        with replacing(path / ABOUT) as file:
            file.write(json.dumps(sealed(about)).encode())
    except OSError as error:
        fix = "Free some room, or choose a folder that you may write to, and that no other process writes to."
        got = f"{path} ({error.strerror or error})"
        raise EnsembleKDError("write_sequences", "a folder that can be written", got, fix) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for pattern in (ITEMS, OFFSETS):
        for old in path.glob(pattern.format("*")):
            if old.name not in about["files"]:
                _remove(old)


def sealed(about: dict[str, object]) -> dict[str, object]:
    """Add a checksum of ``about`` to it.

    Examples:
        >>> sealed({"num_users": 3})
        {'num_users': 3, 'seal': '8562e64a'}
    """
    content = {name: value for name, value in about.items() if name != "seal"}
    return {**content, "seal": f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"}


def _write(part: Path, sequences: Iterable[Iterable[int]], num_items: int) -> dict[str, Any]:
    """Write items and offsets under their final names; return the content of about.json."""
    users = total = items_crc = 0
    offsets_crc = zlib.crc32(start := np.int64(0).tobytes())
    with (part / "items").open("wb") as items, (part / "offsets").open("wb") as offsets:
        offsets.write(start)
        for sequence in sequences:
            ids = as_row("write_sequences", sequence, users, most=num_items)
            users, total = users + 1, total + len(ids)
            written, end = ids.astype("<i4").tobytes(), np.array(total, dtype="<i8").tobytes()
            items.write(written)
            offsets.write(end)
            items_crc, offsets_crc = zlib.crc32(written, items_crc), zlib.crc32(end, offsets_crc)
        for file in (items, offsets):
            _sync(file)
    if not users:
        fix = "Pass one sequence for each user."
        raise EnsembleKDError("write_sequences", "at least one sequence", "none", fix)
    checksum = f"{items_crc:08x}{offsets_crc:08x}"
    files = {ITEMS.format(checksum): f"{items_crc:08x}", OFFSETS.format(checksum): f"{offsets_crc:08x}"}
    for old, new in zip(("items", "offsets"), files, strict=True):
        os.replace(part / old, part / new)
    return {
        "num_users": users,
        "num_items": num_items,
        "num_interactions": total,
        "checksum": checksum,
        "files": files,
    }


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:  # another process has it open, on Windows
        return
