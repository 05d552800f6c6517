"""Sampled softmax: the item losses over some candidates instead of the whole catalogue.

A candidate is drawn with the chance Q and counts for 1 / Q items: log Q is subtracted from its logit (Bengio and
Senécal 2008; Jean et al. 2015). So the sum of exponentials is unbiased for every target, given the batch, and the full
softmax is its limit. ``objectives.draw_candidates`` draws candidates with their exact counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import choice, number, tensor
from ensemble_kd.losses.items import ItemLosses, item_losses
from ensemble_kd.losses.pairs import Between, Gate, Spread
from ensemble_kd.losses.peers import Part

_NOWHERE = -1e9  # the logarithm of a count of 0, such that its products with 0 and with 1 / τ are still numbers


def sampled_item_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    counts: Tensor,
    *,
    valid: Tensor | None = None,
    spread: Spread | None = None,
    ce_weight: float = 1.0,
    kd_weight: float = 0.0,
    ambiguity_weight: float = 0.0,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    between: Between = "all",
    kinds: Sequence[int] | None = None,
    part: Part = "all",
    gate: Gate = "open",
    product_dtype: torch.dtype | None = None,
) -> ItemLosses:
    """Return ``item_losses`` over candidates that count for 1 / Q items each.

    KD compares softmaxes at temperature τ over the same candidates with the same counts: logits / τ − log Q.

    Args:
        hidden: (n, t, d) hidden states at the target positions.
        weight: (n, c, d) the candidates' rows of the item classifiers.
        bias: (n, c) the candidates' biases.
        targets: (t,) int64, the place of each target among the candidates.
        counts: (c,) int64, 1 / Q, the number of items that each candidate counts for. A candidate of 0 counts nowhere.
        valid: as in ``item_losses``, and so for all that follow.
        spread: given if other processes have members of the ensemble.
        ce_weight: weight of the cross-entropy in ``total``.
        kd_weight: weight of KD in ``total``.
        ambiguity_weight: weight of the ambiguity in ``total``.
        temperature: τ of KD.
        scale_by_temperature_squared: multiply KD by τ².
        between: the pairs of members that KD is summed over.
        kinds: a number per member, equal for members of one architecture.
        part: what is passed on: "all" of the softmax, or the probability of the "target".
        gate: "open", or "better" for teachers that know the target better.
        product_dtype: precision of the matrix products.

    Returns:
        ``total``, ``cross_entropy``, ``kd`` and ``ambiguity``.

    Raises:
        EnsembleKDError: counts that do not fit, or what ``item_losses`` refuses.

    Examples:
        >>> hidden, weight, bias = torch.zeros(2, 3, 4), torch.zeros(2, 6, 4), torch.zeros(2, 6)
        >>> targets, counts = torch.tensor([1, 0, 1]), torch.tensor([1, 1, 2, 2, 2, 2])
        >>> sampled_item_losses(hidden, weight, bias, targets, counts).cross_entropy  # uniform over all 10 items
        tensor([2.3026, 2.3026])
    """
    where = "sampled_item_losses"
    sizes: dict[str, int] = {}
    tensor(where, "hidden", hidden, "n t d", "floating", sizes)
    tensor(where, "weight", weight, "n c d", "floating", sizes)
    tensor(where, "bias", bias, "n c", "floating", sizes)
    tensor(where, "counts", counts)
    choice(where, "gate", gate, get_args(Gate))
    temperature, kd_weight = number(where, "temperature", temperature, above=0), number(where, "kd_weight", kd_weight)
    if counts.shape != weight.shape[1:2] or counts.is_floating_point() or counts.is_complex():
        expected, got = f"whole counts {tuple(weight.shape[1:2])}", f"{counts.dtype} {tuple(counts.shape)}"
        raise EnsembleKDError("sampled_item_losses", expected, got, "Pass one count per row of weight.")
    log_counts = counts.to(bias.dtype).log().clamp(min=_NOWHERE)
    # (logits + log c) / τ lacks a part of what KD compares, logits / τ + log c. It is 0 at τ = 1. Where c = 0, what is
    # added must not lift a logit that is nowhere.
    lacking = (1 - 1 / temperature) * log_counts
    lacking = lacking.clamp(max=0) if temperature < 1 else lacking
    return item_losses(
        hidden,
        weight,
        bias + log_counts,
        targets,
        valid=valid,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        ambiguity_weight=ambiguity_weight,
        temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
        between=between,
        kinds=kinds,
        part=part,
        gate=gate,
        product_dtype=product_dtype,
        spread=spread,
        kd_bias=None if temperature == 1 else lacking,
        compiled=False,  # the number of candidates changes from step to step, and each would be compiled anew
    )
