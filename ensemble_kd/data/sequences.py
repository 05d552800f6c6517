"""Users' item sequences, their leave-one-out split and the tensors that training and evaluation read."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.arguments import choice, shown, whole
from ensemble_kd.data.attributes import ItemAttributes
from ensemble_kd.data.ragged import keep_all_but, left_padded, sliding_windows
from ensemble_kd.data.rows import MIN_ITEMS, MOST_ITEMS, as_row
from ensemble_kd.errors import EnsembleKDError

Split: TypeAlias = Literal["train", "valid", "test"]
# How many of a user's newest items are still unknown when the target of a split is to be predicted.
_UNKNOWN: dict[str, int] = {"train": 2, "valid": 2, "test": 1}


@dataclass(frozen=True, eq=False, repr=False)
class SequenceData:
    """The items of every user, oldest first, in one flat tensor, with the leave-one-out split of Sec. 4.1.2.

    The last item of a user is the test target, the second-to-last the validation target, the rest trains.

    Args:
        items: (num_interactions,) int64 on the CPU, ids 1..num_items, user after user.
        offsets: (num_users + 1,) int64; user u has ``items[offsets[u]:offsets[u + 1]]``, at least 3 of them.
        num_items: v; ids that nobody interacted with are allowed.
        item_attributes: the attributes of each item, or None.
        item_names: the source's own ids, ``item_names[i - 1]`` for item i, or None.
        user_names: the source's own ids, ``user_names[u]`` for user u, or None.

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
    item_names: tuple[str, ...] | None = None
    user_names: tuple[str, ...] | None = None

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
        if int(offsets.diff().min()) < MIN_ITEMS:
            user = int(offsets.diff().argmin())
            got = f"{int(offsets.diff()[user])} of user {user}"
            raise EnsembleKDError(where, f"at least {MIN_ITEMS} items per user", got, "Leave such users out.")
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
    ) -> SequenceData:
        """Build the data from one sequence of item ids per user, oldest first.

        Args:
            sequences: at least 3 ids each, from 1: lists, arrays or tensors.
            num_items: v; None: the largest id.
            item_attributes: the attributes of each item.

        Returns:
            The data.

        Raises:
            EnsembleKDError: no user, a user of fewer than 3 items, or ids that are no whole numbers or out of range.

        Examples:
            >>> SequenceData.from_sequences([[1, 2, 3]], num_items=9).num_items
            9
        """
        where = "SequenceData.from_sequences"
        most = MOST_ITEMS if num_items is None else whole(where, "num_items", num_items, least=1, most=MOST_ITEMS)
        rows = [as_row(where, sequence, user, most=most) for user, sequence in enumerate(sequences)]
        if not rows:
            raise EnsembleKDError(where, "at least one sequence", "none", "Pass one sequence for each user.")
        items = torch.from_numpy(np.concatenate(rows, dtype=np.int64))
        offsets = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
        return cls(items, offsets, int(items.max()) if num_items is None else num_items, item_attributes)

    @property
    def num_users(self) -> int:
        """The number of users."""
        return self.offsets.numel() - 1

    @property
    def num_interactions(self) -> int:
        """The number of items in all sequences together."""
        return self.items.numel()

    @property
    def max_history(self) -> int:
        """Length of the longest test history: ``inputs(split, max_history)`` cuts nothing off."""
        return int(self.offsets.diff().max()) - 1

    @property
    def checksum(self) -> str:
        """Eight digits that change with any item of any sequence."""
        offsets = zlib.crc32(self.offsets.numpy().tobytes(), zlib.crc32(self.items.numpy().tobytes()))
        return f"{offsets:08x}"

    def pieces(self) -> Iterator[SequenceData]:
        """Return the users in parts that fit into memory: here all at once."""
        yield self

    def history(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return each user's items before the split's target, oldest first; for "train" the training part.

        Args:
            split: "train" and "valid" leave out the last two items, "test" the last one.

        Returns:
            (items, offsets), int64: user u has ``items[offsets[u]:offsets[u + 1]]``.

        Raises:
            EnsembleKDError: any other split.

        Examples:
            >>> SequenceData.from_sequences([[1, 2, 3, 4], [4, 5, 6]]).history("test")
            (tensor([1, 2, 3, 4, 5]), tensor([0, 3, 5]))
        """
        return keep_all_but(self.items, self.offsets, _unknown(split))

    def target(self, split: Split) -> Tensor:
        """Return each user's target, in the users' order.

        Args:
            split: "valid" (second-to-last item) or "test" (last item).

        Returns:
            (num_users,) int64.

        Raises:
            EnsembleKDError: "train", whose targets come from the windows, or any other split.

        Examples:
            >>> SequenceData.from_sequences([[1, 2, 3, 4], [4, 5, 6]]).target("valid")
            tensor([3, 5])
        """
        if split == "train":
            fix = "Training targets come from the windows, by the objective."
            raise EnsembleKDError("SequenceData.target", "split 'valid' or 'test'", "'train'", fix)
        return self.items[self.offsets[1:] - _unknown(split)]

    def inputs(self, split: Split, max_len: int) -> Tensor:
        """Return the newest ``max_len`` items of each user's history, in the users' order.

        Args:
            split: as in :meth:`history`.
            max_len: l, the number of columns.

        Returns:
            (num_users, l) int64, left-padded with 0.

        Raises:
            EnsembleKDError: any other split, or max_len < 1.

        Examples:
            >>> SequenceData.from_sequences([[1, 2, 3, 4], [4, 5, 6]]).inputs("valid", 2).tolist()
            [[1, 2], [0, 4]]
        """
        max_len = whole("SequenceData.inputs", "max_len", max_len, least=1)
        unknown = _unknown(split)
        lengths = (self.offsets.diff() - unknown).clamp(max=max_len)
        return left_padded(self.items, self.offsets[1:] - unknown, lengths, max_len)

    def train_windows(self, max_len: int, step: int = 1, min_len: int = 1) -> Tensor:
        """Return sliding windows over the training part of each user, user after user, oldest window first.

        A part of at most ``max_len`` items is one window. A longer part has the window that ends at its newest item,
        those that start ``step``, 2 ``step``, … before it, and the one that starts at its oldest item; all are full.
        With step <= max_len, every item is in a window.

        Args:
            max_len: l, the length of a window (the authors: 15 on Beauty, 20 on Toys, 40 on ML-1M).
            step: the distance between windows (the authors: 1, 1, 10).
            min_len: users whose training part is shorter than this have no window.

        Returns:
            (w, l) int64, left-padded with 0.

        Raises:
            EnsembleKDError: an argument below 1, or no user is left.

        Examples:
            >>> SequenceData.from_sequences([[1, 2, 3, 4, 5], [5, 6, 7]]).train_windows(2).tolist()
            [[1, 2], [2, 3], [0, 5]]
        """
        where = "SequenceData.train_windows"
        max_len, step = whole(where, "max_len", max_len, least=1), whole(where, "step", step, least=1)
        min_len = whole(where, "min_len", min_len, least=1)
        items, offsets = self.history("train")
        lengths = offsets.diff()
        long_enough = lengths >= min_len
        if not long_enough.any():
            got = f"at most {int(lengths.max())}"
            raise EnsembleKDError(where, f"a user with {min_len} training items", got, "Lower min_len.")
        items = items[torch.repeat_interleave(long_enough, lengths)]
        offsets = torch.nn.functional.pad(lengths[long_enough].cumsum(0), (1, 0))
        return sliding_windows(items, offsets, max_len, step)

    def popularity(self) -> Tensor:
        """Count each item in the training part; as scores, the counts are the popularity baseline.

        Returns:
            (num_items + 1,) float32, index = item id, 0 for padding.

        Examples:
            >>> SequenceData.from_sequences([[1, 2, 3, 4], [1, 5, 6]]).popularity().tolist()
            [0.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        """
        return torch.bincount(self.history("train")[0], minlength=self.num_items + 1).float()

    def __repr__(self) -> str:
        attributes = 0 if self.item_attributes is None else self.item_attributes.num_attributes
        return (
            f"SequenceData(num_users={self.num_users}, num_items={self.num_items}, "
            f"num_interactions={self.num_interactions}, num_attributes={attributes})"
        )


def _unknown(split: str) -> int:
    return _UNKNOWN[choice("SequenceData", "split", split, _UNKNOWN)]
