"""Candidates of the sampled softmax: the items that a step's losses are computed over in place of the whole catalogue.

A step's candidates are the targets of its batch, all of them, and negatives drawn from the other items. The other items
are split into as many strata of equal size as negatives are wanted, and one is drawn from each, so that

- a candidate's chance Q is known exactly: 1 for a target, 1 / (size of its stratum) for a negative;
- no target is drawn among the negatives, and nothing twice;
- with a stratum for every item the candidates are the catalogue, and the losses are the full ones.

A candidate counts for 1 / Q items: log Q is taken from its logit (Bengio and Senécal 2008; Jean et al. 2015).
The sum of exponentials is then unbiased for every target, given the batch, and the full softmax is its limit.

Where we differ from the usual: negatives are uniform, since the model knows nothing of the items' popularity and their
ids are in no order; popular items come in as the targets of the batch. Those are taken as they are and need no
correction, where one for "in-batch" negatives would have to know how frequent they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import generator as check_generator
from ensemble_kd.internal import tensor, whole


class Candidates(NamedTuple):
    """The items that a step's losses are computed over, the same for all targets and members.

    A count of 0 stands for an item that only fills up.
    """

    items: Tensor  # (c,) in 1..v
    counts: Tensor  # (c,) int64, 1 / Q: the number of items that each counts for, v together
    targets: Tensor  # (t,) the place of each target among the candidates


def sampled(
    targets: Tensor, negatives: int | None, mask_token: int, generator: torch.Generator | None
) -> Candidates | None:
    """Draw the candidates of an objective with so many negatives; None if it has none."""
    if negatives is None:
        return None
    return draw_candidates(targets, num_items=mask_token - 1, negatives=negatives, generator=generator)


def draw_candidates(
    targets: Tensor, *, num_items: int, negatives: int, generator: torch.Generator | None = None
) -> Candidates:
    """Draw candidates: all targets, and ``negatives`` of the other items, each as likely as any of its stratum.

    The time is in proportion to t + negatives, whatever v is, and an accelerator need not wait.

    Args:
        targets: (t,) int64 in 1..v.
        num_items: v.
        negatives: their number; if fewer items are left, all of them. On an accelerator one more for each target that
            stands there again: there the number of candidates must follow from the number of targets.
        generator: source of randomness, on the device of ``targets``.

    Raises:
        EnsembleKDError: an argument that cannot be used.

    Examples:
        >>> candidates = draw_candidates(torch.tensor([7, 3, 7]), num_items=10, negatives=4)
        >>> candidates.items[:2].tolist(), candidates.targets.tolist(), candidates.counts.tolist()
        ([3, 7], [1, 0, 1], [1, 1, 2, 2, 2, 2])
        >>> draw_candidates(torch.tensor([7, 3, 7]), num_items=10, negatives=10).items.tolist()
        [3, 7, 1, 2, 4, 5, 6, 8, 9, 10]
    """
    where = "draw_candidates"
    tensor(where, "targets", targets, "t", "int64")
    num_items = whole(where, "num_items", num_items, least=1)
    negatives = whole(where, "negatives", negatives, least=1)
    check_generator(where, generator)
    if targets.device.type == "cpu":
        low, high = (int(x) for x in targets.aminmax())
        if low < 1 or high > num_items:
            raise EnsembleKDError(where, f"targets in 1..{num_items} (num_items)", f"{low}..{high}", "Pass item ids.")
        certain = targets.unique()
        size = min(len(certain) + negatives, num_items)
        return _candidates(targets, certain, num_items=num_items, size=size, known=len(certain), generator=generator)
    # An accelerator would have to report how many targets differ. Room for all is kept, and filled up with negatives.
    size = min(len(targets) + negatives, num_items)
    return _candidates(targets, targets.sort().values, num_items=num_items, size=size, known=0, generator=generator)


def _candidates(
    targets: Tensor, certain: Tensor, *, num_items: int, size: int, known: int, generator: torch.Generator | None
) -> Candidates:
    """Draw ``size`` candidates.

    Args:
        targets: (t,).
        certain: the targets in order, with or without repetitions.
        num_items: v.
        size: at least the number of different targets, at most v.
        known: that number, or 0 if the host does not know it.
        generator: source of randomness.
    """
    device = targets.device
    is_new = torch.ones_like(certain, dtype=torch.bool)
    is_new[1:] = certain[1:] != certain[:-1]
    new = is_new.cumsum(0)
    different = is_new.sum()
    others, strata = num_items - different, (size - different).clamp(min=1)
    slot = torch.arange(size, device=device) - different  # below 0: a target's
    begin, end = slot.clamp(min=0) * others // strata, (slot + 1).clamp(min=0) * others // strata
    draws = torch.randint(1 << 62, (size - known,), generator=generator, device=device)
    within = torch.nn.functional.pad(draws, (known, 0)) % (end - begin).clamp(min=1)
    ranks = (begin + within).minimum(others - 1)  # among the other items, from 0
    # Below the other item of rank r stand as many targets as have no more than r other items below them.
    below = torch.searchsorted(certain - new, ranks, right=True)
    negatives = ranks + 1 + torch.nn.functional.pad(new, (1, 0))[below]
    firsts = torch.zeros_like(slot).scatter_(0, new - 1, certain)
    is_target = slot < 0
    return Candidates(
        torch.where(is_target, firsts, negatives),
        torch.where(is_target, 1, end - begin),
        new[torch.searchsorted(certain, targets)] - 1,
    )
