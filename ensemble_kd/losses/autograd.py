"""One differentiable call: check the arguments, walk over the tiles, hand the gradients over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import tensor, whole
from ensemble_kd.losses.formula import Formula, Networks, Plan, Weight
from ensemble_kd.losses.tiles import walk


def tiled_losses(
    where: str,
    formula: Formula,
    weights: tuple[Weight, ...],
    learners: Networks,
    targets: Tensor,
    *,
    teachers: Networks | None = None,
    further: Tensor | None = None,
    valid: Tensor | None,
    product_dtype: torch.dtype | None,
    tile_rows: int | None,
    compiled: bool | None,
) -> tuple[Tensor, ...]:
    """Return the weighted sum of a formula's losses, differentiable in the learners, and then each loss, detached.

    Losses are means over the targets that count: (n,) for a loss per network, () for a loss between networks.

    Args:
        where: the public call, for messages.
        formula: what to compute from a tile of logits.
        weights: one weight per loss of the formula.
        learners: the n networks that learn.
        targets: (t,) int64 class indices in [0, v).
        teachers: networks that do not learn, with states at the same targets and the same items.
        further: (v,) what a formula takes besides biases, as their last row; or None.
        valid: (t,) bool, False where a target counts nowhere, or None.
        product_dtype: precision of the matrix products. None: that of autocast if it is on, else that of the states.
        tile_rows: target rows per tile. None: as many as the cache takes.
        compiled: as in ``compiled_tile``.
    """
    check_networks(where, learners)
    _check_targets(where, learners.hidden.shape[1], learners.weight.shape[1], targets, valid)
    if tile_rows is not None:
        tile_rows = whole(where, "tile_rows", tile_rows, least=1)
    device = learners.hidden.device.type
    if product_dtype is None:
        autocast = torch.is_autocast_enabled(device)
        product_dtype = torch.get_autocast_dtype(device) if autocast else learners.hidden.dtype
    with_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learners)
    plan = Plan(where, formula, weights, with_grad, product_dtype, tile_rows, compiled)
    with torch.autocast(device, enabled=False):  # the products' precision is fixed by now
        return _Tiled.apply(*learners, plan, targets, valid, further, *(teachers or ()))  # type: ignore[no-any-return, no-untyped-call]


def check_networks(where: str, networks: Networks, classes: str = "v") -> None:
    """Check shapes and types; ``classes`` is the letter of the classes' axis."""
    hidden, weight, bias = networks
    for name, given in zip(networks._fields, networks, strict=True):
        if given is not None or name != "bias":
            tensor(where, name, given)
    if hidden.ndim != 3 or hidden.shape[1] == 0:
        fix = "Pass the hidden states at the target positions of all members; a batch needs at least one target."
        raise EnsembleKDError(where, "hidden (n, t, d) with t > 0", tuple(hidden.shape), fix)
    n, _, d = hidden.shape
    if weight.ndim != 3 or (weight.shape[0], weight.shape[2]) != (n, d):
        expected, got = f"weight ({n}, {classes}, {d})", tuple(weight.shape)
        raise EnsembleKDError(where, expected, got, "Stack one classifier per member.")
    size = (n, weight.shape[1])
    if bias is not None and bias.shape != size:
        raise EnsembleKDError(where, f"bias {size}", tuple(bias.shape), "Stack one bias per member, or pass None.")
    for name, given in zip(networks._fields, networks, strict=True):
        if given is not None and not given.is_floating_point():
            raise EnsembleKDError(where, f"{name} of floating point", given.dtype, "Convert it with .float().")


def _check_targets(where: str, t: int, v: int, targets: Tensor, valid: Tensor | None) -> None:
    tensor(where, "targets", targets)
    if valid is not None:
        tensor(where, "valid", valid)
    if targets.shape != (t,) or targets.dtype != torch.int64:
        got = f"{targets.dtype} {tuple(targets.shape)}"
        raise EnsembleKDError(where, f"targets int64 ({t},)", got, "Pass one class index per row of hidden.")
    if valid is not None and (valid.shape != (t,) or valid.dtype != torch.bool):
        got = f"{valid.dtype} {tuple(valid.shape)}"
        raise EnsembleKDError(where, f"valid bool ({t},)", got, "Pass one flag per target, or None.")
    if targets.device.type == "cpu":  # an accelerator would have to wait
        counted = targets if valid is None else targets[valid]
        if counted.numel() and not (int(counted.min()) >= 0 and int(counted.max()) < v):
            got = f"{int(counted.min())}..{int(counted.max())}"
            raise EnsembleKDError(where, f"targets in [0, {v})", got, "Item i of 1..v is class i - 1.")


class _Tiled(torch.autograd.Function):
    """The losses, with gradients computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: Plan,
        targets: Tensor,
        valid: Tensor | None,
        further: Tensor | None,
        *teachers: Any,
    ) -> tuple[Tensor, ...]:
        """Walk over the tiles."""
        needs = ctx.needs_input_grad[:3] if plan.with_grad else (False, False, False)
        ctx.plan, learners = plan, Networks(hidden, weight, bias)
        total, means, grads = walk(plan, learners, _networks(teachers), targets, valid, further, needs)
        ctx.mark_non_differentiable(*means)
        if plan.with_grad:
            ctx.save_for_backward(hidden, weight, bias, targets, valid, further, *teachers)
            ctx.grads = grads
        return total, *means

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Scale the gradients in place and hand them over. A second backward pass walks again."""
        refuse_create_graph(ctx.plan.where)
        hidden, weight, bias, targets, valid, further, *teachers = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # only with retain_graph=True: the first backward gave its gradients away
            with torch.autocast(hidden.device.type, enabled=False):
                learners, needs = Networks(hidden, weight, bias), ctx.needs_input_grad[:3]
                grads = walk(ctx.plan, learners, _networks(teachers), targets, valid, further, needs)[-1]
        if upstream.device.type != "cpu" or upstream != 1:  # elsewhere the comparison would wait for the device
            for grad in grads:
                if grad is not None:
                    grad.mul_(upstream)
        return *grads, None, None, None, None, *[None] * len(teachers)


def _networks(factors: Sequence[Any]) -> Networks | None:
    return Networks(*factors) if factors else None


def refuse_create_graph(where: str) -> None:
    """Refuse a backward pass with ``create_graph``: the second derivatives would silently be taken for zero."""
    if torch.is_grad_enabled():
        fix = "Leave create_graph off, or use the losses of ensemble_kd.functional, which differentiate twice."
        raise EnsembleKDError(where, "one backward pass", "create_graph=True", fix)
