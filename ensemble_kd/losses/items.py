"""Item cross-entropy and N-way KD from hidden states and classifiers, without ever holding the logits.

One pass over tiles: a tile is some target rows × the whole catalogue × all members, so its softmaxes are complete, its
losses final and its gradients known at once. Two facts make that cheap (DESIGN: "N-way KD is linear in N"):

- with z_x the softmax of member x at temperature τ and S = Σ_x z_x, the gradient of Σ_{x≠y} KL(z_x‖z_y) in student y's
  logits, teachers cut off, is G_y / τ with G_y = N z_y − S;
- the loss itself is Σ_y ⟨G_y, logits_y⟩ / τ: the normalisers cancel because Σ_v G_y = 0, so no log z is materialised.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses.tiles import (
    Plan,
    Spread,
    TileFunction,
    add_softmax,
    rows_per_chunk,
    rows_per_tile,
    tile_function,
)

_WHERE = "item_losses"


class ItemLosses(NamedTuple):
    """What `item_losses` returns.

    Attributes:
        total: () differentiable: `ce_weight * cross_entropy.sum() + kd_weight * kd`.
        cross_entropy: (n,) detached: each member's mean over the targets (Eq. 6).
        kd: () detached: sum over ordered pairs of members, mean over the targets (Eqs. 16–18).
    """

    total: Tensor
    cross_entropy: Tensor
    kd: Tensor


def item_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    valid: Tensor | None = None,
    ce_weight: float = 1.0,
    kd_weight: float = 0.0,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    compute_kd: bool | None = None,
    product_dtype: torch.dtype | None = None,
    tile_rows: int | None = None,
    compiled: bool | None = None,
    spread: Spread | None = None,
) -> ItemLosses:
    """Cross-entropy of every member and KD between all of them, in memory that does not grow with targets × items.

    logits = hidden · weightᵀ + bias; `total = ce_weight · Σ_n CE_n + kd_weight · Σ_{x≠y} KL(z_x ‖ z_y)`, both means
    over the targets that count. Source: Eqs. 5–7 and 16–18; teachers are cut off from the gradient (Sec. 3.4.2). The
    gradients are computed in the forward pass; they cannot be differentiated again.

    Args:
        hidden: (n, t, d) hidden states at the target positions.
        weight: (n, v, d) item classifiers; a view is fine.
        bias: (n, v), or None.
        targets: (t,) int64 class indices in [0, v).
        valid: (t,) bool, False where a target is padding and counts nowhere. With none valid all losses are 0.
        ce_weight: weight of the cross-entropy in `total`.
        kd_weight: weight of KD in `total`. At 0, KD is not computed.
        temperature: τ of KD.
        scale_by_temperature_squared: multiply KD by τ².
        compute_kd: True: report KD even at weight 0. None: where its weight is not 0.
        product_dtype: precision of the matrix products. None: autocast's where it is on, else that of `hidden`.
            Softmax, losses and the sum of weight gradients are float32 (float64 for float64 input) in any case.
        tile_rows: target rows per tile. None: as many as the cache takes.
        compiled: True: compile the pointwise part; False: never; None: where that is possible and pays.
        spread: other processes hold members, too: ``total`` and ``kd`` are then these members' parts, and their sums
            over the processes those of all. KD is not compiled then, since S is added up within each tile.

    Returns:
        `ItemLosses`.

    Raises:
        EnsembleKDError: shapes that do not fit, no target, a target out of range (checked on the CPU only: elsewhere
            that would wait for the device), a temperature that is not positive, or a backward with `create_graph`.

    Examples:
        >>> hidden, weight = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(2, 5, 4)
        >>> losses = item_losses(hidden, weight, None, torch.tensor([0, 4, 2]), kd_weight=0.5)
        >>> losses.cross_entropy  # both members are uniform over 5 items
        tensor([1.6094, 1.6094])
        >>> float(losses.kd)
        0.0
        >>> losses.total.backward()
    """
    _check(hidden, weight, bias, targets, valid, temperature, tile_rows)
    device = hidden.device.type
    if product_dtype is None:
        product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    differentiable = (hidden, weight) if bias is None else (hidden, weight, bias)
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    factor = temperature**2 if scale_by_temperature_squared else 1.0
    with_kd = (len(hidden) if spread is None else spread.n) > 1 and (
        kd_weight != 0 if compute_kd is None else compute_kd
    )
    plan = Plan(
        ce_weight,
        kd_weight * factor if with_kd else 0.0,
        temperature,
        with_kd,
        with_grad,
        product_dtype,
        tile_rows,
        compiled,
        spread if with_kd else None,
    )
    with torch.autocast(device, enabled=False):  # the products' precision is fixed by now
        total, cross_entropy, kd = _Losses.apply(hidden, weight, bias, targets, valid, plan)  # type: ignore[no-untyped-call]
    return ItemLosses(total, cross_entropy, kd * factor)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    valid: Tensor | None,
    temperature: float,
    tile_rows: int | None,
) -> None:
    if hidden.ndim != 3 or hidden.shape[1] == 0:
        fix = "Pass the hidden states at the target positions of all members; a batch needs at least one target."
        raise EnsembleKDError(_WHERE, "hidden (n, t, d) with t > 0", tuple(hidden.shape), fix)
    n, t, d = hidden.shape
    if weight.ndim != 3 or (weight.shape[0], weight.shape[2]) != (n, d):
        raise EnsembleKDError(_WHERE, f"weight ({n}, v, {d})", tuple(weight.shape), "Stack one classifier per member.")
    v = weight.shape[1]
    if bias is not None and bias.shape != (n, v):
        raise EnsembleKDError(_WHERE, f"bias ({n}, {v})", tuple(bias.shape), "Stack one bias per member, or pass None.")
    if targets.shape != (t,) or targets.dtype != torch.int64:
        got = f"{targets.dtype} {tuple(targets.shape)}"
        raise EnsembleKDError(_WHERE, f"targets int64 ({t},)", got, "Pass one class index per row of hidden.")
    if valid is not None and (valid.shape != (t,) or valid.dtype != torch.bool):
        got = f"{valid.dtype} {tuple(valid.shape)}"
        raise EnsembleKDError(_WHERE, f"valid bool ({t},)", got, "Pass one flag per target, or None.")
    if not temperature > 0:
        raise EnsembleKDError(_WHERE, "temperature > 0", temperature, "Pass a positive temperature.")
    if tile_rows is not None and tile_rows < 1:
        raise EnsembleKDError(_WHERE, "tile_rows >= 1", tile_rows, "Pass None to let the library choose.")
    if targets.device.type == "cpu":
        counted = targets if valid is None else targets[valid]
        if counted.numel() and not (int(counted.min()) >= 0 and int(counted.max()) < v):
            got = f"{int(counted.min())}..{int(counted.max())}"
            raise EnsembleKDError(_WHERE, f"targets in [0, {v})", got, "Item i of 1..v is class i - 1.")


class _Losses(torch.autograd.Function):
    """The losses, with gradients computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        valid: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Walk over the tiles."""
        needs = ctx.needs_input_grad[:3] if plan.with_grad else (False, False, False)
        total, cross_entropy, kd, grads = _walk(hidden, weight, bias, targets, valid, plan, needs)
        ctx.mark_non_differentiable(cross_entropy, kd)
        if plan.with_grad:
            ctx.save_for_backward(hidden, weight, bias, targets, valid)
            ctx.plan, ctx.grads = plan, grads
        return total, cross_entropy, kd

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Scale the gradients in place and hand them over; a second backward walks again."""
        if torch.is_grad_enabled():  # create_graph=True: the second derivatives would silently be taken for zero
            fix = "Leave create_graph off, or use the losses of ensemble_kd.functional, which differentiate twice."
            raise EnsembleKDError(_WHERE, "one backward pass", "create_graph=True", fix)
        hidden, weight, bias, targets, valid = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # only with retain_graph=True: the first backward gave its gradients away
            with torch.autocast(hidden.device.type, enabled=False):
                grads = _walk(hidden, weight, bias, targets, valid, ctx.plan, ctx.needs_input_grad[:3])[-1]
        if upstream.device.type != "cpu" or upstream != 1:  # elsewhere the comparison would wait for the device
            for grad in grads:
                if grad is not None:
                    grad.mul_(upstream)
        return *grads, None, None, None


