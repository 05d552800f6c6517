"""The formula of members that teach each other: cross-entropy of each, and what passes between them.

Two facts make the cost of KD grow with the number of members n, and not with that of their pairs (Eqs. 16–18). With z_x
the softmax of member x at temperature τ and S = Σ_x z_x,

- the gradient of Σ_{x≠y} KL(z_x‖z_y) in student y's logits, teachers cut off, is G_y / τ with G_y = n z_y − S;
- the loss itself is Σ_y ⟨G_y, logits_y⟩ / τ: the normalisers cancel because Σ_v G_y = 0, so log z is never computed.

Both stay true if a member learns from some of the others only, as long as any two teach each other or not at all: then
G_y = c z_y − T with c teachers of y, whose softmaxes add up to T. One sum of softmaxes per architecture gives every T.

The ambiguity Σ_a KL(p_G‖p_a), with p_G the softmax of the members' mean logits z̄, is Σ_a lse(z_a) − n lse(z̄). So it
takes one more softmax, and its gradient in z_a is p_a − p_G, the same if p_G is cut off from it or not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ensemble_kd.losses.formula import Tile, add_softmax
from ensemble_kd.losses.row_kernel import row_kernel

Between = Literal["all", "same", "other"]


class Spread(NamedTuple):
    """An ensemble whose members are spread over processes. KD needs only sums of the members elsewhere.

    Every process has members of the same kinds in the same order.
    """

    n: int  # members in all
    sum_: Callable[[Tensor], Tensor]  # adds up a tensor over the processes, in place


@dataclass(frozen=True)
class Peers:
    """The formula of members that teach each other: cross-entropy of each, and KD over ordered pairs of them."""

    temperature: float
    with_kd: bool
    spread: Spread | None = None
    between: Between = "all"
    kinds: tuple[int, ...] = ()  # one per member; empty for "all"
    with_ambiguity: bool = False

    @property
    def compiles(self) -> bool:
        """False if softmaxes are added up over processes, within each tile."""
        return self.spread is None

    def kernel(self, *, product: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tile | None:
        """Return ``tile`` as one kernel on CUDA, which knows KD between all members alone."""
        if self.spread is not None or self.between != "all" or self.with_ambiguity:
            return None
        return row_kernel(self.temperature, self.with_kd, product=product, dtype=dtype, device=device)

    def slopes(self, weights: tuple[float, ...]) -> tuple[float, ...]:
        """Return the factors of the losses' gradients."""
        ce_weight, kd_weight, *more = weights
        return ce_weight, kd_weight / self.temperature, *more

    def tile(
        self, logits: Tensor, bias: Tensor | None, counts: Tensor, weights: Tensor, with_grad: bool
    ) -> tuple[Tensor, ...]:
        """Return maxima, log-normalisers at temperatures 1 and τ, (n, rows) each, and KD (rows,).

        With ambiguity, the log-normaliser (rows,) of the mean of the members' shifted logits follows.

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
        more: list[Tensor] = []
        ensemble: list[Tensor] = []
        if self.with_ambiguity:  # before KD scales the rows in place
            mean = self._mean(rows)
            top = mean.amax(1, keepdim=True)
            add_softmax(mean.sub_(top), ensemble, more)
            more = [(top + more[0])[:, 0]]
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
                own = weights[0] + weights[2] if self.with_ambiguity else weights[0]
                grad = p[i].mul_(own * counts[:, None])
                if self.with_kd:
                    grad.addcmul_(pulls[i], n * weights[1] * counts[:, None])
                if self.with_ambiguity:
                    grad.addcmul_(ensemble[0], -weights[2] * counts[:, None])
                logits[i].copy_(grad)
        return (*(torch.cat(columns, 1).T for columns in (maxima, normalisers, tempered)), kd, *more)

    def at_target(
        self, picked: Tensor, statistics: tuple[Tensor, ...], counts: Tensor, weights: Tensor, with_grad: bool
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return cross-entropy (n, rows), KD and ambiguity (rows,), and the gradient in the target's logit."""
        maxima, normalisers, tempered, kd, *more = statistics
        shifted = picked - maxima
        log_p = shifted - normalisers
        losses = [-log_p, kd, *(normalisers.sum(0) - len(picked) * ensemble for ensemble in more)]
        if not with_grad:
            return tuple(losses), None
        p = log_p.exp()
        grad = weights[0] * counts * (p - 1)
        if self.with_kd:
            z = (shifted / self.temperature - tempered).exp()
            pulls = [c * x - total for x, (c, total) in zip(z, self._teachers(list(z)), strict=True)]
            grad += weights[1] * counts * torch.stack(pulls)
        if self.with_ambiguity:
            grad += weights[2] * counts * (p - (self._mean(list(shifted)) - more[0]).exp())
        return tuple(losses), grad

    def _mean(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the mean over all members, those of other processes included."""
        total = functools.reduce(torch.add, rows) if len(rows) > 1 else rows[0].clone()
        if self.spread is None:
            return total.div_(len(rows))
        return self.spread.sum_(total).div_(self.spread.n)

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
