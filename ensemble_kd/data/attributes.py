"""Which attributes each item has, as one integer table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError

_WIDE_ENTRIES = 50_000_000
_WIDE_RATIO = 8


@dataclass(frozen=True, eq=False, repr=False)
class ItemAttributes:
    """The attributes of items 1..v, with rows for padding (0) and for the mask token (v + 1) that have none.

    ``len()`` is the number of items.

    Args:
        num_attributes: a, the number of attribute classes.
        table: (v + 2, k) int64; row i lists item i's attributes as classes 0..a-1, then -1. k is the largest count.

    Raises:
        EnsembleKDError: when the table is no such table.

    Examples:
        >>> attributes = ItemAttributes.from_dict({1: [2], 3: [1, 2]}, num_items=3)
        >>> attributes
        ItemAttributes(num_items=3, num_attributes=2, pairs=3)
        >>> attributes.table.tolist()
        [[-1, -1], [1, -1], [-1, -1], [0, 1], [-1, -1]]
    """

    num_attributes: int
    table: Tensor

    def __post_init__(self) -> None:
        where, table = "ItemAttributes", self.table
        if table.ndim != 2 or table.dtype != torch.int64 or table.shape[0] < 3 or table.shape[1] < 1:
            got = f"{tuple(table.shape)} {table.dtype}"
            raise EnsembleKDError(where, "a table (num_items + 2, k) int64", got, "Build it with from_dict.")
        low, high = torch.stack(table.aminmax()).tolist()
        if low < -1 or high >= self.num_attributes:
            expected = f"classes -1..{self.num_attributes - 1}"
            raise EnsembleKDError(where, expected, f"{low}..{high}", "Classes start at 0, -1 fills up a row.")
        if (table[[0, -1]] != -1).any():
            fix = "Padding and the mask token have no attributes."
            raise EnsembleKDError(where, "-1 throughout the first and the last row", "an attribute", fix)

    @classmethod
    def from_dict(cls, attributes: Mapping[int, Iterable[int]], num_items: int) -> ItemAttributes:
        """Build the table from ``{item id: attribute ids}``, both counted from 1. Repeated ids count once.

        Args:
            attributes: items that are left out have no attributes.
            num_items: v; items are 1..v.

        Returns:
            A table on the CPU; ``num_attributes`` is the largest attribute id.

        Raises:
            EnsembleKDError: for ids out of range, no attribute at all, or a few items with so many attributes that the
                table would waste more than 50 million entries.

        Examples:
            >>> ItemAttributes.from_dict({1: [1, 1, 4]}, num_items=2)
            ItemAttributes(num_items=2, num_attributes=4, pairs=2)
        """
        where = "ItemAttributes.from_dict"
        rows = {item: sorted(set(ids)) for item, ids in attributes.items()}
        unknown = next((item for item in rows if not 1 <= item <= num_items), None)
        if unknown is not None:
            fix = "Leave out items that are not in the catalogue."
            raise EnsembleKDError(where, f"item ids in 1..{num_items}", unknown, fix)
        counts = np.array([len(ids) for ids in rows.values()], dtype=np.int64)
        pairs = int(counts.sum())
        if pairs == 0:
            raise EnsembleKDError(where, "at least one attribute", "none", "Leave the attributes out instead.")
        owners = np.repeat(np.fromiter(rows, dtype=np.int64, count=len(rows)), counts)
        flat = np.array([a for ids in rows.values() for a in ids], dtype=np.int64)
        if flat.min() < 1:
            raise EnsembleKDError(where, "attribute ids from 1", int(flat.min()), "Count attributes from 1.")
        width = int(counts.max())
        entries = width * (num_items + 2)
        if entries > _WIDE_ENTRIES and entries > _WIDE_RATIO * pairs:
            widest = max(rows, key=lambda item: len(rows[item]))
            got = f"{width} on item {widest}, a table of {entries:,} entries for {pairs:,} pairs"
            raise EnsembleKDError(where, "attributes spread over the items", got, "Keep the telling attributes of it.")
        table = np.full((num_items + 2, width), -1, dtype=np.int64)
        slots = np.arange(pairs) - np.repeat(np.cumsum(counts) - counts, counts)
        table[owners, slots] = flat - 1
        return cls(int(flat.max()), torch.from_numpy(table))

    @property
    def num_items(self) -> int:
        """The number of items, v."""
        return self.table.shape[0] - 2

    def to(self, device: torch.device | str) -> ItemAttributes:
        """The same attributes with the table on ``device``.

        Examples:
            >>> ItemAttributes.from_dict({1: [1]}, num_items=1).to("cpu").table.device
            device(type='cpu')
        """
        return ItemAttributes(self.num_attributes, self.table.to(device))

    def __len__(self) -> int:
        return self.num_items

    def __repr__(self) -> str:
        pairs = int((self.table >= 0).sum())
        return f"ItemAttributes(num_items={self.num_items}, num_attributes={self.num_attributes}, pairs={pairs})"