_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def _walk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    valid: Tensor | None,
    plan: Plan,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, _Grads]:
    """Losses and gradients, tile by tile."""
    (n, t, d), v, device = hidden.shape, weight.shape[1], hidden.device
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    product = plan.product_dtype
    if valid is None:
        counts = hidden.new_full((t,), 1 / t, dtype=dtype)
    else:
        counts = valid.to(dtype) / valid.sum().clamp(min=1)
        # A padded row may hold anything, NaN included: 0 · NaN would reach the weights.
        hidden, targets = hidden.masked_fill(~valid[:, None], 0), targets.masked_fill(~valid, 0)
    # float16 has no room for a probability over thousands of targets: its tiles carry gradients t times as large.
    gain = float(t) if product == torch.float16 else 1.0
    inputs, classifier = hidden.detach().to(product), weight.detach().to(product)
    offsets = None if bias is None else bias.detach().to(dtype)

    row_bytes = n * v * inputs.element_size()
    rows = rows_per_tile(plan, t, row_bytes, device)
    if plan.spread is None:
        function = tile_function(plan, n * t * v, (n, v, dtype, product, bias is None, device.type), eager_tile)
    else:  # not compiled: S is added up over the processes within each tile
        function = functools.partial(eager_tile, spread=plan.spread)
    chunk = rows_per_chunk(rows, v, device, eager=function is eager_tile)
    tile = torch.empty(n * rows * v, dtype=product, device=device)
    # Filled on the device: copying them there would wait for it.
    scalars = (plan.ce_weight, plan.kd_weight / plan.temperature)
    weights = torch.stack([torch.full((), scalar, dtype=dtype, device=device) for scalar in scalars])
    losses = torch.empty(n, t, dtype=dtype, device=device)
    kd_rows = torch.zeros(t, dtype=dtype, device=device)
    d_hidden = torch.empty(n, t, d, dtype=product, device=device) if needs[0] else None
    d_weight = torch.zeros(n, v, d, dtype=dtype, device=device) if needs[1] else None
    d_bias = torch.zeros(n, v, dtype=dtype, device=device) if needs[2] else None
    part = torch.empty(n, v, d, dtype=product, device=device) if needs[1] and product != dtype else None

    for start in range(0, t, rows):
        stop = min(start + rows, t)
        logits = tile[: n * (stop - start) * v].view(n, stop - start, v)
        for i in range(n):
            torch.mm(inputs[i, start:stop], classifier[i].t(), out=logits[i])
        for low in range(start, stop, chunk):
            high = min(low + chunk, stop)
            losses[:, low:high], kd_rows[low:high] = _run_tile(
                logits[:, low - start : high - start],
                offsets,
                targets[low:high],
                counts[low:high] * gain,
                weights,
                plan,
                function,
            )
        for i in range(n):
            if d_hidden is not None:
                torch.mm(logits[i], classifier[i], out=d_hidden[i, start:stop])
            if d_weight is not None and part is None:
                d_weight[i].addmm_(logits[i].t(), inputs[i, start:stop])
            elif d_weight is not None and part is not None:
                torch.mm(logits[i].t(), inputs[i, start:stop], out=part[i])
                d_weight[i] += part[i]
            if d_bias is not None:
                d_bias[i] += logits[i].sum(0)  # added up in float32, rounded once a tile like the weights' part

    cross_entropy = losses @ counts
    kd_mean = kd_rows @ counts
    total = plan.ce_weight * cross_entropy.sum() + plan.kd_weight * kd_mean
    grads = (_cast(d_hidden, hidden, gain), _cast(d_weight, weight, gain), _cast(d_bias, bias, gain))
    return total, cross_entropy, kd_mean, grads


