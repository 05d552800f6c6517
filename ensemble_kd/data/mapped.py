"""Sequences on disk: written as they come, mapped into memory, read a block of users at a time."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.arguments import whole
from ensemble_kd.data.attributes import ItemAttributes
from ensemble_kd.data.ragged import window_spans
from ensemble_kd.data.rows import MOST_ITEMS, as_row
from ensemble_kd.data.sequences import SequenceData
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.files import replacing

BLOCK = 1 << 16  # interactions that are read together
_ITEMS, _OFFSETS, _ABOUT = "items.int32", "offsets.int64", "about.json"


def write_sequences(folder: str | PathLike[str], sequences: Iterable[Iterable[int]], *, num_items: int) -> None:
    """Write users' sequences to a folder, one after the other, holding one of them at a time.

    An older set in the folder is replaced once all of the new one is on the disk, and stays if a sequence is refused.
    If the process is killed in between, what it leaves is either the old set or is refused by ``MappedSequences``.

    Args:
        folder: receives items.int32, offsets.int64 and about.json; made where it is missing.
        sequences: item ids of each user, oldest first, at least 3, from 1 to ``num_items``; arrays are fastest.
        num_items: v.

    Raises:
        EnsembleKDError: for no user, a user of fewer than 3 items, or ids out of range.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_sequences(folder, [[1, 2, 3, 4], [4, 3, 2]], num_items=4)
        ...     MappedSequences(folder)
        MappedSequences(num_users=2, num_items=4, num_interactions=7, num_attributes=0, block=65536)
    """
    where, path = "write_sequences", Path(folder)
    num_items = whole(where, "num_items", num_items, least=1, most=MOST_ITEMS)
    path.mkdir(parents=True, exist_ok=True)
    users = total = checksum = 0
    with replacing(path / _ITEMS) as items, replacing(path / _OFFSETS) as offsets:
        offsets.write(np.int64(0).tobytes())
        for sequence in sequences:
            ids = as_row(where, sequence, users, most=num_items)
            users, total = users + 1, total + len(ids)
            written = ids.astype("<i4").tobytes()
            items.write(written)
            offsets.write(np.int64(total).tobytes())
            checksum = zlib.crc32(np.int64(total).tobytes(), zlib.crc32(written, checksum))
        if not users:
            raise EnsembleKDError(where, "at least one sequence", "none", "Pass one sequence for each user.")
        about = {"num_users": users, "num_items": num_items, "num_interactions": total, "checksum": f"{checksum:08x}"}
        text = json.dumps(about).encode()
        (path / _ABOUT).unlink(missing_ok=True)  # until both files are replaced, the folder is not readable
    with replacing(path / _ABOUT) as file:
        file.write(text)


class MappedSequences:
    """What ``write_sequences`` wrote, for ``fit`` and ``evaluate``: the operating system reads what is looked at.

    Training and evaluation hold some blocks of users at a time, see ``BlockPlan``; what they hold beside does not grow
    with the interactions, save 8 bytes a user and scorer of an evaluation.

    Args:
        folder: where the sequences are.
        item_attributes: which attributes each item has, or None.
        block: interactions that are read together, about: a block ends with a user.

    Raises:
        EnsembleKDError: no such folder, files that do not fit each other, or attributes of another catalogue.
    """

    def __init__(
        self, folder: str | PathLike[str], *, item_attributes: ItemAttributes | None = None, block: int = BLOCK
    ) -> None:
        where, path = "MappedSequences", Path(folder)
        try:
            about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
            self.num_users, self.num_items = int(about["num_users"]), int(about["num_items"])
            self.num_interactions, self.checksum = int(about["num_interactions"]), str(about["checksum"])
            self._items = np.memmap(path / _ITEMS, dtype="<i4", mode="r", shape=(self.num_interactions,))
            self._offsets = np.memmap(path / _OFFSETS, dtype=np.int64, mode="r", shape=(self.num_users + 1,))
        except (OSError, ValueError, KeyError, TypeError) as error:
            fix = "Write it with write_sequences, to the end."
            raise EnsembleKDError(where, "a folder of whole sequences", f"{path} ({error})", fix) from error
        if self._offsets[0] != 0 or self._offsets[-1] != self.num_interactions:
            fix = "Write it anew with write_sequences."
            raise EnsembleKDError(where, f"offsets from 0 to {self.num_interactions}", self._offsets[-1], fix)
        if item_attributes is not None and len(item_attributes) != self.num_items:
            fix = "Build them with ItemAttributes.from_dict(..., num_items)."
            raise EnsembleKDError(where, f"attributes of {self.num_items} items", len(item_attributes), fix)
        self.item_attributes, self.block = item_attributes, whole(where, "block", block, least=1)

    @cached_property
    def bounds(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The first user of each block, and the number of users: (num_blocks + 1,)."""
        wanted = np.arange(0, self.num_interactions, self.block)
        return np.unique(np.append(np.searchsorted(self._offsets[:-1], wanted), self.num_users))

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.bounds) - 1

    def offsets_of(self, block: int) -> Tensor:
        """Where each user's items begin in the file, and where the last one's end: (users + 1,)."""
        first, last = self.bounds[block : block + 2]
        return torch.from_numpy(np.array(self._offsets[first : last + 1]))

    def items_of(self, block: int) -> Tensor:
        """The items of a block's users, read into memory: (interactions,) int64."""
        first, last = self._offsets[self.bounds[block : block + 2]]
        return torch.from_numpy(self._items[first:last].astype(np.int64))

    def pieces(self) -> Iterator[SequenceData]:
        """The blocks in turn, each as data in memory."""
        for block in range(self.num_blocks):
            offsets = self.offsets_of(block)
            yield SequenceData(self.items_of(block), offsets - offsets[0], self.num_items)

    def train_windows(self, max_len: int, step: int = 1, min_len: int = 1) -> MappedWindows:
        """The windows of ``SequenceData.train_windows``, which stay on disk."""
        return MappedWindows(self, max_len, step, min_len)

    def __repr__(self) -> str:
        attributes = 0 if self.item_attributes is None else self.item_attributes.num_attributes
        return (
            f"MappedSequences(num_users={self.num_users}, num_items={self.num_items}, "
            f"num_interactions={self.num_interactions}, num_attributes={attributes}, block={self.block})"
        )


AnySequences: TypeAlias = SequenceData | MappedSequences


@dataclass(frozen=True, eq=False)
class MappedWindows:
    """Training windows of sequences on disk; block by block they are spans of its items.

    Args:
        data: the sequences.
        max_len: l, the length of a window.
        step: the distance between a user's windows.
        min_len: users whose training part is shorter have no window.
    """

    data: MappedSequences
    max_len: int
    step: int
    min_len: int

    def spans(self, block: int) -> tuple[Tensor, Tensor]:
        """Where each window of a block ends among the block's items, and its length: (w,), (w,)."""
        offsets = self.data.offsets_of(block)
        totals = offsets.diff() - 2  # without the targets of validation and test
        kept = totals >= self.min_len
        return window_spans((offsets[:-1] - offsets[0])[kept], totals[kept], self.max_len, self.step)

    @cached_property
    def counts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """How many windows each block has."""
        return np.array([len(self.spans(block)[0]) for block in range(self.data.num_blocks)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())
