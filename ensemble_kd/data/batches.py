"""The batches of an epoch over windows in memory: a pure function of a seed and the epoch's number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import is_whole, shown, whole


def check_part(where: str, part: tuple[int, int]) -> int:
    """Check (this process, all processes); return the second.

    Raises:
        EnsembleKDError: anything else.
    """
    if not (isinstance(part, tuple) and len(part) == 2 and all(map(is_whole, part)) and 0 <= part[0] < part[1]):
        raise EnsembleKDError(where, "part (process, processes)", shown(part), "Pass (0, 1) for a single process.")
    return int(part[1])


class BatchPlan:
    """The batches of one epoch, drawn at random, without the columns that are padding throughout.

    Batches are drawn at random, not grouped by length. In a batch of short windows, an item would count more than in a
    batch of long ones; this cost SASRec on Beauty a tenth of its NDCG@10. ``EnsembleKD.loss(by_length=True)`` avoids
    the padding inside a batch.

    ``plan[i]`` is batch i, and ``plan.batches(start=i)`` goes on with an interrupted epoch. The same (windows,
    batch_size, seed, epoch) give the same plan in any process. Every window is in exactly one batch. A last batch of
    one window joins the batch before it, since contrastive losses need two. The windows may be on an accelerator: the
    constructor reads their lengths once, and no batch waits for the device.

    Args:
        windows: (w, l) int64, left-padded with 0.
        batch_size: windows per batch.
        seed: non-negative.
        epoch: non-negative.
        at_least: a last batch of fewer windows joins the batch before it, unless all batches are as small.
        part: (rank, number of processes): of each batch, this process takes every so many-th row.

    Raises:
        EnsembleKDError: windows that are not (w, l) int64 with w, l >= 1, or a number out of range.

    Examples:
        >>> windows = torch.tensor([[0, 0, 1], [0, 2, 3], [0, 5, 6], [0, 0, 7]])
        >>> plan = BatchPlan(windows, batch_size=4, seed=0, epoch=0)
        >>> [tuple(batch.shape) for batch in plan]
        [(4, 2)]
    """

    def __init__(
        self,
        windows: Tensor,
        batch_size: int,
        seed: int,
        epoch: int,
        at_least: int = 2,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        where = "BatchPlan"
        if not isinstance(windows, Tensor) or windows.ndim != 2 or windows.dtype != torch.int64 or 0 in windows.shape:
            got = shown(windows)
            raise EnsembleKDError(where, "windows (w, l) int64", got, "Pass SequenceData.train_windows(max_len).")
        batch_size = whole(where, "batch_size", batch_size, least=1)
        seed, epoch = whole(where, "seed", seed, least=0), whole(where, "epoch", epoch, least=0)
        at_least = whole(where, "at_least", at_least, least=1)
        check_part(where, part)
        self.windows, self.part = windows, part
        rows, width = windows.shape
        oldest = (windows != 0).to(torch.uint8).argmax(dim=1)  # column of the first item of each window
        lengths: np.ndarray[tuple[int, ...], np.dtype[np.int64]] = (width - oldest).cpu().numpy()

        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(rows)
        bounds = [*range(0, rows, batch_size), rows]
        if batch_size >= at_least and len(bounds) > 2 and bounds[-1] - bounds[-2] < at_least:
            del bounds[-2]
        self._spans = list(itertools.pairwise(bounds))
        self._lengths = lengths[order]
        self._widths = [int(lengths[order[start:stop]].max()) for start, stop in self._spans]
        self._order = torch.from_numpy(order).to(windows.device)

    def rows(self, index: int) -> Tensor:
        """Return the numbers of the windows in batch ``index``: (b,) int64 on the windows' device.

        Raises:
            IndexError: the plan has no such batch.

        Examples:
            >>> BatchPlan(torch.tensor([[1], [2]]), 2, seed=0, epoch=0).rows(0).sort().values
            tensor([0, 1])
        """
        start, stop = self._spans[index]
        first, every = self.part
        return self._order[start + first : stop : every]

    def lengths(self, index: int) -> list[int]:
        """Return the number of items of each window of batch ``index``, which the host knows.

        Examples:
            >>> sorted(BatchPlan(torch.tensor([[1, 2], [0, 3]]), 2, seed=0, epoch=0).lengths(0))
            [1, 2]
        """
        start, stop = self._spans[index]
        first, every = self.part
        found: list[int] = self._lengths[start + first : stop : every].tolist()
        return found

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """Return the batches from number ``start`` on.

        Examples:
            >>> plan = BatchPlan(torch.tensor([[1], [2], [3], [4]]), 2, seed=0, epoch=0)
            >>> [batch.shape for batch in plan.batches(start=1)]
            [torch.Size([2, 1])]
        """
        return (self[index] for index in range(start, len(self)))

    def __getitem__(self, index: int) -> Tensor:
        rows = self.rows(index)
        return self.windows[:, -self._widths[index] :].index_select(0, rows)

    def __iter__(self) -> Iterator[Tensor]:
        return self.batches()

    def __len__(self) -> int:
        return len(self._spans)

    def __repr__(self) -> str:
        return f"BatchPlan(windows={tuple(self.windows.shape)}, batches={len(self)})"
