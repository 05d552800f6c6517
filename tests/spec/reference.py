"""Oracles: the paper's formulas in its letters, float64 and plain loops, in other algebra than the code.

Probabilities, ratios and cosines are computed as they are written: no log-softmax, no logsumexp, no matrix product, no
linear form of distillation. Only rows (over v, a or d) are tensors, so that autograd differentiates the oracles too.
Letters: n, x, y members; m views; u, k users; t target positions; p logits; z probabilities; H representations.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def softmax(p: Tensor, tau: float = 1.0) -> Tensor:
    """Eq. 16 for one row: exp(p_i / tau) / sum_j exp(p_j / tau)."""
    e = torch.exp(p / tau)
    return e / e.sum()


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Eq. 5 (n, t, v): one sum of products for every member, position and item."""
    rows = []
    for n in range(hidden.shape[0]):
        for t in range(hidden.shape[1]):
            row = (weight[n] * hidden[n, t]).sum(dim=1)
            rows.append(row if bias is None else row + bias[n])
    return torch.stack(rows).reshape(hidden.shape[0], hidden.shape[1], weight.shape[1])


def mip(p: Tensor, targets: Tensor) -> Tensor:
    """Eq. 6 (n,): minus the log of the true item's probability, a mean over t."""
    members = []
    for n in range(p.shape[0]):
        total = p.new_zeros(())
        for t in range(p.shape[1]):
            total = total - torch.log(softmax(p[n, t])[targets[t]])
        members.append(total / p.shape[1])
    return torch.stack(members)


def kl(teacher: Tensor, student: Tensor, tau: float) -> Tensor:
    """Eq. 17 for one pair (t, v): sum_i z_x (log z_x - log z_y), a mean over t, no gradient into the teacher."""
    total = student.new_zeros(())
    for t in range(student.shape[0]):
        z_x, z_y = softmax(teacher[t].detach(), tau), softmax(student[t], tau)
        total = total + (z_x * (torch.log(z_x) - torch.log(z_y))).sum()
    return total / student.shape[0]


def kd(p: Tensor, tau: float) -> Tensor:
    """Eq. 18: the double loop over ordered pairs."""
    total = p.new_zeros(())
    for x in range(p.shape[0]):
        for y in range(p.shape[0]):
            if x != y:
                total = total + kl(p[x], p[y], tau)
    return total


def kd_gradient(p: Tensor, tau: float) -> Tensor:
    """The gradient of Eq. 18 in closed form: (N z_y - S) / tau for student y, over the number of positions."""
    n, t, _ = p.shape
    z = torch.stack([torch.stack([softmax(p[x, i], tau) for i in range(t)]) for x in range(n)])
    s = sum((z[x] for x in range(n)), torch.zeros_like(z[0]))
    return torch.stack([(n * z[y] - s) / (tau * t) for y in range(n)])


def ambiguity(p: Tensor) -> Tensor:
    """sum_a KL(p_G || p_a), a mean over t, with p_G the normalised geometric mean of the members' probabilities.

    p_G is cut off from the gradient, which the code's is not: both are the same.
    """
    n, t, _ = p.shape
    total = p.new_zeros(())
    for i in range(t):
        members = [softmax(p[a, i]) for a in range(n)]
        g = torch.ones_like(p[0, i])
        for member in members:
            g = g * member.detach() ** (1 / n)
        g = g / g.sum()
        for member in members:
            total = total + (g * torch.log(g / member)).sum()
    return total / t


def binary_kl(teacher: Tensor, student: Tensor, target: int, tau: float) -> Tensor:
    """KL between (pi, 1 - pi) of two rows, with pi the target's probability; the rest is added up, not subtracted."""
    others = torch.arange(len(student)) != target
    x, y = softmax(teacher.detach(), tau), softmax(student, tau)
    pi_x, pi_y, rest_x, rest_y = x[target], y[target], x[others].sum(), y[others].sum()
    return pi_x * torch.log(pi_x / pi_y) + rest_x * torch.log(rest_x / rest_y)


