"""Sequences on disk, mapped into memory and read a block of users at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.data.attributes import ItemAttributes
from ensemble_kd.data.holdout import NAMES, Named, held
from ensemble_kd.data.opening import open_sequences
from ensemble_kd.data.ragged import Prefixes, training_spans
from ensemble_kd.data.sequences import SequenceData
from ensemble_kd.data.splits import Split, window_arguments
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import (
    choice,
    file_path,
    flag,
    instance,
    whole,
)

BLOCK = 1 << 16  # interactions that are read together


class MappedSequences:
    """The sequences that ``write_sequences`` wrote, for ``fit`` and ``evaluate``: what is read is loaded on demand.

    Training and evaluation load some blocks of users at a time, see ``BlockPlan``; the rest of their memory does not
    grow with the interactions, except for 8 bytes per user and scorer of an evaluation.

    Args:
        folder: where the sequences are.
        item_attributes: the attributes of each item, or None.
        block: interactions that are read together, about: a block ends with a user.
        holdout: "last" holds back two items of every user for validation and test, "none" nothing.
        verify: compare the files with their checksums, once per process and file: about a second per gigabyte. Sizes
            and offsets are checked in any case.

    Raises:
        EnsembleKDError: no such folder, damaged files, or attributes of another catalogue.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        item_attributes: ItemAttributes | None = None,
        block: int = BLOCK,
        holdout: Named = "last",
        verify: bool = True,
    ) -> None:
        where = "MappedSequences"
        opened = open_sequences(file_path(where, "folder", folder), verify=flag(where, "verify", verify))
        self.num_users, self.num_items, self.num_interactions, self.checksum, self._items, self._offsets = opened
        if item_attributes is not None:
            fix = "Build them with ItemAttributes.from_dict(..., num_items)."
            instance(where, "item_attributes", item_attributes, ItemAttributes, fix)
        if item_attributes is not None and len(item_attributes) != self.num_items:
            fix = "Build them with ItemAttributes.from_dict(..., num_items)."
            raise EnsembleKDError(where, f"attributes of {self.num_items} items", len(item_attributes), fix)
        self.item_attributes, self.block = item_attributes, whole(where, "block", block, least=1)
        self.holdout: Named = choice(where, "holdout", holdout, get_args(Named))
        self.vocabulary = self.users = None  # names are not on disk: items and users are numbers

    @property
    def held_out(self) -> str:
        """The kind of split in the words of a protocol."""
        return NAMES[self.holdout]

    def has_targets(self, split: Split) -> bool:
        """Return True if the users have targets in "valid" or "test"."""
        return self.holdout == "last" and split in ("valid", "test")

    @cached_property
    def bounds(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The first user of each block, and the number of users: (num_blocks + 1,)."""
        wanted = np.arange(0, self.num_interactions, self.block)
        return np.unique(np.append(np.searchsorted(self._offsets[:-1], wanted), self.num_users))

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return len(self.bounds) - 1

    def offsets_of(self, block: int) -> Tensor:
        """Return the places in the file where each user's items begin, and where the last one's end: (users + 1,)."""
        first, last = self.bounds[block : block + 2]
        return torch.from_numpy(np.array(self._offsets[first : last + 1]))

    def items_of(self, block: int) -> Tensor:
        """Return the items of a block's users, read into memory: (interactions,) int64."""
        first, last = self._offsets[self.bounds[block : block + 2]]
        return torch.from_numpy(self._items[first:last].astype(np.int64))

    def pieces(self) -> Iterator[SequenceData]:
        """Return the blocks in turn, each as data in memory."""
        for block in range(self.num_blocks):
            offsets = self.offsets_of(block)
            yield SequenceData(self.items_of(block), offsets - offsets[0], self.num_items, holdout=self.holdout)

    def train_windows(
        self,
        max_len: int,
        step: int | None = 1,
        min_len: int = 1,
        seed: Sequence[int] = (0,),
        prefixes: Prefixes = "none",
    ) -> MappedWindows:
        """Return the windows of ``SequenceData.train_windows``, which stay on disk; each block draws its own places."""
        max_len, step, min_len, seeds = window_arguments("train_windows", max_len, step, min_len, seed, prefixes)
        return MappedWindows(self, max_len, step, min_len, tuple(seeds), prefixes)

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
        step: the distance between a user's windows; None: they are cut at random places.
        min_len: users whose training part is shorter have no window.
        seed: of what is drawn.
        prefixes: see ``SequenceData.train_windows``.
    """

    data: MappedSequences
    max_len: int
    step: int | None
    min_len: int
    seed: tuple[int, ...] = (0,)
    prefixes: Prefixes = "none"

    def spans(self, block: int) -> tuple[Tensor, Tensor]:
        """Return the place among a block's items where each of its windows ends, and its length: (w,), (w,)."""
        offsets = self.data.offsets_of(block)
        totals = offsets.diff() - held(self.data.holdout)  # without the targets of validation and test
        kept = totals >= self.min_len
        starts, totals = (offsets[:-1] - offsets[0])[kept], totals[kept]
        rng = np.random.default_rng([*self.seed, block])
        return training_spans(
            starts, totals, width=self.max_len, step=self.step, least=self.min_len, prefixes=self.prefixes, rng=rng
        )

    @cached_property
    def counts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The number of windows per block."""
        return np.array([len(self.spans(block)[0]) for block in range(self.data.num_blocks)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())
