"""The attributes of each item, as one integer table."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.data.columns import (
    Table,
    column,
    ids_of,
    missing,
    values,
)
from ensemble_kd.data.vocabulary import Vocabulary
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import instance, is_whole, shown, whole

_WIDE_ENTRIES = 50_000_000
_WIDE_RATIO = 8
GAP_RATIO, GAP_FREE = 10, 1000  # the largest id may be this many times the number of distinct ids, and this many more


def far_ahead(largest: int, distinct: int) -> bool:
    """Return True if ids skip so far ahead that most rows of a model with one row per id would be unused.

    Examples:
        >>> far_ahead(1030, distinct=3), far_ahead(1031, distinct=3)
        (False, True)
    """
    return largest > GAP_RATIO * distinct + GAP_FREE


@dataclass(frozen=True, eq=False, repr=False)
class ItemAttributes:
    """The attributes of items 1..v, with rows for padding (0) and for the mask token (v + 1) that have none.

    ``len()`` is the number of items.

    Args:
        num_attributes: a, the number of attribute classes.
        table: (v + 2, k) int64; row i lists item i's attributes as classes 0..a-1, then -1. k is the largest count.

    Raises:
        EnsembleKDError: the table is no such table.

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
        flat = isinstance(table, Tensor) and table.ndim == 2 and table.dtype == torch.int64 and not table.is_meta
        if not flat or table.shape[0] < 3 or table.shape[1] < 1:
            expected = "a table (num_items + 2, k) int64 as a tensor"
            raise EnsembleKDError(where, expected, shown(table), "Build it with from_dict.")
        object.__setattr__(self, "num_attributes", whole(where, "num_attributes", self.num_attributes, least=1))
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
            EnsembleKDError: ids that are no whole numbers, out of range or far apart; no attribute at all; or a few
                items with so many attributes that the table would waste more than 50 million entries.

        Examples:
            >>> ItemAttributes.from_dict({1: [1, 1, 4]}, num_items=2)
            ItemAttributes(num_items=2, num_attributes=4, pairs=2)
        """
        where = "ItemAttributes.from_dict"
        num_items = whole(where, "num_items", num_items, least=1)
        instance(where, "attributes", attributes, Mapping, "Pass {item: [attribute ids, from 1]}.")
        rows = {}
        for item, ids in attributes.items():
            if not (is_whole(item) and 1 <= item <= num_items):
                fix = "Leave out items that are not in the catalogue."
                raise EnsembleKDError(where, f"item ids in 1..{num_items}", shown(item), fix)
            rows[int(item)] = _distinct(where, item, ids)
        counts = np.array([len(ids) for ids in rows.values()], dtype=np.int64)
        pairs = int(counts.sum())
        if pairs == 0:
            raise EnsembleKDError(where, "at least one attribute", "none", "Leave the attributes out instead.")
        owners = np.repeat(np.fromiter(rows, dtype=np.int64, count=len(rows)), counts)
        flat = np.concatenate(list(rows.values()), dtype=np.int64)
        if far_ahead(int(flat.max()), distinct := len(np.unique(flat))):
            got = f"id {int(flat.max())} among {distinct} distinct ones"
            fix = "Renumber the attributes from 1 without gaps."
            raise EnsembleKDError(where, "attribute ids without large gaps", got, fix)
        width = int(counts.max())
        entries = width * (num_items + 2)
        if entries > _WIDE_ENTRIES and entries > _WIDE_RATIO * pairs:
            widest = max(rows, key=lambda item: len(rows[item]))
            got = f"{width} on item {widest}, a table of {entries:,} entries for {pairs:,} pairs"
            raise EnsembleKDError(
                where, "attributes spread over the items", got, "Keep the attributes of it that matter."
            )
        table = np.full((num_items + 2, width), -1, dtype=np.int64)
        slots = np.arange(pairs) - np.repeat(np.cumsum(counts) - counts, counts)
        table[owners, slots] = flat - 1
        return cls(int(flat.max()), torch.from_numpy(table))

    @classmethod
    def from_table(
        cls, table: Table, vocabulary: Vocabulary, *, item: str = "item_id", attributes: str | Sequence[str]
    ) -> ItemAttributes:
        """Build the table from one of pandas, polars or Arrow with a row per item.

        Every distinct value of a column is an attribute. Where a column has lists, each of their values is one. Missing
        values are none. Items that the vocabulary does not have are passed over. Attributes are numbered by first
        appearance, item by item in the vocabulary's order: items that are added to it change no old attribute's number.

        Args:
            table: anything whose ``table[name]`` is a column.
            vocabulary: of the items, such as ``data.vocabulary``.
            item: the column of the items' ids.
            attributes: the columns of attributes.

        Raises:
            EnsembleKDError: a column that is not there, or no item has an attribute.

        Examples:
            >>> table = {"item_id": ["tea", "rum"], "kind": ["drink", "drink"], "tags": [["hot", "green"], None]}
            >>> found = ItemAttributes.from_table(table, Vocabulary(["tea", "rum"]), attributes=["kind", "tags"])
            >>> found.table[1:3].tolist()
            [[0, 1, 2], [0, -1, -1]]
        """
        where = "ItemAttributes.from_table"
        listed = [attributes] if isinstance(attributes, str) else list(attributes)
        names = ids_of(where, table, item)
        owned: dict[Hashable, dict[Hashable, None]] = {}
        for name in listed:
            found = values(column(where, table, name))
            if len(found) != len(names):
                got, fix = f"{len(names)} and {len(found)}", "Pass a table with a row per item."
                raise EnsembleKDError(where, "columns of one length", got, fix)
            for owner, value in zip(names, found, strict=True):
                several = value if isinstance(value, Iterable) and not isinstance(value, str | bytes) else [value]
                owned.setdefault(owner, {}).update(((name, one), None) for one in several if not missing(one))
        numbers: dict[Hashable, int] = {}
        rows = {
            i: [numbers.setdefault(attribute, len(numbers) + 1) for attribute in owned.get(name, ())]
            for i, name in enumerate(vocabulary.names, start=1)
        }
        if not numbers:
            fix = "Compare the ids of both tables, and their types."
            raise EnsembleKDError(where, f"attributes of items such as {vocabulary.name(1)!r}", "none", fix)
        return cls.from_dict(rows, len(vocabulary))

    @property
    def num_items(self) -> int:
        """The number of items, v."""
        return self.table.shape[0] - 2

    def to(self, device: torch.device | str) -> ItemAttributes:
        """Return the same attributes with the table on ``device``.

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


def _distinct(where: str, item: int, ids: Iterable[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """An item's attribute ids, sorted, each once."""
    listed = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str | bytes) else None
    if listed is None or not all(map(is_whole, listed)):
        fix = "Pass whole numbers from 1, as many as the item has."
        raise EnsembleKDError(where, "a list of attribute ids per item", f"{shown(ids)} of item {item}", fix)
    found = sorted({int(one) for one in listed})
    if found and not 1 <= found[0] <= found[-1] < 2**63:
        got = found[0] if found[0] < 1 else found[-1]
        raise EnsembleKDError(where, "attribute ids from 1", got, "Count attributes from 1, without gaps.")
    return np.array(found, dtype=np.int64)
