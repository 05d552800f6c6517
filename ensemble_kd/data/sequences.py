"""``SequenceData``: users' item sequences in memory, with the names of users and items."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.arguments import shown, whole
from ensemble_kd.data.attributes import ItemAttributes
from ensemble_kd.data.holdout import Cuts, Holdout, least_items
from ensemble_kd.data.ragged import keep_last
from ensemble_kd.data.rows import MOST_ITEMS, as_row
from ensemble_kd.data.splits import Splits
from ensemble_kd.data.vocabulary import Vocabulary
from ensemble_kd.errors import EnsembleKDError


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
            if not isinstance(tensor, Tensor):
                fix = "Use SequenceData.from_sequences, or torch.as_tensor."  # type: ignore[unreachable]
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
        rows = [as_row(where, sequence, user, most=most, least=least) for user, sequence in enumerate(sequences)]
        if not rows:
            raise EnsembleKDError(where, "at least one sequence", "none", "Pass one sequence for each user.")
        items = torch.from_numpy(np.concatenate(rows, dtype=np.int64))
        offsets = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
        num_items = int(items.max()) if num_items is None else num_items
        return cls(items, offsets, num_items, item_attributes, holdout=holdout)

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
