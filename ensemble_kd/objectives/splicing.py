"""Sequences that no user has had, made of two that users have: to learn from teachers, who know no targets there."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble_kd.internal import generator as check_generator
from ensemble_kd.internal import tensor


def splice(item_ids: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Return sequences that begin as one of the batch and end as another.

    Of each row of T items the newest 1..T are kept. In front of them stands another row without some of its newest.

    Args:
        item_ids: (b, l) int64, padded with 0 on the left.
        generator: source of randomness, on the device of ``item_ids``; None: torch's global one.

    Returns:
        (b, l) int64, padded with 0 on the left; what does not fit is cut off there.

    Examples:
        >>> spliced = splice(torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]]))
        >>> spliced.shape, spliced[:, -1].tolist()
        (torch.Size([2, 5]), [3, 8])
    """
    tensor("splice", "item_ids", item_ids, "b l", "int64")
    check_generator("splice", generator)
    (b, length), device = item_ids.shape, item_ids.device
    column, count = torch.arange(length, device=device), (item_ids != 0).sum(dim=1)
    share = torch.rand(2, b, 1, generator=generator, device=device)
    other = torch.randperm(b, generator=generator, device=device)
    kept = ((share[0] * count[:, None]).long() + 1).minimum(count[:, None])
    left_out = (share[1] * count[other, None]).long()
    at = column + kept - left_out  # the column of the other row, whose newest that stays is to end where this begins
    before = item_ids[other].gather(1, at.clamp(0, length - 1)).masked_fill(at < 0, 0)
    return torch.where(column >= length - kept, item_ids, before)
