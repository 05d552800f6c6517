"""Cross-entropy of students and KD from a fixed teacher of any width: no logits are stored.

The teacher's logits stand behind the students' in each tile, so its softmax z_T is computed once for all of them. With
the teacher cut off, the gradient of KL(z_T ‖ z_i) in the logits of student i is (z_i − z_T) / τ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import flag, number, tensor
from ensemble_kd.losses.autograd import tiled_losses
from ensemble_kd.losses.formula import FixedTeachers, Networks, add_softmax
from ensemble_kd.losses.items import ItemLosses


def distillation_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    queries: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    targets: Tensor,
    *,
    valid: Tensor | None = None,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    product_dtype: torch.dtype | None = None,
    tile_rows: int | None = None,
    compiled: bool | None = None,
) -> ItemLosses:
    """Return the cross-entropy of n students, and KD from their one teacher with logits queries · keysᵀ + key_bias.

    This reads Eqs. 16–18 with two members, of which one does not learn. A student's KD is KL(teacher ‖ student) +
    KL(student ‖ teacher). Only the first part has a gradient in the student, since teachers are cut off.

    Args:
        hidden: (n, t, d) the students' hidden states at the target positions.
        weight: (n, v, d) their item classifiers.
        bias: (n, v).
        queries: (t, e) the teacher's states. For an ensemble: those of its n members side by side, divided by n.
        keys: (v, e) the teacher's classifier.
        key_bias: (v,).
        targets: (t,) int64 class indices in [0, v).
        valid: as in ``item_losses``, and so for all that follow.
        ce_weight: weight of the cross-entropy in ``total``.
        kd_weight: weight of KD in ``total``.
        temperature: τ of KD.
        scale_by_temperature_squared: multiply KD by τ².
        product_dtype: precision of the matrix products.
        tile_rows: target rows per tile.
        compiled: True, False or None, for the pointwise part.

    Returns:
        ``total``, a sum over the students that can be differentiated once in ``hidden``, ``weight`` and ``bias``;
        ``cross_entropy`` (n,) and ``kd`` (), the sum over the students, both detached.

    Raises:
        EnsembleKDError: what ``item_losses`` refuses, or a teacher that does not fit the students.

    Examples:
        >>> hidden, weight, bias = torch.zeros(1, 3, 4, requires_grad=True), torch.zeros(1, 5, 4), torch.zeros(1, 5)
        >>> teacher = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(5)
        >>> found = distillation_losses(hidden, weight, bias, *teacher, torch.tensor([0, 4, 2]))
        >>> found.cross_entropy, float(found.kd)
        (tensor([1.6094]), 0.0)
    """
    where = "distillation_losses"
    temperature = number(where, "temperature", temperature, above=0)
    flag(where, "scale_by_temperature_squared", scale_by_temperature_squared)
    ce_weight, kd_weight = number(where, "ce_weight", ce_weight), number(where, "kd_weight", kd_weight)
    _check_teacher(where, hidden, weight, queries, keys, key_bias)
    factor = temperature**2 if scale_by_temperature_squared else 1.0
    total, cross_entropy, kd = tiled_losses(
        where,
        Taught(temperature),
        (ce_weight, kd_weight * factor),
        Networks(hidden, weight, bias),
        targets,
        teachers=Networks(queries[None], keys[None], key_bias[None]),
        valid=valid,
        product_dtype=product_dtype,
        tile_rows=tile_rows,
        compiled=compiled,
    )
    return ItemLosses(total, cross_entropy, kd * factor)


def _check_teacher(where: str, hidden: Tensor, weight: Tensor, queries: Tensor, keys: Tensor, key_bias: Tensor) -> None:
    tensors = {"hidden": hidden, "weight": weight, "queries": queries, "keys": keys, "key_bias": key_bias}
    for name, given in tensors.items():
        tensor(where, name, given)
    if hidden.ndim != 3 or weight.ndim != 3:
        return  # they are refused with the students' other arguments
    t, v, e = hidden.shape[1], weight.shape[1], queries.shape[-1] if queries.ndim else 0
    for name, given, shape in (("queries", queries, (t, e)), ("keys", keys, (v, e)), ("key_bias", key_bias, (v,))):
        if tuple(given.shape) != shape or not given.is_floating_point():
            fix = "Give the teacher a row for each of the students' targets, and a class for each of their items."
            got = f"{given.dtype} {tuple(given.shape)}"
            raise EnsembleKDError(where, f"{name} of floating point {shape}", got, fix)


@dataclass(frozen=True)
class Taught(FixedTeachers):
    """The formula of students and their one teacher, the last plane: cross-entropy of each student, and KD."""

    def parts(self, n: int) -> list[tuple[range, Taught]]:
        """Return all students: the teacher's softmax is computed once for them."""
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
        """Return maxima (n + 1, rows), log-normalisers at temperatures 1 (n, rows) and τ (n + 1, rows), KD (rows,)."""
        assert bias is not None
        *students, teacher = range(len(logits))
        kd, maxima = torch.zeros_like(counts), []
        normalisers: list[Tensor] = []
        tempered: list[Tensor] = []
        p: list[Tensor] = []
        z: list[Tensor] = []
        taught = logits[teacher] + bias[teacher]
        top = taught.amax(1, keepdim=True)
        taught.sub_(top).mul_(1 / self.temperature)
        add_softmax(taught, z, tempered)
        for i in students:
            x = logits[i] + bias[i]
            maxima.append(x.amax(1, keepdim=True))
            add_softmax(x.sub_(maxima[i]), p, normalisers)
            if self.temperature == 1:
                z.append(p[i])
                tempered.append(normalisers[i])
            else:
                add_softmax(x.mul_(1 / self.temperature), z, tempered)
            pull = z[-1] - z[0]
            kd = kd + x.sub_(taught).mul_(pull).sum(1)  # Σ_v pull = 0: shifts and normalisers cancel
            if with_grad:
                grad = p[i].mul_(weights[0] * counts[:, None]).addcmul_(pull, weights[1] * counts[:, None])
                logits[i].copy_(grad)
        columns = ([*maxima, top], normalisers, [*tempered[1:], tempered[0]])
        return (*(torch.cat(column, 1).T for column in columns), kd)

    def at_target(
        self, picked: Tensor, statistics: tuple[Tensor, ...], counts: Tensor, weights: Tensor, with_grad: bool
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return cross-entropy (n, rows) and KD (rows,), and the gradient in the target's logit of each student."""
        maxima, normalisers, tempered, kd = statistics
        shifted = picked - maxima
        log_p = shifted[:-1] - normalisers
        if not with_grad:
            return (-log_p, kd), None
        z = (shifted / self.temperature - tempered).exp()
        grad = weights[0] * (log_p.exp() - 1) + weights[1] * (z[:-1] - z[-1])
        return (-log_p, kd), grad * counts
