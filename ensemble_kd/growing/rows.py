"""Rows of tables for new items: the mean of the old ones, or by attributes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ensemble_kd.ensemble import Attributes

Initial = Callable[[Tensor], Tensor]  # the rows of the old items (v, *rest) -> those of the new ones


def initial_rows(attributes: Attributes | None, *, old: int, new: int) -> Initial:
    """Return the function from old items' rows (old, \\*rest) to the rows of items old + 1..new."""
    table = None if attributes is None else attributes.table.cpu()  # as the rows: not every device has float64
    if table is None or len(table) != new + 2:
        return lambda rows: rows.cpu().double().mean(dim=0).to(rows).expand(new - old, *rows.shape[1:])

    def by_attributes(rows: Tensor) -> Tensor:
        assert attributes is not None
        assert table is not None
        flat, known, fresh = rows.cpu().double().reshape(old, -1), table[1 : old + 1], table[old + 1 : new + 1]
        owners, slots = (known >= 0).nonzero(as_tuple=True)
        classes = known[owners, slots]
        sums = flat.new_zeros(attributes.num_attributes, flat.shape[1])
        sums.index_add_(0, classes, flat[owners])
        counts = torch.bincount(classes, minlength=len(sums))
        means = sums / counts.clamp(min=1)[:, None]
        usable = (fresh >= 0) & (counts[fresh.clamp(min=0)] > 0)
        share = usable.double() / usable.sum(dim=1, keepdim=True).clamp(min=1)
        made = (share[:, :, None] * means[fresh.clamp(min=0)]).sum(dim=1)
        made[~usable.any(dim=1)] = flat.mean(dim=0)
        return made.to(rows).view(-1, *rows.shape[1:])

    return by_attributes


def grown_rows(table: Tensor, old: int, initial: Initial) -> Tensor:
    """Return a table of the old items with rows for the new ones, its padding first and its mask token last.

    Args:
        table: (old + 2, \\*rest), (old + 1, \\*rest) without a mask token, or (old, \\*rest) with items alone.
        old: the number of old items.
        initial: see ``initial_rows``.

    Examples:
        >>> grown_rows(torch.tensor([0.0, 1.0, 3.0, 9.0]), 2, lambda rows: rows.mean(0, keepdim=True))
        tensor([0., 1., 3., 2., 9.])
    """
    first = min(1, len(table) - old)
    items = table[first : first + old]
    return torch.cat([table[: first + old], initial(items), table[first + old :]])
