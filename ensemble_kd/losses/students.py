"""Cross-entropy of students with KD from a fixed teacher of any width, by tiles: no logits are held.

A tile is some target rows × the whole catalogue × the students and, last, their teacher, whose softmax z_T is computed
once for all of them. In the logits of student i the gradient of KL(z_T ‖ z_i), the teacher cut off, is (z_i − z_T) / τ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses.items import ItemLosses
from ensemble_kd.losses.tiles import (
    Plan,
    add_softmax,
    rows_per_chunk,
    rows_per_tile,
    tile_function,
)

_WHERE = "distillation_losses"


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
    """Cross-entropy and KD of n students, whose one teacher's logits are queries · keysᵀ + key_bias.

    The reading of Eqs. 16–18 with two members, of which one does not learn: a student's KD is KL(teacher ‖ student) +
    KL(student ‖ teacher), whose first part alone has a gradient in the student, since teachers are cut off.

    Args:
        hidden: (n, t, d) the students' states at the target positions.
        weight: (n, v, d) their classifiers.
        bias: (n, v).
        queries: (t, e) the teacher's states; an ensemble's are its members', side by side, over their number.
        keys: (v, e) the teacher's classifier.
        key_bias: (v,).
        targets: (t,) int64 classes in [0, v).
        valid: (t,) bool, False where a target is padding and counts nowhere.
        ce_weight: of the cross-entropy in ``total``.
        kd_weight: of KD in ``total``.
        temperature: of KD.
        scale_by_temperature_squared: multiply KD by τ².
        product_dtype: of the matrix products, see ``item_losses``.
        tile_rows: target rows in a tile; None: as many as the cache takes.
        compiled: compile the pointwise part, see ``item_losses``.

    Returns:
        ``total`` (), summed over the students and differentiable once in hidden, weight and bias; ``cross_entropy``
        (n,), and ``kd`` (), the students' sum; both are detached means over the targets that count.

    Raises:
        EnsembleKDError: shapes that do not fit together, or a backward with ``create_graph``.

    Examples:
        >>> hidden, weight, bias = torch.zeros(1, 3, 4, requires_grad=True), torch.zeros(1, 5, 4), torch.zeros(1, 5)
        >>> teacher = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(5)
        >>> found = distillation_losses(hidden, weight, bias, *teacher, torch.tensor([0, 4, 2]))
        >>> found.cross_entropy, float(found.kd)
        (tensor([1.6094]), 0.0)
    """
    (n, t, d), v = hidden.shape, weight.shape[1]
    for name, tensor, shape in (
        ("weight", weight, (n, v, d)),
        ("bias", bias, (n, v)),
        ("queries", queries, (t, queries.shape[-1])),
        ("keys", keys, (v, queries.shape[-1])),
        ("key_bias", key_bias, (v,)),
        ("targets", targets, (t,)),
    ):
        if tuple(tensor.shape) != shape or not t:
            fix = "Give students and teacher a row for each of the same targets, a class for each of the same items."
            raise EnsembleKDError(_WHERE, f"{name} {shape} with t > 0", tuple(tensor.shape), fix)
    device = hidden.device.type
    if product_dtype is None:
        product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    factor = temperature**2 if scale_by_temperature_squared else 1.0
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
    plan = Plan(ce_weight, kd_weight * factor, temperature, True, with_grad, product_dtype, tile_rows, compiled)
    with torch.autocast(device, enabled=False):
        total, cross_entropy, kd = _Distillation.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, queries, keys, key_bias, targets, valid, plan
        )
    return ItemLosses(total, cross_entropy, kd * factor)


class _Distillation(torch.autograd.Function):
    """The losses, with gradients computed on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Walk over the tiles."""
        total, cross_entropy, kd, grads = _walk(hidden, weight, bias, *rest)
        ctx.mark_non_differentiable(cross_entropy, kd)
        ctx.save_for_backward(*grads)
        return total, cross_entropy, kd

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Scale the gradients."""
        if torch.is_grad_enabled():  # create_graph=True: the second derivatives would silently be taken for zero
            fix = "Leave create_graph off."
            raise EnsembleKDError(_WHERE, "one backward pass", "create_graph=True", fix)
        return *(grad * upstream for grad in ctx.saved_tensors), *[None] * 6


