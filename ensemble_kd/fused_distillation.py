"""Cross-entropy of a student with KD from a fixed teacher of any width, by tiles: no logits are held.

It is ``fused``'s tile with two members, the student and the teacher, of which the teacher learns nothing: with the
teacher's softmax z_T and the student's z_S the gradient in the student's logits is (z_S − z_T) / τ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.fused import ItemLosses, Plan, rows_per_chunk, rows_per_tile, run_tile, tile_function

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
    """Cross-entropy and KD of one student, whose teacher's logits are queries · keysᵀ + key_bias.

    The reading of Eqs. 16–18 with N = 2 and one member that does not learn: ``kd`` is KL(teacher ‖ student) +
    KL(student ‖ teacher), whose first part alone has a gradient in the student, since teachers are cut off.

    Args:
        hidden: (t, d) the student's states at the target positions.
        weight: (v, d) its classifier.
        bias: (v,).
        queries: (t, e) the teacher's states; an ensemble's are its members', side by side, over n.
        keys: (v, e) the teacher's classifier.
        key_bias: (v,).
        targets: (t,) int64 classes in [0, v).
        valid: (t,) bool, False where a target is padding and counts nowhere.
        ce_weight: of the cross-entropy in ``total``.
        kd_weight: of KD in ``total``.
        temperature: of KD.
        scale_by_temperature_squared: multiply KD by τ².
        product_dtype: of the matrix products, see ``fused.item_losses``.
        tile_rows: target rows in a tile; None: as many as the cache takes.
        compiled: compile the pointwise part, see ``fused.item_losses``.

    Returns:
        ``total`` (), differentiable once in hidden, weight and bias; ``cross_entropy`` (2,) of student and teacher, and
        ``kd`` (), both detached means over the targets that count.

    Raises:
        EnsembleKDError: shapes that do not fit together, or a backward with ``create_graph``.

    Examples:
        >>> hidden, weight, bias = torch.zeros(3, 4, requires_grad=True), torch.zeros(5, 4), torch.zeros(5)
        >>> teacher = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(5)
        >>> found = distillation_losses(hidden, weight, bias, *teacher, torch.tensor([0, 4, 2]))
        >>> found.cross_entropy, float(found.kd)
        (tensor([1.6094, 1.6094]), 0.0)
    """
    (t, d), v = hidden.shape, len(weight)
    for name, tensor, shape in (
        ("weight", weight, (v, d)),
        ("bias", bias, (v,)),
        ("queries", queries, (t, queries.shape[-1])),
        ("keys", keys, (v, queries.shape[-1])),
        ("key_bias", key_bias, (v,)),
        ("targets", targets, (t,)),
    ):
        if tuple(tensor.shape) != shape or not t:
            fix = "Student and teacher need a row for each of the same targets, and a class for each of the same items."
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
    """Losses and gradients, tile by tile; row 0 of a tile is the student's, row 1 the teacher's."""
    (t, _), v, device, product = hidden.shape, len(weight), hidden.device, plan.product_dtype
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if valid is None:
        counts = hidden.new_full((t,), 1 / t, dtype=dtype)
    else:
        counts = valid.to(dtype) / valid.sum().clamp(min=1)
        # A padded row may hold anything, NaN included: 0 · NaN would reach the weights.
        hidden, queries = (x.masked_fill(~valid[:, None], 0) for x in (hidden, queries))
        targets = targets.masked_fill(~valid, 0)
    inputs = [x.detach().to(product) for x in (hidden, queries)]
    classifiers = [x.detach().to(product) for x in (weight, keys)]
    offsets = torch.stack([bias.detach(), key_bias.detach()]).to(dtype)
    rows = rows_per_tile(plan, t, 2 * v * inputs[0].element_size(), device)
    function = tile_function(plan, 2 * t * v, (2, v, dtype, product, False, device.type, "distillation"))
    chunk = rows_per_chunk(rows, v, device, function)
    tile = torch.empty(2 * rows * v, dtype=product, device=device)
    scalars = (plan.ce_weight, plan.kd_weight / plan.temperature)
    weights = torch.stack([torch.full((), scalar, dtype=dtype, device=device) for scalar in scalars])
    losses = torch.empty(2, t, dtype=dtype, device=device)
    kd_rows = torch.zeros(t, dtype=dtype, device=device)
    d_hidden, d_weight = torch.zeros_like(hidden, dtype=dtype), torch.zeros_like(weight, dtype=dtype)
    d_bias = torch.zeros_like(bias, dtype=dtype)
    for start in range(0, t, rows):
        stop = min(start + rows, t)
        logits = tile[: 2 * (stop - start) * v].view(2, stop - start, v)
        for i in range(2):
            torch.mm(inputs[i][start:stop], classifiers[i].t(), out=logits[i])
        for low in range(start, stop, chunk):
            high = min(low + chunk, stop)
            losses[:, low:high], kd_rows[low:high] = run_tile(
                logits[:, low - start : high - start],
                offsets,
                targets[low:high],
                counts[low:high],
                weights,
                plan,
                function,
            )
        if plan.with_grad:
            d_hidden[start:stop] = logits[0] @ classifiers[0]
            d_weight += logits[0].t() @ inputs[0][start:stop]
            d_bias += logits[0].sum(0)
    cross_entropy, kd = losses @ counts, kd_rows @ counts
    total = plan.ce_weight * cross_entropy[0] + plan.kd_weight * kd
    grads = (d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias.to(bias.dtype))
    return total, cross_entropy, kd, grads
