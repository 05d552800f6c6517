"""``SequenceData``: users' item sequences in memory, with the names of users and items."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.data.attributes import ItemAttributes
from ensemble_kd.data.columns import Table, ids_of, times_of
from ensemble_kd.data.holdout import (
    AtTime,
    Cuts,
    Holdout,
    Named,
    cuts_at,
    least_items,
)
from ensemble_kd.data.numbering import Repeats, number
from ensemble_kd.data.ragged import keep_last
from ensemble_kd.data.rows import MOST_ITEMS, as_row
from ensemble_kd.data.splits import Splits
from ensemble_kd.data.vocabulary import Vocabulary
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import instance, shown, whole


@dataclass(frozen=True, eq=False, repr=False)
class SequenceData(Splits):
    """The items of every user, oldest first, in one flat tensor, and which of them are held out.

    By default that is leave-one-out (Sec. 4.1.2): the last item of a user is the test target, the second-to-last the
    validation target, the rest trains. With ``holdout="none"`` everything trains, as for a model in production, and
    nothing is left to validate by.

    Args:
        items: (num_interactions,) int64 on the CPU, ids 1..num_items, user after user.
        offsets: (num_users + 1,) int64; user u has ``items[offsets[u]:offsets[u + 1]]``: at least 3 items, or at least
            1 with another holdout than "last".
        num_items: v; ids that nobody interacted with are allowed.
        item_attributes: the attributes of each item, or None.
        item_names: the source's own ids, ``item_names[i - 1]`` for item i, or None.
        user_names: the source's own ids, ``user_names[u]`` for user u, or None.
        holdout: "last", "none", or ``Cuts`` of each user's items.

    Raises:
        EnsembleKDError: tensors that are not such a list of sequences.

    Examples:
        >>> data = SequenceData.from_sequences([[1, 2, 3, 4, 5], [3, 1, 2]])
        >>> data
        SequenceData(num_users=2, num_items=5, num_interactions=8, num_attributes=0)
        >>> data.target("test"), data.inputs("test", max_len=3).tolist()
        (tensor([5, 2]), [[2, 3, 4], [0, 3, 1]])
    """

    items: Tensor
    offsets: Tensor
    num_items: int
    item_attributes: ItemAttributes | None = None
    item_names: tuple[Hashable, ...] | None = None
    user_names: tuple[Hashable, ...] | None = None
    holdout: Holdout = "last"

    def __post_init__(self) -> None:
        where, items, offsets = "SequenceData", self.items, self.offsets
        for name, tensor in {"items": items, "offsets": offsets}.items():
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                fix = "Use SequenceData.from_sequences, or torch.as_tensor."
                raise EnsembleKDError(where, f"flat int64 {name} as a tensor", shown(tensor), fix)
            if tensor.ndim != 1 or tensor.dtype != torch.int64 or tensor.device.type != "cpu":
                got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                raise EnsembleKDError(where, f"flat int64 {name} on the CPU", got, "Move batches, not the data.")
        object.__setattr__(self, "num_items", whole(where, "num_items", self.num_items, least=1, most=MOST_ITEMS))
        if offsets.numel() < 2 or offsets[0] != 0 or offsets[-1] != items.numel():
            expected = f"(num_users + 1,) offsets from 0 to {items.numel()} and at least one user"
            raise EnsembleKDError(where, expected, offsets.tolist()[-3:], "Start with 0 and end with the total.")
        if int(offsets.diff().min()) < (least := least_items(self.holdout)):
            user = int(offsets.diff().argmin())
            got = f"{int(offsets.diff()[user])} of user {user}"
            raise EnsembleKDError(where, f"at least {least} items per user", got, "Leave such users out.")
        if isinstance(self.holdout, Cuts):
            self.holdout.check(offsets.diff())
        low, high = torch.stack(items.aminmax()).tolist()
        if low < 1 or high > self.num_items:
            fix = "Item ids start at 1; 0 is padding."
            raise EnsembleKDError(where, f"item ids in 1..{self.num_items}", f"{low}..{high}", fix)
        counts = {
            "item_attributes": (self.item_attributes, self.num_items),
            "item_names": (self.item_names, self.num_items),
            "user_names": (self.user_names, self.num_users),
        }
        for name, (given, wanted) in counts.items():
            if given is not None and not isinstance(given, ItemAttributes if name == "item_attributes" else tuple):
                raise EnsembleKDError(where, f"{name} of length {wanted}", shown(given), "Give one to each, or None.")
            if given is not None and len(given) != wanted:
                raise EnsembleKDError(where, f"{name} of length {wanted}", len(given), "Give one to each, or None.")

    @classmethod
    def from_sequences(
        cls,
        sequences: Iterable[Iterable[int]],
        *,
        num_items: int | None = None,
        item_attributes: ItemAttributes | None = None,
        holdout: Holdout = "last",
    ) -> SequenceData:
        """Build the data from one sequence of item ids per user, oldest first.

        Args:
            sequences: at least 3 ids each, from 1: lists, arrays or tensors; with another holdout at least 1.
            num_items: v; None: the largest id.
            item_attributes: the attributes of each item.
            holdout: "last" holds back two items of every user, "none" nothing; or ``Cuts``.

        Returns:
            The data.

        Raises:
            EnsembleKDError: no user, a user of too few items, or ids that are no whole numbers or out of range.

        Examples:
            >>> SequenceData.from_sequences([[1, 2, 3]], num_items=9).num_items
            9
        """
        where = "SequenceData.from_sequences"
        most = MOST_ITEMS if num_items is None else whole(where, "num_items", num_items, least=1, most=MOST_ITEMS)
        least = least_items(holdout)
        instance(where, "sequences", sequences, Iterable, "Pass one sequence of item ids for each user.")
        rows = [as_row(where, sequence, user, most=most, least=least) for user, sequence in enumerate(sequences)]
        if not rows:
            raise EnsembleKDError(where, "at least one sequence", "none", "Pass one sequence for each user.")
        items = torch.from_numpy(np.concatenate(rows, dtype=np.int64))
        offsets = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
        num_items = int(items.max()) if num_items is None else num_items
        return cls(items, offsets, num_items, item_attributes, holdout=holdout)

    @classmethod
    def from_interactions(
        cls,
        table: Table,
        *,
        user: str = "user_id",
        item: str = "item_id",
        time: str | None = "timestamp",
        k_core: int = 1,
        repeats: Repeats = "keep",
        holdout: Named | AtTime = "last",
        vocabulary: Vocabulary | None = None,
        item_table: Table | None = None,
        attributes: str | Sequence[str] = (),
    ) -> SequenceData:
        """Build the data from a table of pandas, polars or Arrow with a row per interaction.

        Ids may be texts, numbers, UUIDs or anything else that can be the key of a dict. ``item_names`` and
        ``user_names`` keep them. Users are numbered by first appearance in the table, items by first appearance in the
        sequences.

        Args:
            table: anything whose ``table[name]`` is a column, so a dict of lists, too.
            user: the column of the users.
            item: the column of the items.
            time: the column that orders a user's interactions: numbers, dates or times. Equal times keep the order of
                the table. None: the order of the table.
            k_core: fewest interactions of a user and of an item; others are removed, again and again. 1 keeps all.
            repeats: "keep" or "drop" a user's later interactions with an item.
            holdout: "last" holds back the last two items of every user, and leaves out users with fewer than 3; "none"
                nothing, for a model in production or for histories to recommend for; ``AtTime`` what came later.
            vocabulary: that of a trained model, so that its items keep their numbers. Others follow them; see
                ``ensemble_kd.growing``.
            item_table: the table of the items, with the same column ``item``.
            attributes: its columns of attributes, see ``ItemAttributes.from_table``.

        Raises:
            EnsembleKDError: a column that is not there, a row without an id or a time, ids of several types, or nothing
                is left.

        Examples:
            >>> table = {"user_id": ["ann", "bob", "ann", "ann"], "item_id": ["tea", "tea", "milk", "rum"]}
            >>> data = SequenceData.from_interactions(table, time=None, holdout="none")
            >>> data, data.item_names
            (SequenceData(num_users=2, num_items=3, num_interactions=4, num_attributes=0), ('tea', 'milk', 'rum'))
        """
        where = "SequenceData.from_interactions"
        named: Holdout = "none" if isinstance(holdout, AtTime) else holdout
        least = least_items(named)
        if isinstance(holdout, AtTime) and time is None:
            raise EnsembleKDError(where, "a column of times for AtTime", "time=None", "Name the column.")
        users, items = (ids_of(where, table, name) for name in (user, item))
        when = None if time is None else times_of(where, table, time)
        sizes = dict.fromkeys([len(users), len(items), *([] if when is None else [len(when)])])
        if len(sizes) > 1 or 0 in sizes:
            fix = "Pass a table with a row per interaction."
            raise EnsembleKDError(where, "columns of one length >= 1", " and ".join(map(str, sizes)), fix)
        rules: dict[str, Any] = {"k_core": k_core, "least": least, "repeats": repeats, "known": vocabulary}
        found = number(where, users, items, when, **rules)
        if isinstance(holdout, AtTime):
            assert when is not None
            named = cuts_at(where, holdout, when[found.rows], found.offsets)
        names, about = found.item_names, None
        if item_table is not None or attributes:
            if item_table is None or not attributes:
                given = "attributes alone" if item_table is None else "item_table alone"
                raise EnsembleKDError(where, "both item_table and attributes, or neither", given, "Name the other.")
            about = ItemAttributes.from_table(item_table, Vocabulary(names), item=item, attributes=attributes)
        return cls(found.items, found.offsets, len(names), about, names, found.user_names, named)

    @property
    def num_users(self) -> int:
        """The number of users."""
        return self.offsets.numel() - 1

    @property
    def num_interactions(self) -> int:
        """The number of items in all sequences together."""
        return self.items.numel()

    @property
    def checksum(self) -> str:
        """Eight digits that change with any item of any sequence, and with ``Cuts``."""
        offsets = zlib.crc32(self.offsets.numpy().tobytes(), zlib.crc32(self.items.numpy().tobytes()))
        return f"{offsets ^ self.holdout.checksum if isinstance(self.holdout, Cuts) else offsets:08x}"

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The source's own ids of the items; None if ``item_names`` is."""
        return None if self.item_names is None else Vocabulary(self.item_names)

    @cached_property
    def users(self) -> Vocabulary | None:
        """The source's own ids of the users, who count from 0; None if ``user_names`` is."""
        return None if self.user_names is None else Vocabulary(self.user_names, first=0, kind="user")

    def with_holdout(self, holdout: Holdout) -> SequenceData:
        """Return the same sequences with other items held back.

        Args:
            holdout: "none" for a model in production, which trains on everything; "last"; or ``Cuts``.

        Examples:
            >>> data = SequenceData.from_sequences([[1, 2, 3, 4]]).with_holdout("none")
            >>> data.train_windows(4).tolist(), data.has_targets("valid")
            ([[1, 2, 3, 4]], False)
        """
        return replace(self, holdout=holdout)

    def newest(self, count: int) -> SequenceData:
        """Return the newest items of each user alone: what a trained model has to learn from to keep up.

        Args:
            count: the most items per user; with two held back by leave-one-out, two more than are to train.

        Raises:
            EnsembleKDError: count is too small, or the data has ``Cuts``.

        Examples:
            >>> SequenceData.from_sequences([[1, 2, 3, 4], [4, 5, 6]]).newest(3).history("all")
            (tensor([2, 3, 4, 4, 5, 6]), tensor([0, 3, 6]))
        """
        where = "SequenceData.newest"
        if isinstance(self.holdout, Cuts):
            fix = 'Call with_holdout("last") or with_holdout("none") first.'
            raise EnsembleKDError(where, "data without cuts by time", self.held_out, fix)
        count = whole(where, "count", count, least=least_items(self.holdout))
        items, offsets = keep_last(self.items, self.offsets, self.offsets.diff().clamp(max=count))
        return replace(self, items=items, offsets=offsets)

    def pieces(self) -> Iterator[SequenceData]:
        """Return the users in parts that fit into memory: here all at once."""
        yield self

    def __repr__(self) -> str:
        attributes = 0 if self.item_attributes is None else self.item_attributes.num_attributes
        return (
            f"SequenceData(num_users={self.num_users}, num_items={self.num_items}, "
            f"num_interactions={self.num_interactions}, num_attributes={attributes})"
        )
