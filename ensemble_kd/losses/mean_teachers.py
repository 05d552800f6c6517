"""Cross-entropy of members, and KD from networks that are the averages of the other members over the steps before.

The averages' logits stand behind the members' in each tile. With a_x the softmax of average x at temperature τ, and c
averages that teach member y, whose softmaxes add up to T, the gradient of Σ_x KL(a_x ‖ z_y) in y's logits is
(c z_y − T) / τ. The loss is the sum of Σ_v a_x log a_x over these x, minus ⟨T, log z_y⟩. So 2 n softmaxes
give all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import flag, instance, number
from ensemble_kd.losses.autograd import check_networks, tiled_losses
from ensemble_kd.losses.formula import FixedTeachers, Networks, add_softmax
from ensemble_kd.losses.items import ItemLosses, item_losses, pairs_of
from ensemble_kd.losses.pairs import EVERYBODY, Between, Pairs


def mean_teacher_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    averages: Networks,
    targets: Tensor,
    *,
    valid: Tensor | None = None,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    between: Between = "all",
    kinds: Sequence[int] | None = None,
    product_dtype: torch.dtype | None = None,
    tile_rows: int | None = None,
    compiled: bool | None = None,
) -> ItemLosses:
    """Return the cross-entropy of n members, and KD into each from the averages of the others.

    This is ``functional.mean_teacher_distillation`` without stored logits.

    Args:
        hidden: (n, t, d) the members' hidden states at the target positions.
        weight: (n, v, d) their item classifiers.
        bias: (n, v), or None.
        averages: the same three tensors of the averaged networks, of the same shapes; they get no gradient.
        targets: (t,) int64 class indices in [0, v).
        valid: as in ``item_losses``, and so for all that follow.
        ce_weight: weight of the cross-entropy in ``total``.
        kd_weight: weight of KD in ``total``.
        temperature: τ of KD.
        scale_by_temperature_squared: multiply KD by τ².
        between: the pairs (average, member) that KD is summed over; no member learns from its own average.
        kinds: a number per member, equal for members of one architecture.
        product_dtype: precision of the matrix products.
        tile_rows: target rows per tile.
        compiled: True, False or None, for the pointwise part.

    Returns:
        ``total``, differentiable once in ``hidden``, ``weight`` and ``bias``; ``cross_entropy`` (n,) and ``kd`` (), the
        sum over ordered pairs, both detached.

    Raises:
        EnsembleKDError: what ``item_losses`` refuses, or averages of other shapes than the members.

    Examples:
        >>> hidden, weight = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(2, 5, 4)
        >>> averages = Networks(torch.ones(2, 3, 4), torch.zeros(2, 5, 4), None)
        >>> found = mean_teacher_losses(hidden, weight, None, averages, torch.tensor([0, 4, 2]))
        >>> found.cross_entropy, float(found.kd)
        (tensor([1.6094, 1.6094]), 0.0)
    """
    where = "mean_teacher_losses"
    temperature = number(where, "temperature", temperature, above=0)
    flag(where, "scale_by_temperature_squared", scale_by_temperature_squared)
    ce_weight, kd_weight = number(where, "ce_weight", ce_weight), number(where, "kd_weight", kd_weight)
    learners = Networks(hidden, weight, bias)
    instance(where, "averages", averages, Networks, "Pass Networks(hidden, weight, bias) of the averaged networks.")
    check_networks(where, learners)
    check_networks(where, averages)
    for name, own, theirs in zip(Networks._fields, learners, averages, strict=True):
        shapes = [None if x is None else tuple(x.shape) for x in (own, theirs)]
        if shapes[0] != shapes[1]:
            fix = "Pass the averages' states at the members' targets, and their classifiers of the same items."
            raise EnsembleKDError(where, f"averages with {name} {shapes[0]}", shapes[1], fix)
    between, kinds = pairs_of(where, between, kinds, len(hidden))
    factor = temperature**2 if scale_by_temperature_squared else 1.0
    more = {"valid": valid, "product_dtype": product_dtype, "tile_rows": tile_rows, "compiled": compiled}
    if len(hidden) == 1 or (between == "other" and len(set(kinds)) == 1):  # no average teaches anybody
        return item_losses(*learners, targets, ce_weight=ce_weight, **more)  # type: ignore[arg-type]
    total, cross_entropy, kd = tiled_losses(
        where,
        MeanTaught(temperature, Pairs(between, kinds)),
        (ce_weight, kd_weight * factor),
        learners,
        targets,
        teachers=averages,
        **more,  # type: ignore[arg-type]
    )
    return ItemLosses(total, cross_entropy, kd * factor)


@dataclass(frozen=True)
class MeanTaught(FixedTeachers):
    """The formula of n members and their n averages, whose planes are the last: cross-entropy of each, and KD."""

    pairs: Pairs = EVERYBODY

    def parts(self, n: int) -> list[tuple[range, MeanTaught]]:
        """Return all members: each learns from several averages."""
        return [(range(n), self)]

    def tile(
        self,
        logits: Tensor,
        bias: Tensor | None,
        picked: Tensor,
        counts: Tensor,
        weights: Tensor,
        with_grad: bool,
    ) -> tuple[Tensor, ...]:
        """Return maxima (2 n, rows), log-normalisers at temperatures 1 (n, rows) and τ (2 n, rows), KD (rows,)."""
        n, share = len(logits) // 2, counts[:, None]
        maxima: list[Tensor] = []
        a: list[Tensor] = []
        of_averages: list[Tensor] = []
        known = []  # Σ_v a log a
        for x in range(n, 2 * n):
            row = logits[x].to(counts.dtype, copy=True) if bias is None else logits[x] + bias[x]
            maxima.append(row.amax(1, keepdim=True))
            add_softmax(row.sub_(maxima[-1]).mul_(1 / self.temperature), a, of_averages)
            known.append((row.mul_(a[-1])).sum(1, keepdim=True) - of_averages[-1])
        teachers, entropies = self._others(a), self._others(known)
        p: list[Tensor] = []
        normalisers: list[Tensor] = []
        tempered: list[Tensor] = []
        kd = torch.zeros_like(share)
        for i, ((c, total), (_, knowledge)) in enumerate(zip(teachers, entropies, strict=True)):
            row = logits[i].to(counts.dtype, copy=True) if bias is None else logits[i] + bias[i]
            maxima.insert(i, row.amax(1, keepdim=True))
            add_softmax(row.sub_(maxima[i]), p, normalisers)
            if self.temperature == 1:
                z, log_sum = p[i], normalisers[i]
            else:
                of_member: tuple[list[Tensor], list[Tensor]] = [], []
                add_softmax(row.mul_(1 / self.temperature), *of_member)
                (z,), (log_sum,) = of_member
            tempered.append(log_sum)
            kd = kd + knowledge + c * log_sum - row.mul_(total).sum(1, keepdim=True)
            if with_grad:
                pull = torch.sub(c * z, total)
                logits[i].copy_(p[i].mul_(weights[0] * share).addcmul_(pull, weights[1] * share))
        columns = (maxima, normalisers, [*tempered, *of_averages])
        return (*(torch.cat(column, 1).T for column in columns), kd[:, 0])

    def at_target(
        self, picked: Tensor, statistics: tuple[Tensor, ...], counts: Tensor, weights: Tensor, with_grad: bool
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return cross-entropy (n, rows) and KD (rows,), and the gradient in the target's logit of each member."""
        maxima, normalisers, tempered, kd = statistics
        n, shifted = len(normalisers), picked - maxima
        log_p = shifted[:n] - normalisers
        if not with_grad:
            return (-log_p, kd), None
        z = (shifted / self.temperature - tempered).exp()
        pulls = [c * own - total for own, (c, total) in zip(z[:n], self._others(list(z[n:])), strict=True)]
        grad = weights[0] * (log_p.exp() - 1) + weights[1] * torch.stack(pulls)
        return (-log_p, kd), grad * counts

    def _others(self, values: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """Return for each member the number of averages that teach it, and the sum of their values."""
        if self.pairs.between == "other":
            return self.pairs.teachers(values)
        return [(c - 1, total - own) for own, (c, total) in zip(values, self.pairs.teachers(values), strict=True)]
