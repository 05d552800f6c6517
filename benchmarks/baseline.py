"""The method as the paper writes it, with nothing done for speed: what a step of the library is held against.

n separate modules, one forward a view, logits at every position, distillation pair by pair from stored logits,
contrast pair by pair. Eqs. 3-19; every term a mean over the batch, as in the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble_kd import (
    AP,
    CCL,
    ICL,
    KD,
    EnsembleKD,
)
from ensemble_kd.losses import Loss
from ensemble_kd.objectives import Draw


@dataclass(frozen=True)
class Weights:
    """The weights of Eq. 19 and the temperature; for the library as ``losses``."""

    ap: float = 1.0
    icl: float = 0.01
    ccl: float = 0.01
    kd: float = 0.001
    temperature: float = 0.3

    def losses(self) -> Loss:
        tau = self.temperature
        return self.ap * AP() + self.icl * ICL(tau) + self.ccl * CCL(tau) + self.kd * KD(tau)


class Member(nn.Module):
    """One network: an encoder, its item classifier (Eq. 5), its attribute classifier (Eq. 9)."""

    def __init__(self, encoder: nn.Module, items: nn.Linear, attributes: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.items, self.attributes = encoder, items, attributes


def members_of(model: EnsembleKD) -> list[Member]:
    """The members of an ensemble as modules of their own, with copies of its weights."""
    weight, bias = model.classifier_weights()
    heads = model.attribute_classifier
    assert heads.weight is not None
    return [
        Member(model.encoder.member(i), linear(weight[i], bias[i]), linear(heads.weight[i], heads.bias[i]))
        for i in range(len(model))
    ]


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def kl(teacher: Tensor, student: Tensor, tau: float) -> Tensor:
    """Eq. 17 for one ordered pair of logits (t, v); the teacher is cut off from the gradient."""
    z_x, z_y = F.log_softmax(teacher.detach() / tau, dim=-1), F.log_softmax(student / tau, dim=-1)
    return F.kl_div(z_y, z_x, log_target=True, reduction="sum") / len(student)


def pairwise_kd(logits: Sequence[Tensor], tau: float) -> Tensor:
    """Eq. 18: the double loop over ordered pairs of members' logits (t, v)."""
    total = logits[0].new_zeros(())
    for x, teacher in enumerate(logits):
        for y, student in enumerate(logits):
            if x != y:
                total = total + kl(teacher, student, tau)
    return total


def flattened(hidden: Tensor, real: Tensor) -> Tensor:
    """H(s): the whole sequence (b, l d), zero at padding."""
    return hidden.masked_fill(~real[..., None], 0.0).flatten(1)


def contrast_pair(anchors_x: Tensor, anchors_y: Tensor, views_y: Sequence[Tensor], tau: float) -> Tensor:
    """Eq. 14 for one ordered pair, Eq. 12 where x = y: representations (b, e), a list over views."""
    between = F.normalize(anchors_x, dim=-1) @ F.normalize(anchors_y, dim=-1).T / tau
    itself = torch.eye(len(between), dtype=torch.bool, device=between.device)
    negatives = between.masked_fill(itself, -torch.inf).logsumexp(dim=-1)
    total = between.new_zeros(())
    for view in views_y:
        total = total + (negatives - F.cosine_similarity(anchors_x, view, dim=-1) / tau).mean()
    return total


def attribute_loss(logits: Tensor, attributes: Tensor, real: Tensor) -> Tensor:
    """Eqs. 9-10: logits (b, l, a) against 0 and 1 for each attribute, at real positions; attributes (b, l, k) or -1."""
    a = logits.shape[-1]
    wanted = logits.new_zeros(*logits.shape[:2], a + 1).scatter_(2, attributes.masked_fill(attributes < 0, a), 1.0)
    return F.binary_cross_entropy_with_logits(logits[real], wanted[..., :a][real])


def loss(members: Sequence[Member], draw: Draw, attribute_table: Tensor, weights: Weights) -> Tensor:
    """Eq. 19 for one batch; ``draw`` says what is masked, so that it can be the library's own."""
    real, tau = draw.anchor != 0, weights.temperature
    labels = torch.zeros_like(draw.inputs).flatten()
    count = slice(None) if draw.valid is None else draw.valid
    labels[draw.positions[count]] = draw.targets[count]
    labels = labels.view_as(draw.inputs)

    anchors = [member.encoder(draw.anchor) for member in members]
    views = [[member.encoder(view) for view in draw.inputs] for member in members]
    total: Tensor = anchors[0].new_zeros(())
    for member, anchor in zip(members, anchors, strict=True):
        total = total + weights.ap * attribute_loss(member.attributes(anchor), attribute_table[draw.anchor], real)
    for m, wanted in enumerate(labels):
        masked = wanted != 0
        logits = [member.items(own[m])[masked] for member, own in zip(members, views, strict=True)]
        for one in logits:
            total = total + F.cross_entropy(one, wanted[masked] - 1)
        total = total + weights.kd * pairwise_kd(logits, tau)
    pooled = [flattened(anchor, real) for anchor in anchors]
    pooled_views = [[flattened(view, real) for view in own] for own in views]
    for x, anchor in enumerate(pooled):
        for y, other in enumerate(pooled):
            weight = weights.icl if x == y else weights.ccl
            total = total + weight * contrast_pair(anchor, other, pooled_views[y], tau)
    return total