def _cast(grad: Tensor | None, like: Tensor | None, gain: float) -> Tensor | None:
    if grad is None or like is None:
        return None
    grad = grad.to(like.dtype)
    return grad if gain == 1 else grad.div_(gain)


def eager_tile(
    logits: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    weights: Tensor,
    temperature: float,
    with_kd: bool,
    with_grad: bool,
    spread: Spread | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maxima, log-normalisers at temperatures 1 and τ (n, rows), and KD (rows,) of the tile `logits` (n, rows, v).

    With `with_grad` the logits become their own gradients in place, all but the "− 1" at the target. Members are walked
    one by one: so a compiler sees elementwise loops over (rows, v), and eager planes stay in the cache.
    """
    n, members = len(logits), range(len(logits))
    rows, maxima = [], []
    p: list[Tensor] = []
    normalisers: list[Tensor] = []
    for i in members:
        x = logits[i].to(counts.dtype, copy=True) if bias is None else logits[i] + bias[i]
        maxima.append(x.amax(1, keepdim=True))
        rows.append(x.sub_(maxima[i]))
        add_softmax(rows[i], p, normalisers)
    kd, tempered, pulls = torch.zeros_like(counts), normalisers, []
    if with_kd:
        scaled, z = rows, p
        if temperature != 1:
            scaled, z, tempered = [x.mul_(1 / temperature) for x in rows], [], []
            for x in scaled:
                add_softmax(x, z, tempered)
        total = functools.reduce(torch.add, z)
        if spread is not None:
            n, total = spread.n, spread.sum_(total.clone() if total is z[0] else total)
        pulls = [x.sub(total, alpha=1 / n) for x in z]  # G / N
        product = pulls[0] * scaled[0]
        for i in members[1:]:
            product.addcmul_(pulls[i], scaled[i])
        kd = n * product.sum(1)
    if with_grad:
        for i in members:
            grad = p[i].mul_(weights[0] * counts[:, None])
            if with_kd:
                grad.addcmul_(pulls[i], n * weights[1] * counts[:, None])
            logits[i].copy_(grad)
    return (*(torch.cat(columns, 1).T for columns in (maxima, normalisers, tempered)), kd)  # type: ignore[return-value]


def _run_tile(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    counts: Tensor,
    weights: Tensor,
    plan: Plan,
    tile: TileFunction,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (n, rows) and KD (rows,) of a tile; its logits become their gradients in place."""
    n, device = len(logits), logits.device
    at_target = (torch.arange(n, device=device)[:, None], torch.arange(len(targets), device=device), targets)
    picked = logits[at_target].to(counts.dtype)
    if bias is not None:
        picked += bias[:, targets]
    maxima, normalisers, tempered, kd = tile(
        logits, bias, counts, weights, plan.temperature, plan.with_kd, plan.with_grad
    )
    picked -= maxima
    log_p = picked - normalisers
    if plan.with_grad:
        # The gradient at the target anew, with its − 1: taken from a float32 value, it is rounded only once.
        grad = weights[0] * counts * (log_p.exp() - 1)
        if plan.with_kd:
            z = (picked / plan.temperature - tempered).exp()
            n, total = (n, z.sum(0)) if plan.spread is None else (plan.spread.n, plan.spread.sum_(z.sum(0)))
            grad += weights[1] * counts * (n * z - total)
        logits[at_target] = grad.to(logits.dtype)
    return -log_p, kd
