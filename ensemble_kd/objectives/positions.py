"""Target positions: which positions of the views have a target, as indices into the flattened views."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble_kd.internal import generator as check_generator
from ensemble_kd.internal import ratio, tensor, whole

_BILLION = 10**9


def mask_positions(
    item_ids: Tensor,
    *,
    views: int,
    mask_ratio: float,
    newest: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Draw exactly ``L = ceil(mask_ratio * T)`` of the T real positions of each sequence and view, Eq. 3.

    Args:
        item_ids: (b, l) int64, 0 = padding on the left.
        views: m independent draws.
        mask_ratio: rho, in (0, 1].
        newest: probability that the newest item is among the drawn; None leaves it to chance.
        generator: source of randomness, on the device of ``item_ids``.

    Returns:
        positions (m, b, k) int64 and valid (m, b, k) bool, k = ceil(mask_ratio * l); a row's first L entries are valid.

    Raises:
        EnsembleKDError: an argument that cannot be used.

    Examples:
        >>> ids = torch.tensor([[0, 0, 7, 8, 9]])
        >>> positions, valid = mask_positions(ids, views=2, mask_ratio=0.5, newest=1.0)
        >>> valid.sum(-1).tolist(), positions[..., 0].tolist()
        ([[2], [2]], [[4], [4]])
    """
    where = "mask_positions"
    tensor(where, "item_ids", item_ids, "b l", "whole")
    views, mask_ratio = whole(where, "views", views, least=1), ratio(where, "mask_ratio", mask_ratio, above_zero=True)
    newest = None if newest is None else ratio(where, "newest", newest)
    check_generator(where, generator)
    b, length = item_ids.shape
    real = item_ids != 0
    count = mask_counts(real.sum(dim=1), mask_ratio)
    k = int(mask_counts(torch.tensor(length), mask_ratio))
    score = torch.rand(views, b, length, generator=generator, device=item_ids.device)
    if newest is not None:
        drawn = torch.rand(views, b, generator=generator, device=item_ids.device) < newest
        score[..., -1] = torch.where(drawn, 2.0, -1.0)  # before, or after, every other real position
    score = score.masked_fill(~real, -2.0)
    positions = score.topk(k, dim=-1).indices
    valid = torch.arange(k, device=item_ids.device) < count[:, None]
    return positions, valid.expand(views, b, k)


def mask_counts(items: Tensor, mask_ratio: float) -> Tensor:
    """Return how many of so many items are masked.

    Examples:
        >>> mask_counts(torch.tensor([0, 1, 5, 100]), 0.07).tolist()
        [0, 1, 1, 7]
    """
    # In whole billionths, since not every device has float64. One is taken off, so that 0.07 * 100 = 7.000000000000001
    # asks for 7 positions and not for 8. At least one, however small the ratio; none in a row without items.
    wanted = items * (round(mask_ratio * _BILLION) - 1)
    return -(-wanted).div(_BILLION, rounding_mode="floor").clamp(max=-1).maximum(-items)


def masked(item_ids: Tensor, positions: Tensor, valid: Tensor, mask_token: int) -> Tensor:
    """Return copies of the sequences, (m, b, l), with the valid positions replaced by the mask token."""
    views = item_ids.expand(positions.shape[0], -1, -1)
    new = torch.where(valid, mask_token, views.gather(2, positions))
    return views.scatter(2, positions, new)


def selects(batch: Tensor) -> bool:
    """Return True if the rows that count are to be selected: an accelerator would report their number to the host."""
    return batch.device.type == "cpu"


def flat_targets(
    positions: Tensor, valid: Tensor, items: Tensor, length: int, number: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return positions (m, b, k) as indices into the flattened (m b l), the items there, and which of them count.

    ``number`` is how many count, if the host knows it: then all that are returned do.
    """
    m, b, _ = positions.shape
    row = torch.arange(m * b, device=positions.device).view(m, b, 1)
    targets = items.expand(m, -1, -1).gather(2, positions)
    flat, keep, targets = (row * length + positions).flatten(), valid.flatten(), targets.flatten()
    if selects(flat):
        return flat[keep], targets[keep], None
    if number is not None:
        kept = places(keep, number)
        return flat[kept], targets[kept], None
    return flat, targets.clamp(min=1), keep


def places(keep: Tensor, number: int) -> Tensor:
    """Return the indices at which ``keep`` (t,) is True, of which there are ``number``. No accelerator waits for it.

    Examples:
        >>> places(torch.tensor([True, False, True]), 2)
        tensor([0, 2])
    """
    into = (keep.cumsum(0) - 1).masked_fill(~keep, number)  # the others into a last place, which is dropped
    found = into.new_zeros(number + 1).scatter_(0, into, torch.arange(len(keep), device=keep.device))
    return found[:number]


def newest_columns(ids: Tensor, max_len: int | None) -> Tensor:
    """Return the newest ``max_len`` columns of (b, l)."""
    return ids if max_len is None or ids.shape[1] <= max_len else ids[:, -max_len:]
