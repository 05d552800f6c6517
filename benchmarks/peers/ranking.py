"""The one evaluator: ranks of each user's test item, from blocks of scores of any library's model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.data import SequenceData, left_padded
from ensemble_kd.metrics import ranks

ROWS = 256  # users at a time: 12 MB of Beauty's scores


def scores(folder: Path) -> Iterator[Tensor]:
    """Yield the scores (users, items + 1) that a runner left, some users at a time, column i for item i.

    Column 0 is padding. An item that the library cannot score has -inf.
    """
    queries, items, bias = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("queries", "items", "bias"))
    for part in queries.split(ROWS):
        yield part @ items.T + bias


def mean_scores(folders: Sequence[Path]) -> Iterator[Tensor]:
    """Yield the mean of the scores that several runners left, for the same users and items."""
    for parts in zip(*(scores(folder) for folder in folders), strict=True):
        yield torch.stack(parts).mean(0)


def rank(blocks: Iterable[Tensor], data: SequenceData) -> Tensor:
    """Return each user's rank from 0 of the test item among all items but those of the user's history.

    It is ``evaluate(..., "test", exclude="history")`` for scores in place of a model: a tie counts against the target,
    and so does a score that is no number.

    Args:
        blocks: (b, items + 1) scores of the users in turn.
        data: the users' sequences, the last item of each held out for the test.

    Returns:
        (users,) int64.

    Raises:
        ValueError: the blocks have more users or fewer than the data.

    Examples:
        >>> data = SequenceData.from_sequences([[1, 2, 3, 4], [4, 3, 2]])
        >>> rank([torch.tensor([[0.0, 9, 9, 9, 1], [0.0, 5, 2, 9, 9]])], data).tolist()
        [0, 1]
    """
    target, (history, offsets) = data.target("test"), data.history("test")
    totals, found, start = offsets.diff(), [], 0
    for block in blocks:
        users = slice(start, start + len(block))
        if users.stop > len(target):
            raise ValueError(f"scores of {len(target)} users, got {users.stop} or more")
        lengths = totals[users]
        seen = left_padded(history, offsets[1:][users], lengths, int(lengths.max()))
        found.append(ranks(block, target[users], seen))
        start = users.stop
    if start != len(target):
        raise ValueError(f"scores of {len(target)} users, got {start}")
    return torch.cat(found)
