"""The splits of users' items: what trains, the histories and targets of validation and test, and everything."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.data.holdout import Cuts, Holdout, cuts_of
from ensemble_kd.data.ragged import Prefixes, keep_first, left_padded, training_spans
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import choice, shown, whole

Split: TypeAlias = Literal["train", "valid", "test", "all"]


class Splits:
    """The part of ``SequenceData`` that training and evaluation read; its constructor sets the attributes."""

    items: Tensor
    offsets: Tensor
    num_items: int
    holdout: Holdout

    @cached_property
    def cuts(self) -> Cuts:
        """The place at which each user's items are cut, per split."""
        return cuts_of(self.holdout, self.offsets.diff())

    @property
    def held_out(self) -> str:
        """The kind of split in the words of a protocol."""
        return self.cuts.name

    @property
    def max_history(self) -> int:
        """Length of the longest history before a target: ``inputs(split, max_history)`` cuts nothing off."""
        return max(1, *(int(cut.max()) for cut in (self.cuts.train, self.cuts.valid, self.cuts.test)))

    def has_targets(self, split: Split) -> bool:
        """Return True if some user has a target in "valid" or "test"."""
        return split in ("valid", "test") and len(self.users_of(split)) > 0

    def users_of(self, split: Split) -> Tensor:
        """Return the users that a split has, in their order: all, or those with a target in "valid" or "test".

        Examples:
            >>> from ensemble_kd.data import SequenceData
            >>> SequenceData.from_sequences([[1, 2, 3, 4], [4, 5, 6]]).users_of("test")
            tensor([0, 1])
        """
        return (self._known(split) >= 0).nonzero()[:, 0]

    def history(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return each user's items before the split's target, oldest first.

        Args:
            split: "valid" or "test", with the users that have a target there (by leave-one-out all); "train" for what
                trains; "all" for everything.

        Returns:
            (items, offsets), int64: the u-th of these users has ``items[offsets[u]:offsets[u + 1]]``.

        Raises:
            EnsembleKDError: any other split.

        Examples:
            >>> from ensemble_kd.data import SequenceData
            >>> SequenceData.from_sequences([[1, 2, 3, 4], [4, 5, 6]]).history("test")
            (tensor([1, 2, 3, 4, 5]), tensor([0, 3, 5]))
        """
        known = self._known(split)
        items, offsets = keep_first(self.items, self.offsets, known.clamp(min=0))
        return items, torch.cat([offsets[:1], offsets[1:][known >= 0]])

    def target(self, split: Split) -> Tensor:
        """Return the target of each user that has one, in the users' order.

        Args:
            split: "valid" or "test"; by leave-one-out the second-to-last item, and the last.

        Returns:
            (users of the split,) int64.

        Raises:
            EnsembleKDError: "train" and "all", which have no targets, or any other split.

        Examples:
            >>> from ensemble_kd.data import SequenceData
            >>> SequenceData.from_sequences([[1, 2, 3, 4], [4, 5, 6]]).target("valid")
            tensor([3, 5])
        """
        choice("SequenceData.target", "split", split, get_args(Split))
        if split in ("train", "all"):
            fix = "Training targets come from the windows, by the objective."
            raise EnsembleKDError("SequenceData.target", "split 'valid' or 'test'", repr(split), fix)
        known = self._known(split)
        return self.items[(self.offsets[:-1] + known)[known >= 0]]

    def inputs(self, split: Split, max_len: int) -> Tensor:
        """Return the newest ``max_len`` items of each user's history, in the users' order.

        Args:
            split: as in :meth:`history`.
            max_len: l, the number of columns.

        Returns:
            (users of the split, l) int64, left-padded with 0.

        Raises:
            EnsembleKDError: any other split, or max_len < 1.

        Examples:
            >>> from ensemble_kd.data import SequenceData
            >>> SequenceData.from_sequences([[1, 2, 3, 4], [4, 5, 6]]).inputs("valid", 2).tolist()
            [[1, 2], [0, 4]]
        """
        max_len = whole("SequenceData.inputs", "max_len", max_len, least=1)
        known = self._known(split)
        has = known >= 0
        return left_padded(self.items, (self.offsets[:-1] + known)[has], known[has].clamp(max=max_len), max_len)

    def _known(self, split: Split) -> Tensor:
        """Return the number of each user's items before the target of a split, -1 without one: (num_users,)."""
        choice("SequenceData", "split", split, get_args(Split))
        return self.offsets.diff() if split == "all" else getattr(self.cuts, split)

    def train_windows(
        self,
        max_len: int,
        step: int | None = 1,
        min_len: int = 1,
        seed: Sequence[int] = (0,),
        prefixes: Prefixes = "none",
    ) -> Tensor:
        """Return windows over the training part of each user, user after user, oldest window first.

        A part of at most ``max_len`` items is one window. A longer part has the window that ends at its newest item,
        those that start ``step``, 2 ``step``, … before it, and the one that starts at its oldest item; all are full.
        With step <= max_len, every item is in a window.

        With step None, a longer part is cut at places drawn at random. Neighbours share ``min_len`` - 1 items, so that
        an epoch of windows predicts every item once, and in other epochs, of other seeds, from another context.

        Some networks predict the next item at a window's end alone: those that return one state, and those that fill
        masks, which read ahead elsewhere. They see more ends by ``prefixes``.

        Args:
            max_len: l, the length of a window (the authors: 15 on Beauty, 20 on Toys, 40 on ML-1M).
            step: the distance between windows (the authors: 1, 1, 10); None: as far apart as they are long.
            min_len: users whose training part is shorter than this have no window.
            seed: of what is drawn; such as the run's seed and the epoch's number.
            prefixes: "one": each window comes a second time without some of its newest items, whose number is drawn;
                "all": a window ends at every item, where step is None; "none".

        Returns:
            (w, l) int64, left-padded with 0.

        Raises:
            EnsembleKDError: an argument below 1, or no user is left.

        Examples:
            >>> from ensemble_kd.data import SequenceData
            >>> data = SequenceData.from_sequences([[1, 2, 3, 4, 5], [5, 6, 7]])
            >>> data.train_windows(2).tolist()
            [[1, 2], [2, 3], [0, 5]]
            >>> data.train_windows(2, step=None).tolist()  # a place is drawn for the first user
            [[0, 1], [2, 3], [0, 5]]
            >>> data.train_windows(2, step=None, prefixes="all").tolist()
            [[0, 1], [1, 2], [2, 3], [0, 5]]
        """
        where = "SequenceData.train_windows"
        max_len, step, min_len, seed = window_arguments(where, max_len, step, min_len, seed, prefixes)
        items, offsets = self.history("train")
        lengths = offsets.diff()
        long_enough = lengths >= min_len
        if not long_enough.any():
            got = f"at most {int(lengths.max())}"
            raise EnsembleKDError(where, f"a user with {min_len} training items", got, "Lower min_len.")
        items = items[torch.repeat_interleave(long_enough, lengths)]
        offsets = torch.nn.functional.pad(lengths[long_enough].cumsum(0), (1, 0))
        rng = np.random.default_rng(seed)
        places = training_spans(
            offsets[:-1], offsets.diff(), width=max_len, step=step, least=min_len, prefixes=prefixes, rng=rng
        )
        return left_padded(items, *places, max_len)

    def popularity(self) -> Tensor:
        """Count each item in the training part; as scores, the counts are the popularity baseline.

        Returns:
            (num_items + 1,) float32, index = item id, 0 for padding.

        Examples:
            >>> from ensemble_kd.data import SequenceData
            >>> SequenceData.from_sequences([[1, 2, 3, 4], [1, 5, 6]]).popularity().tolist()
            [0.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        """
        return torch.bincount(self.history("train")[0], minlength=self.num_items + 1).float()


def window_arguments(
    where: str, max_len: object, step: object, min_len: object, seed: object, prefixes: object
) -> tuple[int, int | None, int, list[int]]:
    """Check the arguments of ``train_windows``.

    Raises:
        EnsembleKDError: one of them cannot be used.
    """
    longest, least = whole(where, "max_len", max_len, least=1), whole(where, "min_len", min_len, least=1)
    choice(where, "prefixes", prefixes, get_args(Prefixes))
    if prefixes == "all" and step is not None:
        raise EnsembleKDError(where, 'step None with prefixes="all"', repr(step), "A window ends at every item anyway.")
    if step is None and least > longest:
        fix = "Windows that share min_len - 1 items have to be longer than that."
        raise EnsembleKDError(where, f"min_len <= max_len = {longest}", least, fix)
    if not isinstance(seed, Sequence) or isinstance(seed, str) or not seed:
        raise EnsembleKDError(where, "seed, a sequence of whole numbers", shown(seed), "Pass (seed, epoch).")
    seeds = [whole(where, "seed", number, least=0) for number in seed]
    return longest, None if step is None else whole(where, "step", step, least=1), least, seeds
