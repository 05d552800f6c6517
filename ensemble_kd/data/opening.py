"""Opening sequences on disk: sizes, offsets and checksums are compared before anything is read."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ensemble_kd.data.rows import MIN_ITEMS, MOST_ITEMS
from ensemble_kd.data.writing import ABOUT, sealed
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import shown, whole

ATTEMPTS = 3  # while another process puts new sequences into the folder
CHUNK = 1 << 20  # offsets that are compared together
READ = 1 << 24  # bytes that are read together
FIX = "Write it anew with write_sequences."

_verified: set[tuple[str, int, int, int, str]] = set()  # files that this process has compared with their checksums


class Opened(NamedTuple):
    """The numbers and the arrays of a folder of sequences."""

    num_users: int
    num_items: int
    num_interactions: int
    checksum: str
    items: np.memmap[Any, np.dtype[np.int32]]
    offsets: np.memmap[Any, np.dtype[np.int64]]


def open_sequences(folder: Path, *, verify: bool) -> Opened:
    """Map what ``write_sequences`` wrote.

    Raises:
        EnsembleKDError: no such folder, or files that do not fit about.json.
    """
    for attempt in range(ATTEMPTS):
        about = _read_about(folder)
        try:
            return _map(folder, about, verify=verify)
        except FileNotFoundError as error:
            # New sequences may have come between reading about.json and opening the files that it names.
            if attempt + 1 == ATTEMPTS or _read_about(folder) == about:
                raise EnsembleKDError("MappedSequences", "the files of about.json", str(error), FIX) from error
    raise AssertionError("every attempt returns or raises")


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    try:
        about = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        fix = "Write it with write_sequences, to the end."
        raise EnsembleKDError("MappedSequences", "a folder of whole sequences", f"{path} ({error})", fix) from error
    names = {"num_users", "num_items", "num_interactions", "checksum", "files", "seal"}
    if not isinstance(about, dict) or about.keys() != names or sealed(about) != about:
        raise EnsembleKDError("MappedSequences", f"an undamaged {ABOUT}", f"{path} ({shown(about)})", FIX)
    return about


def _map(folder: Path, about: dict[str, Any], *, verify: bool) -> Opened:
    where = "MappedSequences"
    num_items = whole(where, "num_items", about["num_items"], least=1, most=MOST_ITEMS)
    num_users = whole(where, "num_users", about["num_users"], least=1)
    total = whole(where, "num_interactions", about["num_interactions"], least=MIN_ITEMS * num_users)
    arrays = []
    for (name, checksum), count, kind in zip(
        about["files"].items(), (total, num_users + 1), ("<i4", "<i8"), strict=True
    ):
        path, size = folder / name, count * np.dtype(kind).itemsize
        if (found := path.stat().st_size) != size:
            raise EnsembleKDError(where, f"{size} bytes in {path}", str(found), FIX)
        if verify:
            _verify(path, checksum)
        arrays.append(np.memmap(path, dtype=kind, mode="r", shape=(count,)))
    _check_offsets(arrays[1], total, where)
    return Opened(num_users, num_items, total, str(about["checksum"]), *arrays)


def _check_offsets(offsets: np.memmap[Any, Any], total: int, where: str) -> None:
    """Refuse offsets that do not rise from 0 to ``total`` by at least 3: a block of them could be of any size."""
    rising = all(
        int(np.diff(offsets[start : start + CHUNK + 1]).min()) >= MIN_ITEMS
        for start in range(0, len(offsets) - 1, CHUNK)
    )
    if int(offsets[0]) != 0 or int(offsets[-1]) != total or not rising:
        got = f"{int(offsets[0])} to {int(offsets[-1])}{'' if rising else ', not rising'}"
        raise EnsembleKDError(where, f"offsets that rise from 0 to {total}", got, FIX)


def _verify(path: Path, checksum: str) -> None:
    before = path.stat()
    known = (str(path.resolve()), before.st_ino, before.st_size, before.st_mtime_ns, checksum)
    if known in _verified:
        return
    found, buffer = 0, bytearray(READ)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found = zlib.crc32(memoryview(buffer)[:count], found)
    if f"{found:08x}" != checksum:
        raise EnsembleKDError("MappedSequences", f"{path} with checksum {checksum}", f"{found:08x}", FIX)
    _verified.add(known)