def _walk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    queries: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    targets: Tensor,
    valid: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Losses and gradients, tile by tile."""
    (n, t, _), v, device, product = hidden.shape, weight.shape[1], hidden.device, plan.product_dtype
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if valid is None:
        counts = hidden.new_full((t,), 1 / t, dtype=dtype)
    else:
        counts = valid.to(dtype) / valid.sum().clamp(min=1)
        # A padded row may hold anything, NaN included: 0 · NaN would reach the weights.
        hidden, queries = (x.masked_fill(~valid[:, None], 0) for x in (hidden, queries))
        targets = targets.masked_fill(~valid, 0)
    inputs = [*hidden.detach().to(product), queries.detach().to(product)]
    classifiers = [*weight.detach().to(product), keys.detach().to(product)]
    offsets = torch.cat([bias.detach(), key_bias.detach()[None]]).to(dtype)
    rows = rows_per_tile(plan, t, (n + 1) * v * inputs[0].element_size(), device)
    key = (n + 1, v, dtype, product, False, device.type)
    function = tile_function(plan, (n + 1) * t * v, key, students_tile)
    chunk = rows_per_chunk(rows, v, device, eager=function is students_tile)
    tile = torch.empty((n + 1) * rows * v, dtype=product, device=device)
    # Filled on the device: copying them there would wait for it.
    scalars = (plan.ce_weight, plan.kd_weight / plan.temperature)
    weights = torch.stack([torch.full((), scalar, dtype=dtype, device=device) for scalar in scalars])
    losses = torch.empty(n, t, dtype=dtype, device=device)
    kd_rows = torch.zeros(t, dtype=dtype, device=device)
    d_hidden, d_weight = torch.zeros_like(hidden, dtype=dtype), torch.zeros_like(weight, dtype=dtype)
    d_bias = torch.zeros_like(bias, dtype=dtype)
    everyone = torch.arange(n + 1, device=device)[:, None]
    for start in range(0, t, rows):
        stop = min(start + rows, t)
        logits = tile[: (n + 1) * (stop - start) * v].view(n + 1, stop - start, v)
        for i in range(n + 1):
            torch.mm(inputs[i][start:stop], classifiers[i].t(), out=logits[i])
        for low in range(start, stop, chunk):
            high = min(low + chunk, stop)
            own, at = logits[:, low - start : high - start], targets[low:high]
            picked = own[everyone, torch.arange(high - low, device=device), at].to(dtype) + offsets[:, at]
            maxima, normalisers, tempered, kd_rows[low:high] = function(
                own, offsets, counts[low:high], weights, plan.temperature, plan.with_grad
            )
            picked -= maxima
            log_p = picked[:n] - normalisers
            losses[:, low:high] = -log_p
            if plan.with_grad:
                # The gradient at the target anew, with its − 1: taken from a float32 value, it is rounded only once.
                z = (picked / plan.temperature - tempered).exp()
                grad = weights[0] * (log_p.exp() - 1) + weights[1] * (z[:n] - z[n])
                own[everyone[:n], torch.arange(high - low, device=device), at] = (grad * counts[low:high]).to(product)
        if plan.with_grad:
            for i in range(n):
                d_hidden[i, start:stop] = logits[i] @ classifiers[i]
                d_weight[i] += logits[i].t() @ inputs[i][start:stop]
                d_bias[i] += logits[i].sum(0)
    cross_entropy, kd = losses @ counts, kd_rows @ counts
    total = plan.ce_weight * cross_entropy.sum() + plan.kd_weight * kd
    grads = (d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias.to(bias.dtype))
    return total, cross_entropy, kd, grads


def students_tile(
    logits: Tensor, bias: Tensor, counts: Tensor, weights: Tensor, temperature: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maxima (n + 1, rows), log-normalisers at temperatures 1 (n, rows) and τ (n + 1, rows), and KD (rows,) of a tile.

    With `with_grad` the students' logits become their own gradients in place, all but the "− 1" at the target.
    """
    *students, teacher = range(len(logits))
    kd, maxima = torch.zeros_like(counts), []
    normalisers: list[Tensor] = []
    tempered: list[Tensor] = []
    p: list[Tensor] = []
    z: list[Tensor] = []
    taught = logits[teacher] + bias[teacher]
    top = taught.amax(1, keepdim=True)
    taught.sub_(top).mul_(1 / temperature)
    add_softmax(taught, z, tempered)
    for i in students:
        x = logits[i] + bias[i]
        maxima.append(x.amax(1, keepdim=True))
        add_softmax(x.sub_(maxima[i]), p, normalisers)
        if temperature == 1:
            z.append(p[i])
            tempered.append(normalisers[i])
        else:
            add_softmax(x.mul_(1 / temperature), z, tempered)
        pull = z[-1] - z[0]
        kd = kd + x.sub_(taught).mul_(pull).sum(1)  # Σ_v pull = 0: shifts and normalisers cancel
        if with_grad:
            grad = p[i].mul_(weights[0] * counts[:, None]).addcmul_(pull, weights[1] * counts[:, None])
            logits[i].copy_(grad)
    columns = ([*maxima, top], normalisers, [*tempered[1:], tempered[0]])
    return (*(torch.cat(column, 1).T for column in columns), kd)  # type: ignore[return-value]
