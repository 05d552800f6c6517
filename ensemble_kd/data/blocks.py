"""The batches of an epoch over windows on disk: read some blocks at a time, each block by one process."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.data.batches import check_part
from ensemble_kd.data.mapped import MappedWindows
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import shown, whole

TOGETHER = 16  # blocks that a process reads and shuffles at a time

_Ints = np.ndarray[Any, np.dtype[np.int64]]


class _Group(NamedTuple):
    shards: list[_Ints]  # of each process: its blocks
    batches: int


class BlockPlan:
    """The batches of one epoch over windows on disk, as ``BatchPlan`` is over windows in memory.

    Blocks are shuffled and read in groups of 16 per process, each block by one process. The windows of a group are
    shuffled, too, and every process spreads its own evenly over the group's batches: its parts of them differ by one
    window at most. A batch has the same width in every process, which each computes from the lengths. The plan is a
    function of the seed and the epoch, so an interrupted epoch goes on where it stopped. Every window is in exactly one
    batch.

    Args:
        windows: from ``MappedSequences.train_windows``.
        batch_size: about how many windows a batch has, over all processes.
        seed: non-negative.
        epoch: non-negative.
        part: (rank, number of processes) of this one.

    Raises:
        EnsembleKDError: fewer blocks with windows than processes.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from ensemble_kd.data import MappedSequences, write_sequences
        >>> folder = TemporaryDirectory()
        >>> write_sequences(folder.name, [[1, 2, 3, 4, 5], [5, 4, 3]], num_items=5)
        >>> plan = BlockPlan(MappedSequences(folder.name).train_windows(2), batch_size=2, seed=0, epoch=0)
        >>> len(plan), sorted(row for batch in plan.batches() for row in batch.tolist())
        (1, [[0, 5], [1, 2], [2, 3]])
        >>> folder.cleanup()
    """

    def __init__(
        self,
        windows: MappedWindows,
        batch_size: int,
        seed: int,
        epoch: int,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        where, processes = "BlockPlan", check_part("BlockPlan", part)
        if isinstance(windows, type) or not hasattr(windows, "counts"):
            fix = "Pass MappedSequences(...).train_windows(max_len)."
            raise EnsembleKDError(where, "windows of MappedSequences", shown(windows), fix)
        batch_size = whole(where, "batch_size", batch_size, least=processes)
        seed, epoch = whole(where, "seed", seed, least=0), whole(where, "epoch", epoch, least=0)
        self.windows, self.part = windows, part
        self._seed = [seed, epoch]
        counts = windows.counts
        filled = counts.nonzero()[0]
        if len(filled) < processes:
            fix = "Open the sequences with a smaller block=, or start fewer processes."
            raise EnsembleKDError(where, f"{processes} blocks with windows or more", len(filled), fix)
        order = filled[np.random.default_rng(self._seed).permutation(len(filled))]
        groups = [order[start : start + TOGETHER * processes] for start in range(0, len(order), TOGETHER * processes)]
        least = max(processes, min(2, batch_size))  # contrastive losses need two
        if len(groups) > 1 and (len(groups[-1]) < processes or counts[groups[-1]].sum() < least):
            groups[-2:] = [np.concatenate(groups[-2:])]
        self._groups = []
        for blocks in groups:
            shards = [blocks[rank::processes] for rank in range(processes)]
            total, fewest = int(counts[blocks].sum()), min(int(counts[shard].sum()) for shard in shards)
            batches = min(-(-total // batch_size), fewest, max(1, total // least))
            self._groups.append(_Group(shards, batches))

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """Return this process's rows of the batches from number ``start`` on: (b, l) int64, left-padded with 0."""
        for number, group in enumerate(self._groups):
            if start < group.batches:
                yield from self._of_group(number, group, start)
            start = max(0, start - group.batches)

    def _of_group(self, number: int, group: _Group, start: int) -> Iterator[Tensor]:
        own = group.shards[self.part[0]]
        rows, widths = [], np.zeros(group.batches, dtype=np.int64)
        for rank, shard in enumerate(group.shards):
            lengths = np.concatenate([self.windows.spans(block)[1].numpy() for block in shard])
            cuts = np.arange(group.batches + 1) * len(lengths) // group.batches
            order = np.random.default_rng([*self._seed, number, rank]).permutation(len(lengths))
            widths = np.maximum(widths, np.maximum.reduceat(lengths[order], cuts[:-1]))
            if rank == self.part[0]:
                rows = [torch.from_numpy(order[low:high]) for low, high in pairwise(cuts)]
        # All interactions in memory: this process's blocks of the group.
        items = [self.windows.data.items_of(block) for block in own]
        begins = np.cumsum([0, *(len(part) for part in items)])
        spans = [self.windows.spans(block) for block in own]
        ends = torch.cat([end + int(begin) for (end, _), begin in zip(spans, begins, strict=False)])
        own_lengths = torch.cat([length for _, length in spans])
        width = self.windows.max_len
        sliding = torch.nn.functional.pad(torch.cat(items), (width, 0)).unfold(0, width, 1)
        for i in range(start, group.batches):
            batch = sliding[ends[rows[i]]]
            batch.masked_fill_(torch.arange(width) < (width - own_lengths[rows[i]])[:, None], 0)
            yield batch[:, width - int(widths[i]) :]

    def __len__(self) -> int:
        return sum(group.batches for group in self._groups)

    def __repr__(self) -> str:
        return f"BlockPlan(windows={len(self.windows)}, batches={len(self)})"