def chosen_kd(
    p: Tensor, targets: Tensor, tau: float, *, part: str = "all", gate: str = "open", between: str = "all",
    kinds: tuple[int, ...] = (),
) -> Tensor:  # fmt: skip
    """Eq. 18 with a choice of who teaches whom on which target, and of what is passed on."""
    total = p.new_zeros(())
    for x in range(p.shape[0]):
        for y in range(p.shape[0]):
            if x == y or (between != "all" and (kinds[x] == kinds[y]) != (between == "same")):
                continue
            for t in range(p.shape[1]):
                i = int(targets[t])
                if gate == "better" and not softmax(p[x, t])[i] > softmax(p[y, t])[i]:
                    continue
                if part == "target":
                    total = total + binary_kl(p[x, t], p[y, t], i, tau)
                else:
                    total = total + kl(p[x, t : t + 1], p[y, t : t + 1], tau)
    return total / p.shape[1]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """g of Eq. 12."""
    return (a * b).sum() / torch.sqrt((a * a).sum() * (b * b).sum())


def contrastive_pair(
    anchors_x: Tensor, anchors_y: Tensor, views_y: Tensor, tau: float, *, code: bool = False
) -> Tensor:
    """Eq. 14 for one ordered pair (Eq. 12 where x = y), a mean over users u.

    ``code`` gives the public code's formula instead: one log of the sum over views, and exp(0) in the place of k = u.
    """
    b, m = anchors_x.shape[0], views_y.shape[0]
    total = anchors_x.new_zeros(())
    for u in range(b):
        denominator = anchors_x.new_full((), 1.0 if code else 0.0)
        for k in range(b):
            if k != u:
                denominator = denominator + torch.exp(cosine(anchors_x[u], anchors_y[k]) / tau)
        positives = [torch.exp(cosine(anchors_x[u], views_y[i, u]) / tau) for i in range(m)]
        if code:
            positives = [torch.stack(positives).sum()]
        for positive in positives:
            total = total - torch.log(positive / denominator)
    return total / b


def contrast(anchors: Tensor, views: Tensor, tau: float, *, code: bool = False) -> tuple[Tensor, Tensor]:
    """Eqs. 13 and 15: ICL over the pairs x = y, CCL over the ordered pairs x != y."""
    icl, ccl = anchors.new_zeros(()), anchors.new_zeros(())
    for x in range(anchors.shape[0]):
        for y in range(anchors.shape[0]):
            pair = contrastive_pair(anchors[x], anchors[y], views[y], tau, code=code)
            icl, ccl = (icl + pair, ccl) if x == y else (icl, ccl + pair)
    return icl, ccl


def ap(p: Tensor, attributes: Tensor, real: Tensor) -> Tensor:
    """Eqs. 9-10 (n,): the binary cross-entropy of every attribute at every real position, a mean over both."""
    members = []
    for n in range(p.shape[0]):
        total, count = p.new_zeros(()), 0
        for t in range(p.shape[1]):
            if not real[t]:
                continue
            alpha = set(attributes[t].tolist())
            sigma = 1 / (1 + torch.exp(-p[n, t]))
            for a in range(p.shape[2]):
                total = total - torch.log(sigma[a] if a in alpha else 1 - sigma[a])
                count += 1
        members.append(total / count)
    return torch.stack(members)


def pooled(hidden: Tensor, real: Tensor, pool: str) -> Tensor:
    """H(s) (n, b, e): every position side by side with zeros at padding, the mean of the real ones, or the newest."""
    n, b, length, _ = hidden.shape
    rows = []
    for x in range(n):
        for u in range(b):
            at = [hidden[x, u, i] for i in range(length)]
            if pool == "flatten":
                rows.append(torch.cat([h if real[u, i] else torch.zeros_like(h) for i, h in enumerate(at)]))
            elif pool == "mean":
                kept = [h for i, h in enumerate(at) if real[u, i]]
                rows.append(torch.stack(kept).sum(dim=0) / len(kept))
            else:
                rows.append(at[length - 1])
    return torch.stack(rows).reshape(n, b, -1)


def rank(scores: list[float], target: int, excluded: set[int]) -> int:
    """How many items other than the target score at least as much; item 0 is padding, the target is never excluded."""
    rivals = [v for v in range(1, len(scores)) if v != target and v not in excluded]
    return sum(1 for v in rivals if scores[v] >= scores[target])


def mask_count(rho: float, length: int) -> int:
    """L of Sec. 3.3.1: ceil(rho T), with rho as the decimal number that the user typed."""
    return math.ceil(Fraction(str(rho)) * length)
