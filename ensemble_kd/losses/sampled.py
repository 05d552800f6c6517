"""Sampled softmax: the item losses over some candidates in place of the whole catalogue.

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

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ensemble_kd.losses.items import ItemLosses, Spread, item_losses

_NOWHERE = -1e9  # the logarithm of a count of 0, such that its products with 0 and with 1 / τ are still numbers


class Candidates(NamedTuple):
    """The items that a step's losses are computed over, the same for all targets and members."""

    items: Tensor  # (c,) in 1..v
    counts: Tensor  # (c,) int64, 1 / Q: how many items each counts for, v together; 0 for one that only fills up
    targets: Tensor  # (t,) where each target stands among the candidates


def draw_candidates(
    targets: Tensor, *, num_items: int, negatives: int, generator: torch.Generator | None = None
) -> Candidates:
    """All targets, and up to ``negatives`` of the other items, each as likely as any of its stratum.

    Takes time in proportion to t + negatives, whatever v is, and does not make an accelerator wait.

    Args:
        targets: (t,) int64 in 1..v.
        num_items: v.
        negatives: how many; where fewer items are left, all of them.
        generator: source of randomness, on the device of ``targets``.

    Examples:
        >>> candidates = draw_candidates(torch.tensor([7, 3, 7]), num_items=10, negatives=4)
        >>> candidates.items[:2].tolist(), candidates.targets.tolist(), candidates.counts.tolist()
        ([3, 7], [1, 0, 1], [1, 1, 2, 2, 2, 2])
        >>> draw_candidates(torch.tensor([7, 3, 7]), num_items=10, negatives=10).items.tolist()
        [3, 7, 1, 2, 4, 5, 6, 8, 9, 10]
    """
    if targets.device.type == "cpu":
        certain = targets.unique()
        drawn = min(negatives, num_items - len(certain))
    else:  # an accelerator would have to report how many there are
        certain = targets.sort().values
        drawn = negatives
    return _candidates(targets, certain, num_items=num_items, drawn=drawn, generator=generator)


def _candidates(
    targets: Tensor, certain: Tensor, *, num_items: int, drawn: int, generator: torch.Generator | None
) -> Candidates:
    """``certain``: the targets in order; where one stands there again, it counts for no item."""
    device = targets.device
    is_new = torch.ones_like(certain, dtype=torch.bool)
    is_new[1:] = certain[1:] != certain[:-1]
    new = is_new.cumsum(0)
    others = num_items - is_new.sum()
    edges = torch.arange(drawn + 1, device=device) * others // max(drawn, 1)
    sizes = edges.diff()
    within = torch.randint(1 << 62, (drawn,), generator=generator, device=device) % sizes.clamp(min=1)
    ranks = (edges[:-1] + within).minimum(others - 1)  # among the other items, from 0
    # Below the other item of rank r stand as many targets as have no more than r other items below them.
    below = torch.searchsorted(certain - new, ranks, right=True)
    items = ranks + 1 + torch.nn.functional.pad(new, (1, 0))[below]
    return Candidates(
        torch.cat([certain, items.clamp(min=1)]),
        torch.cat([is_new.long(), sizes]),
        torch.searchsorted(certain, targets),
    )


def sampled_item_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    candidates: Candidates,
    *,
    valid: Tensor | None = None,
    ce_weight: float = 1.0,
    kd_weight: float = 0.0,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    product_dtype: torch.dtype | None = None,
    spread: Spread | None = None,
) -> ItemLosses:
    """``item_losses`` over candidates that count for 1 / Q items each.

    KD compares softmaxes at temperature τ over the same candidates, counted the same: logits / τ − log Q.

    Args:
        hidden: (n, t, d) hidden states at the target positions.
        weight: (n, c, d) the candidates' rows of the item classifiers.
        bias: (n, c), likewise.
        candidates: from ``draw_candidates``.
        valid: (t,) bool, see ``item_losses``, as for all that follow.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of KD.
        temperature: τ of KD.
        scale_by_temperature_squared: multiply KD by τ².
        product_dtype: of the matrix products.
        spread: where other processes hold members.

    Examples:
        >>> hidden, weight, bias = torch.zeros(2, 3, 4), torch.zeros(2, 6, 4), torch.zeros(2, 6)
        >>> candidates = draw_candidates(torch.tensor([7, 3, 7]), num_items=10, negatives=4)
        >>> sampled_item_losses(hidden, weight, bias, candidates).cross_entropy  # uniform over all 10 items
        tensor([2.3026, 2.3026])
    """
    log_counts = candidates.counts.to(bias.dtype).log().clamp(min=_NOWHERE)
    # Eager tiles: the number of candidates changes from step to step, and each would be compiled anew.
    losses = partial(
        item_losses,
        hidden,
        weight,
        targets=candidates.targets,
        valid=valid,
        temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
        product_dtype=product_dtype,
        spread=spread,
        compiled=False,
    )
    alone = len(hidden) == 1 and spread is None
    if kd_weight == 0 or temperature == 1 or alone:  # one correction, so that one pass serves both losses
        return losses(bias + log_counts, ce_weight=ce_weight, kd_weight=kd_weight)
    main = losses(bias + log_counts, ce_weight=ce_weight, kd_weight=0.0)
    kd = losses(bias + temperature * log_counts, ce_weight=0.0, kd_weight=kd_weight)
    return ItemLosses(main.total + kd.total, main.cross_entropy, kd.kd)
