"""Cross-entropy of all members and KD between them, from hidden states and classifiers: no logits are stored.

Two facts make the cost of KD grow with the number of members n, and not with that of their pairs (Eqs. 16–18). With z_x
the softmax of member x at temperature τ and S = Σ_x z_x,

- the gradient of Σ_{x≠y} KL(z_x‖z_y) in student y's logits, teachers cut off, is G_y / τ with G_y = n z_y − S;
- the loss itself is Σ_y ⟨G_y, logits_y⟩ / τ: the normalisers cancel because Σ_v G_y = 0, so log z is never computed.

Both stay true if a member learns from some of the others only, as long as any two teach each other or not at all: then
G_y = c z_y − T with c teachers of y, whose softmaxes add up to T. One sum of softmaxes per architecture gives every T.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import choice, flag, number, tensor
from ensemble_kd.losses.autograd import tiled_losses
from ensemble_kd.losses.formula import Networks, Tile, add_softmax
from ensemble_kd.losses.row_kernel import row_kernel

Between = Literal["all", "same", "other"]


class ItemLosses(NamedTuple):
    """The losses of a step's targets.

    Attributes:
        total: () differentiable: ``ce_weight * cross_entropy.sum() + kd_weight * kd``.
        cross_entropy: (n,) detached: each member's mean over the targets (Eq. 6).
        kd: () detached: the sum over ordered pairs of members of means over the targets (Eqs. 16–18).
    """

    total: Tensor
    cross_entropy: Tensor
    kd: Tensor


class Spread(NamedTuple):
    """An ensemble whose members are spread over processes. KD needs only sums of the members elsewhere.

    Every process has members of the same kinds in the same order.
    """

    n: int  # members in all
    sum_: Callable[[Tensor], Tensor]  # adds up a tensor over the processes, in place


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
    between: Between = "all",
    kinds: Sequence[int] | None = None,
    compute_kd: bool | None = None,
    product_dtype: torch.dtype | None = None,
    tile_rows: int | None = None,
    compiled: bool | None = None,
    spread: Spread | None = None,
) -> ItemLosses:
    """Return the cross-entropy of every member and KD between all of them, in memory that is not targets × items.

    logits = hidden · weightᵀ + bias, and total = ce_weight · Σ_n CE_n + kd_weight · Σ_{x≠y} KL(z_x ‖ z_y), both means
    over the targets that count. Source: Eqs. 5–7 and 16–18. Teachers are cut off from the gradient (Sec. 3.4.2). The
    gradients are computed in the forward pass, so they cannot be differentiated again.

    Args:
        hidden: (n, t, d) hidden states at the target positions.
        weight: (n, v, d) item classifiers; a view is fine.
        bias: (n, v), or None.
        targets: (t,) int64 class indices in [0, v).
        valid: (t,) bool, False where a target is padding and counts nowhere. With none valid all losses are 0.
        ce_weight: weight of the cross-entropy in ``total``.
        kd_weight: weight of KD in ``total``. At 0, KD is not computed.
        temperature: τ of KD.
        scale_by_temperature_squared: multiply KD by τ².
        between: the pairs of members that KD is summed over: "all", those of the "same" kind, or of "other" kinds.
        kinds: a number per member, equal for members of one architecture; needed unless ``between`` is "all".
        compute_kd: True: report KD even at weight 0. None: only if its weight is not 0.
        product_dtype: precision of the matrix products. None: that of autocast if it is on, else that of ``hidden``.
            Softmax, losses and the sum of weight gradients are always float32, or float64 for float64 input.
        tile_rows: target rows per tile. None: as many as the cache takes.
        compiled: True: compile the pointwise part. False: do not. None: compile it if that works and pays; on CUDA it
            is one kernel if Triton is installed.
        spread: given if other processes have members of the ensemble. ``total`` and ``kd`` are then the parts of these
            members, which add up over the processes. KD is not compiled, since S is added up within each tile.

    Returns:
        ``total``, ``cross_entropy`` and ``kd``.

    Raises:
        EnsembleKDError: shapes or types that do not fit, no target, a target out of range (checked on the CPU only:
            elsewhere that would wait for the device), a weight that is not finite, a temperature that is not positive,
            ``tile_rows`` below 1, or a backward pass with ``create_graph``.

    Examples:
        >>> hidden, weight = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(2, 5, 4)
        >>> losses = item_losses(hidden, weight, None, torch.tensor([0, 4, 2]), kd_weight=0.5)
        >>> losses.cross_entropy  # both members are uniform over 5 items
        tensor([1.6094, 1.6094])
        >>> float(losses.kd)
        0.0
        >>> losses.total.backward()
    """
    where = "item_losses"
    temperature = number(where, "temperature", temperature, above=0)
    flag(where, "scale_by_temperature_squared", scale_by_temperature_squared)
    ce_weight, kd_weight = number(where, "ce_weight", ce_weight), number(where, "kd_weight", kd_weight)
    tensor(where, "hidden", hidden)
    everyone = spread.n if spread is not None else len(hidden) if hidden.ndim else 0
    between, kinds = _pairs(where, between, kinds, len(hidden) if hidden.ndim else 0)
    taught = everyone > 1 and (between != "other" or len(set(kinds)) > 1)
    with_kd = taught and (kd_weight != 0 if compute_kd is None else compute_kd)
    factor = temperature**2 if scale_by_temperature_squared else 1.0
    total, cross_entropy, kd = tiled_losses(
        where,
        Peers(temperature, with_kd, spread if with_kd else None, between, kinds),
        (ce_weight, kd_weight * factor if with_kd else 0.0),
        Networks(hidden, weight, bias),
        targets,
        valid=valid,
        product_dtype=product_dtype,
        tile_rows=tile_rows,
        compiled=compiled,
    )
    return ItemLosses(total, cross_entropy, kd * factor)


def _pairs(where: str, between: Between, kinds: Sequence[int] | None, n: int) -> tuple[Between, tuple[int, ...]]:
    """Return the pairs that teach each other; kinds are left out where they make no difference."""
    choice(where, "between", between, get_args(Between))
    if between == "all":
        return between, ()
    if kinds is None or len(kinds) != n:
        got = "none" if kinds is None else f"{len(kinds)}"
        fix = "Pass kinds=[0, 0, 1], say: equal numbers for members of one architecture."
        raise EnsembleKDError(where, f"{n} kinds, one per member, for between={between!r}", got, fix)
    return ("all", ()) if between == "same" and len(set(kinds)) == 1 else (between, tuple(kinds))


@dataclass(frozen=True)
class Peers:
    """The formula of members that teach each other: cross-entropy of each, and KD over ordered pairs of them."""

    temperature: float
    with_kd: bool
    spread: Spread | None = None
    between: Between = "all"
    kinds: tuple[int, ...] = ()  # one per member; empty for "all"

    @property
    def compiles(self) -> bool:
        """False if softmaxes are added up over processes, within each tile."""
        return self.spread is None

    def kernel(self, *, product: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tile | None:
        """Return ``tile`` as one kernel on CUDA, which knows KD between all members alone."""
        if self.spread is not None or self.between != "all":
            return None
        return row_kernel(self.temperature, self.with_kd, product=product, dtype=dtype, device=device)

    def slopes(self, weights: tuple[float, ...]) -> tuple[float, ...]:
        """Return the factors of both losses' gradients."""
        ce_weight, kd_weight = weights
        return ce_weight, kd_weight / self.temperature

    def tile(
        self, logits: Tensor, bias: Tensor | None, counts: Tensor, weights: Tensor, with_grad: bool
    ) -> tuple[Tensor, ...]:
        """Return maxima, log-normalisers at temperatures 1 and τ, (n, rows) each, and KD (rows,).

        Members are walked one by one: so a compiler sees elementwise loops over (rows, v), and eager planes stay in
        the cache.
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
        if self.with_kd:
            scaled, z = rows, p
            if self.temperature != 1:
                scaled, z, tempered = [x.mul_(1 / self.temperature) for x in rows], [], []
                for x in scaled:
                    add_softmax(x, z, tempered)
            n = n if self.spread is None else self.spread.n
            for x, (c, total) in zip(z, self._teachers(z), strict=True):
                pulls.append((x if c == n else x * (c / n)).sub(total, alpha=1 / n))  # G / n
            product = pulls[0] * scaled[0]
            for i in members[1:]:
                product.addcmul_(pulls[i], scaled[i])
            kd = n * product.sum(1)
        if with_grad:
            for i in members:
                grad = p[i].mul_(weights[0] * counts[:, None])
                if self.with_kd:
                    grad.addcmul_(pulls[i], n * weights[1] * counts[:, None])
                logits[i].copy_(grad)
        return (*(torch.cat(columns, 1).T for columns in (maxima, normalisers, tempered)), kd)

    def at_target(
        self, picked: Tensor, statistics: tuple[Tensor, ...], counts: Tensor, weights: Tensor, with_grad: bool
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return cross-entropy (n, rows) and KD (rows,), and the gradient in the target's logit."""
        maxima, normalisers, tempered, kd = statistics
        shifted = picked - maxima
        log_p = shifted - normalisers
        if not with_grad:
            return (-log_p, kd), None
        grad = weights[0] * counts * (log_p.exp() - 1)
        if self.with_kd:
            z = (shifted / self.temperature - tempered).exp()
            pulls = [c * x - total for x, (c, total) in zip(z, self._teachers(list(z)), strict=True)]
            grad += weights[1] * counts * torch.stack(pulls)
        return (-log_p, kd), grad

    def _teachers(self, z: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """Return c and T of G = c z − T for every member. For "all" they are n and S: a member may teach itself."""
        kinds = self.kinds or (0,) * len(z)
        sums: dict[int, Tensor] = {}
        for kind, x in zip(kinds, z, strict=True):
            sums[kind] = sums[kind] + x if kind in sums else x
        processes = 1
        if self.spread is not None:
            processes = self.spread.n // len(z)
            sums = dict(zip(sums, self.spread.sum_(torch.stack(list(sums.values()))), strict=True))
        counts = {kind: processes * kinds.count(kind) for kind in sums}
        if self.between == "other":
            others = {kind: [other for other in sums if other != kind] for kind in sums}
            found = {
                kind: (sum(counts[k] for k in rest), functools.reduce(torch.add, [sums[k] for k in rest]))
                for kind, rest in others.items()
            }
        else:
            found = {kind: (counts[kind], sums[kind]) for kind in sums}
        return [found[kind] for kind in kinds]
