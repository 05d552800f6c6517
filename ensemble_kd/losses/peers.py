"""The formula of members that teach each other: cross-entropy of each, and what passes between them.

Two facts make the cost of KD grow with the number of members n, and not with that of their pairs (Eqs. 16–18). With z_x
the softmax of member x at temperature τ and S = Σ_x z_x,

- the gradient of Σ_{x≠y} KL(z_x‖z_y) in student y's logits, teachers cut off, is G_y / τ with G_y = n z_y − S;
- the loss itself is Σ_y ⟨G_y, logits_y⟩ / τ: the normalisers cancel because Σ_v G_y = 0, so log z is never computed.

Both stay true if a member learns from some of the others only, as long as any two teach each other or not at all: then
G_y = c z_y − T with c teachers of y, whose softmaxes add up to T. One sum of softmaxes per architecture gives every T.

The ambiguity Σ_a KL(p_G‖p_a), with p_G the softmax of the members' mean logits z̄, is Σ_a lse(z_a) − n lse(z̄). So it
takes one more softmax, and its gradient in z_a is p_a − p_G, the same if p_G is cut off from it or not.

If only the target's probability π is passed on, KD compares (π, 1 − π) of two members. With G = c π − T as above, the
gradient in the logits is that of cross-entropy times −G / (1 − π), since log(π / (1 − π)) has the gradient (e − z) /
((1 − π) τ) with e the target. So at temperature 1 it costs no plane: each row of p gets another factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ensemble_kd.losses.formula import Tile, Weight, add_softmax
from ensemble_kd.losses.pairs import EVERYBODY, Pairs
from ensemble_kd.losses.row_kernel import row_kernel

Part = Literal["all", "target"]


@dataclass(frozen=True)
class Peers:
    """The formula of members that teach each other: cross-entropy of each, KD over pairs of them, and ambiguity."""

    temperature: float
    with_kd: bool
    pairs: Pairs = EVERYBODY
    part: Part = "all"
    with_ambiguity: bool = False
    shifted: bool = False  # KD compares logits / τ plus a row that is the same for all members, the last one of bias

    @property
    def compiles(self) -> bool:
        """False if softmaxes are added up over processes, within each tile."""
        return self.pairs.spread is None

    def kernel(self, *, product: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tile | None:
        """Return ``tile`` as one kernel on CUDA, which knows cross-entropy and KD between all members alone."""
        if not self.pairs.everybody or self.part != "all" or self.with_ambiguity or self.shifted:
            return None
        return row_kernel(self.temperature, self.with_kd, product=product, dtype=dtype, device=device)

    def parts(self, n: int) -> list[tuple[Sequence[int], Peers]]:
        """Return the members that meet in KD or ambiguity: all, those of one kind, or none but each itself."""
        if self.with_ambiguity or self.pairs.spread is not None:
            return [(range(n), self)]
        if not self.with_kd:
            return [((i,), self) for i in range(n)]
        if self.pairs.between != "same":
            return [(range(n), self)]
        kinds, alone = self.pairs.kinds, Peers(self.temperature, with_kd=False, shifted=self.shifted)
        own = [[i for i in range(n) if kinds[i] == kind] for kind in dict.fromkeys(kinds)]
        together = replace(self, pairs=Pairs(gate=self.pairs.gate))
        return [(members, together if len(members) > 1 else alone) for members in own]

    def slopes(self, weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
        """Return the factors of the losses' gradients."""
        ce_weight, kd_weight, *more = weights
        return ce_weight, kd_weight / self.temperature, *more

    def tile(
        self,
        logits: Tensor,
        bias: Tensor | None,
        picked: Tensor,
        counts: Tensor,
        weights: Tensor,
        with_grad: bool,
    ) -> tuple[Tensor, ...]:
        """Return maxima, log-normalisers at temperatures 1 and τ, (n, rows) each, and KD (rows,).

        KD of the target alone is left to ``at_target``. With ambiguity, the log-normaliser (rows,) of the mean of the
        members' shifted logits follows.

        Members are walked one by one: so a compiler sees elementwise loops over (rows, v), and eager planes stay in
        the cache.
        """
        n, members, share = len(logits), range(len(logits)), counts[:, None]
        rows, maxima = [], []
        p: list[Tensor] = []
        normalisers: list[Tensor] = []
        for i in members:
            x = logits[i].to(counts.dtype, copy=True) if bias is None else logits[i] + bias[i]
            maxima.append(x.amax(1, keepdim=True))
            rows.append(x.sub_(maxima[i]))
            add_softmax(rows[i], p, normalisers)
        tops: list[Tensor] = []
        kd, tempered, pulls = torch.zeros_like(counts), normalisers, []
        more: list[Tensor] = []
        ensemble: list[Tensor] = []
        if self.with_ambiguity:  # before KD scales the rows in place
            mean = self.pairs.mean(rows)
            top = mean.amax(1, keepdim=True)
            add_softmax(mean.sub_(top), ensemble, more)
            more = [(top + more[0])[:, 0]]
        scaled, z, within = rows, p, normalisers
        if self.with_kd and (self.temperature != 1 or self.shifted):
            scaled, z, tempered = [x.mul_(1 / self.temperature) for x in rows], [], []
            for x in scaled:
                if self.shifted:
                    assert bias is not None
                    tops.append(x.add_(bias[-1]).amax(1, keepdim=True))
                    x.sub_(tops[-1])
                add_softmax(x, z, tempered)
            within = tempered
            if self.shifted:  # relative to the maxima before the shift, as at temperature 1
                tempered = [top + log_sum for top, log_sum in zip(tops, tempered, strict=True)]
        one_plane = self.part == "target" and z is p
        if self.with_kd and not (self.part == "all" and self.pairs.gate == "open"):
            shifted = [x[:, None] - top for x, top in zip(picked[:n], maxima, strict=True)]
            log_p = [x - log_sum for x, log_sum in zip(shifted, normalisers, strict=True)]
        if self.with_kd and self.part == "target":
            more_at = picked[-1][:, None] if self.shifted else 0.0
            log_z = [x / self.temperature + more_at - log_sum for x, log_sum in zip(shifted, tempered, strict=True)]
            of_target = self.pairs.pulls([x.exp() for x in log_z], log_p)
            pulls = [(-weights[1] * x / _rest(y), z[i]) for i, (x, y) in enumerate(zip(of_target, log_z, strict=True))]
        elif self.with_kd and self.pairs.gate == "better":
            pulls = [(weights[1], x) for x in self.pairs.pulls(z, log_p)]
            kd = self._kd_of_pairs(scaled, z, within, log_p)
        elif self.with_kd:
            n = n if self.pairs.spread is None else self.pairs.spread.n
            for x, (c, total) in zip(z, self.pairs.teachers(z), strict=True):
                pull = (x if c == n else x * (c / n)).sub(total, alpha=1 / n)  # G / n
                pulls.append((n * weights[1], pull))
            product = pulls[0][1] * scaled[0]
            for i in members[1:]:
                product.addcmul_(pulls[i][1], scaled[i])
            kd = n * product.sum(1)
        if with_grad:
            for i in members:
                own = weights[0] + weights[2] if self.with_ambiguity else weights[0]
                if pulls and one_plane:
                    grad = p[i].mul_((own + pulls[i][0]) * share)
                else:
                    grad = p[i].mul_(own * share)
                    if pulls:
                        grad.addcmul_(pulls[i][1], pulls[i][0] * share)
                if self.with_ambiguity:
                    grad.addcmul_(ensemble[0], -weights[2] * share)
                logits[i].copy_(grad)
        return (*(torch.cat(columns, 1).T for columns in (maxima, normalisers, tempered)), kd, *more)

    def at_target(
        self, picked: Tensor, statistics: tuple[Tensor, ...], counts: Tensor, weights: Tensor, with_grad: bool
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return cross-entropy (n, rows), KD and ambiguity (rows,), and the gradient in the target's logit."""
        maxima, normalisers, tempered, kd, *more = statistics
        picked, further = (picked[:-1], picked[-1]) if self.shifted else (picked, 0.0)
        shifted = picked - maxima
        log_p = shifted - normalisers
        pulls: list[Tensor] = []
        if self.with_kd and (with_grad or self.part == "target"):
            log_z = shifted / self.temperature + further - tempered
            pulls = self.pairs.pulls(list(log_z.exp()), list(log_p))
            if self.part == "target":
                kd = self._kd_of_target(log_z, log_p, pulls)
        losses = [-log_p, kd, *(normalisers.sum(0) - len(picked) * ensemble for ensemble in more)]
        if not with_grad:
            return tuple(losses), None
        p = log_p.exp()
        grad = weights[0] * counts * (p - 1)
        if pulls:
            grad += weights[1] * counts * torch.stack(pulls)
        if self.with_ambiguity:
            grad += weights[2] * counts * (p - (self.pairs.mean(list(shifted)) - more[0]).exp())
        return tuple(losses), grad

    def _kd_of_pairs(
        self, scaled: Sequence[Tensor], z: Sequence[Tensor], tempered: Sequence[Tensor], log_p: Sequence[Tensor]
    ) -> Tensor:
        """Return KD (rows,) where of two members the better one teaches. Normalisers do not cancel then."""
        kd = torch.zeros_like(log_p[0])
        for x, y in self.pairs.unordered(len(z)):
            better = log_p[x] > log_p[y]
            gap = (torch.where(better, z[x], z[y]) * (scaled[x] - scaled[y])).sum(1, keepdim=True)
            gap = gap - tempered[x] + tempered[y]
            kd = kd + torch.where(better, gap, -gap) * (log_p[x] != log_p[y])
        return kd[:, 0]

    def _kd_of_target(self, log_z: Tensor, log_p: Tensor, pulls: Sequence[Tensor]) -> Tensor:
        """Return KD (rows,) of the targets' probabilities alone."""
        log_rest = _rest(log_z).log()
        if self.pairs.gate == "open":
            return (torch.stack(list(pulls)) * (log_z - log_rest)).sum(0)
        kd = torch.zeros_like(log_z[0])
        z, rest = log_z.exp(), log_rest.exp()
        for x, y in self.pairs.unordered(len(log_z)):
            one, other = log_z[x] - log_z[y], log_rest[x] - log_rest[y]
            from_x, from_y = z[x] * one + rest[x] * other, -z[y] * one - rest[y] * other
            kd = kd + torch.where(log_p[x] > log_p[y], from_x, from_y) * (log_p[x] != log_p[y])
        return kd


def _rest(log_z: Tensor) -> Tensor:
    """Return 1 − π, at least ε: where π is 1 as far as digits go, the other items' probabilities are below ε."""
    return torch.expm1(log_z).neg().clamp(min=torch.finfo(log_z.dtype).eps)
