"""Equations 6-18 of the EMKD paper as pure functions of tensors.

Axes: n members, m views, b batch, l positions, d features, v items, a attributes, t target positions of a batch.
Every term is summed over members, views and ordered pairs (x, y), x != y, as in the paper, and is a *mean* over the
batch (users or target positions): the paper leaves that open, and a mean keeps the weights independent of batch size.

Source: Du et al., "Ensemble Modeling with Contrastive Knowledge Distillation for Sequential Recommendation", SIGIR
2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import (
    choice,
    flag,
    instance,
    number,
    tensor,
    whole,
)

Pool = Literal["flatten", "mean", "last"]
Variant = Literal["paper", "reference_code"]


def item_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Cross-entropy of the item predictions, Eq. 6: ``-log softmax(p_t)[target]``, a mean over target positions.

    Args:
        logits: (n, t, v) scores of every item at every target position.
        targets: (t,) int64 class of the true item, in [0, v).

    Returns:
        (n,) one loss per member. Eq. 7 is their sum.

    Examples:
        >>> item_cross_entropy(torch.zeros(2, 3, 4), torch.tensor([0, 1, 3])).exp().round(decimals=4)
        tensor([4., 4.])
    """
    sizes: dict[str, int] = {}
    tensor("item_cross_entropy", "logits", logits, "n t v", "floating", sizes)
    tensor("item_cross_entropy", "targets", targets, "t", "int64", sizes)
    n = logits.shape[0]
    per_target = F.cross_entropy(rearrange(logits, "n t v -> (n t) v"), targets.repeat(n), reduction="none")
    return rearrange(per_target, "(n t) -> n t", n=n).mean(dim=1)


def kl_divergence(teacher: Tensor, student: Tensor, *, temperature: float) -> Tensor:
    r"""``KL(z_teacher || z_student)`` of one ordered pair, Eqs. 16-17, with the teacher cut off from the gradient.

    Args:
        teacher: (..., t, v) logits.
        student: (..., t, v) logits.
        temperature: τ of Eq. 16.

    Returns:
        (...,) mean over target positions.

    Examples:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> kl_divergence(logits, logits + 5.0, temperature=0.5).abs().item() < 1e-6
        True
    """
    temperature = number("kl_divergence", "temperature", temperature, above=0)
    sizes: dict[str, int] = {}
    for name, logits in (("teacher", teacher), ("student", student)):
        tensor("kl_divergence", name, logits, "... t v", "floating", sizes)
    log_teacher = F.log_softmax(teacher.detach() / temperature, dim=-1)
    log_student = F.log_softmax(student / temperature, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1).mean(dim=-1)


def knowledge_distillation(logits: Tensor, *, temperature: float, scale_by_temperature_squared: bool = False) -> Tensor:
    r"""Collaborative distillation between all members, Eqs. 16-18, in time linear in n.

    With z_x the softmax at temperature τ, ``S = sum_x z_x`` and ``L = sum_y log z_y``:
    ``sum_{x != y} KL(z_x || z_y) = n * sum_x z_x . log z_x - S . L``. Teachers are cut off from the gradient.

    Where we differ: the authors' code halves the sum. The factor τ² of Hinton et al. (2015) is an option.

    Args:
        logits: (n, t, v) scores of every item at every target position.
        temperature: τ of Eq. 16.
        scale_by_temperature_squared: multiply by τ².

    Returns:
        () sum over ordered pairs, mean over target positions; exactly 0 at n = 1.

    Examples:
        >>> knowledge_distillation(torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]]), temperature=0.3).item()
        0.0
    """
    temperature = number("knowledge_distillation", "temperature", temperature, above=0)
    flag("knowledge_distillation", "scale_by_temperature_squared", scale_by_temperature_squared)
    tensor("knowledge_distillation", "logits", logits, "n t v", "floating")
    n = logits.shape[0]
    if n == 1:
        return logits.new_zeros(())
    log_z = F.log_softmax(logits / temperature, dim=-1)
    fixed = log_z.detach()
    z = fixed.exp()
    # Written around the members' mean log-probability, which loses no digits when members agree:
    # n sum_x z_x.log z_x - S.L = n sum_x z_x . (log z_x - L / n).
    consensus = log_z.mean(dim=0)
    value = n * einsum(z, fixed - consensus, "n t v, n t v -> t").mean()
    return value * temperature**2 if scale_by_temperature_squared else value


def mean_teacher_distillation(logits: Tensor, averages: Tensor, *, temperature: float) -> Tensor:
    r"""Distillation from the averages of the other members, ``KD(teacher="ema")``.

    With z_y the softmax of member y at temperature τ, and a_x that of the network whose weights are the moving averages
    of member x: ``sum_{x != y} KL(a_x || z_y)``. No member learns from its own average. With ``averages`` equal to
    ``logits`` this is ``knowledge_distillation``.

    Source: Wu and Gong, "Peer collaborative learning for online knowledge distillation", AAAI 2021. Where we differ:
    members share no layers, and the averages teach without the second ensemble teacher of that paper.

    Args:
        logits: (n, t, v) scores of every item at every target position.
        averages: (n, t, v) the same of the averaged networks, cut off from the gradient.
        temperature: τ of Eq. 16.

    Returns:
        () sum over ordered pairs, mean over target positions; 0 at n = 1.

    Examples:
        >>> logits = torch.tensor([[[0.0, 1.0]], [[2.0, 0.0]]])
        >>> mean_teacher_distillation(logits, logits.flip(0), temperature=1.0).item()
        0.0
    """
    where, sizes = "mean_teacher_distillation", dict[str, int]()
    temperature = number(where, "temperature", temperature, above=0)
    tensor(where, "logits", logits, "n t v", "floating", sizes)
    tensor(where, "averages", averages, "n t v", "floating", sizes)
    log_z, log_a = (F.log_softmax(x / temperature, dim=-1) for x in (logits, averages.detach()))
    value = logits.new_zeros(())
    for x in range(len(logits)):
        for y in range(len(logits)):
            if x != y:
                value = value + (log_a[x].exp() * (log_a[x] - log_z[y])).sum(dim=-1).mean()
    return value


def moving_average(average: Tensor, value: Tensor, *, decay: float, step: int) -> Tensor:
    r"""Return an average over the steps of a run, in which older steps count less and less.

    ``a · average + (1 − a) · value`` with ``a = min(decay, 1 − 1 / (step + 1))``: the plain mean of all values so far,
    the one before step 1 included, until ``decay`` is reached. From there the last 1 / (1 − decay) steps count most.

    Source: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017.

    Args:
        average: of the values before, of any shape.
        value: after step number ``step``, of the same shape.
        decay: in [0, 1). 0 returns ``value``.
        step: from 1.

    Examples:
        >>> moving_average(torch.tensor(0.0), torch.tensor(3.0), decay=0.9, step=2)
        tensor(1.)
    """
    where, sizes = "moving_average", dict[str, int]()
    decay, step = number(where, "decay", decay, least=0, below=1), whole(where, "step", step, least=1)
    for name, given in (("average", average), ("value", value)):
        tensor(where, name, given, "...", "floating", sizes)
    return average.lerp(value, 1 - min(decay, 1 - 1 / (step + 1)))


def power_average(average: Tensor, value: Tensor, *, power: float, step: int, since: int) -> Tensor:
    r"""Return an average over the steps of a run, of which step s counts s^power.

    ``a · average + (1 − a) · value`` with ``a = (since / step)^(power + 1)``, which is the weight that the steps up to
    ``since`` keep: ∫ s^power up to there, as a share of that up to ``step``. So values may be added after each step, or
    one for several. With power 3 half of the weight lies on the newest 16 % of the steps.

    Source: Karras et al., "Analyzing and improving the training dynamics of diffusion models", CVPR 2024. Where we
    differ: one value may stand for several steps.

    Args:
        average: of the values before, of any shape.
        value: of the steps ``since`` + 1 to ``step``, of the same shape.
        power: 0 is the plain mean of all steps; larger ones forget the beginning sooner.
        step: from 1.
        since: the step up to which ``average`` counts, in [0, step). 0: it counts nothing.

    Raises:
        EnsembleKDError: a number out of its range, or tensors of different shapes.

    Examples:
        >>> power_average(torch.tensor(0.0), torch.tensor(4.0), power=1, step=2, since=1)
        tensor(3.)
    """
    where, sizes = "power_average", dict[str, int]()
    power, step = number(where, "power", power, least=0), whole(where, "step", step, least=1)
    since = whole(where, "since", since, least=0, most=step - 1)
    for name, given in (("average", average), ("value", value)):
        tensor(where, name, given, "...", "floating", sizes)
    return average.lerp(value, 1 - (since / step) ** (power + 1))


def target_distillation(logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    r"""Collaborative distillation of the true item's probability alone, ``KD(part="target")``.

    With π_x the target's probability at temperature τ, the sum over ordered pairs of KL((π_x, 1 − π_x) ‖ (π_y, 1 −
    π_y)). At temperature 1 its gradient is that of cross-entropy times ``sum_x (π_x − π_y) / (1 − π_y)``: the true item
    is pushed harder if others know it better, and the order of all other items stays the student's own.

    Source: the first half of decoupled KD, Zhao et al., CVPR 2022. Where we differ: members teach each other, and the
    second half is left out.

    Args:
        logits: (n, t, v) scores of every item at every target position.
        targets: (t,) int64 class of the true item, in [0, v).
        temperature: τ of Eq. 16.

    Returns:
        () sum over ordered pairs, mean over target positions; 0 at n = 1.

    Examples:
        >>> logits = torch.tensor([[[0.0, 1.0, 3.0]], [[0.0, 3.0, 1.0]]])
        >>> target_distillation(logits, torch.tensor([0]), temperature=1.0).abs().item() < 1e-6  # both know it as well
        True
    """
    where, sizes = "target_distillation", dict[str, int]()
    temperature = number(where, "temperature", temperature, above=0)
    tensor(where, "logits", logits, "n t v", "floating", sizes)
    tensor(where, "targets", targets, "t", "int64", sizes)
    scaled = logits / temperature
    is_target = F.one_hot(targets, logits.shape[2]).bool()
    others = scaled.masked_fill(is_target, -torch.inf).logsumexp(dim=-1)
    odds = scaled.gather(2, targets.expand(len(logits), -1)[..., None])[..., 0] - others  # log(π / (1 − π))
    log_both = torch.stack([F.logsigmoid(odds), F.logsigmoid(-odds)], dim=-1)
    fixed = log_both.detach()
    pairs = einsum(fixed.exp(), fixed, "x t k, x t k -> t") * len(logits)
    return (pairs - einsum(fixed.exp(), log_both, "x t k, y t k -> t")).mean()


def ambiguity(logits: Tensor) -> Tensor:
    r"""Spread of the members around their ensemble, ``sum_a KL(p_G || p_a)``, in time linear in n.

    p_G is the softmax of the mean logits z̄ (Eq. 20), p_a that of member a. It equals ``sum_a lse(z_a) - n lse(z̄)``,
    and the cross-entropy of the ensemble is the members' mean minus 1/n of it. Its gradient ``p_a - p_G`` is the same
    if p_G is cut off from it or not.

    Source: Krogh and Vedelsby, "Neural network ensembles, cross validation, and active learning", NeurIPS 1995; for
    cross-entropy and means of logits, Webb et al., ECML 2020. Where we differ: they divide by n; we sum over members,
    as the paper does with all its losses.

    Args:
        logits: (n, t, v) scores of every item at every target position.

    Returns:
        () sum over members, mean over target positions; 0 at n = 1.

    Examples:
        >>> logits = torch.tensor([[[0.0, 2.0]], [[2.0, 0.0]]])
        >>> target = torch.tensor([0])
        >>> members, ensemble = (item_cross_entropy(x, target).mean() for x in (logits, logits.mean(0, keepdim=True)))
        >>> round(float(members - ensemble - ambiguity(logits) / 2), 6)
        0.0
    """
    tensor("ambiguity", "logits", logits, "n t v", "floating")
    if len(logits) == 1:
        return logits.new_zeros(())
    members = F.log_softmax(logits, dim=-1)
    ensemble = F.log_softmax(logits.mean(dim=0), dim=-1)
    return einsum(ensemble.exp(), ensemble - members, "t v, n t v -> n t").mean(dim=1).sum()


def pool_sequence(hidden: Tensor, real: Tensor, *, pool: Pool = "flatten") -> Tensor:
    r"""H(s), one vector per sequence, from the hidden states at its positions (Eqs. 8 and 12).

    Args:
        hidden: (..., b, l, d) hidden states.
        real: (b, l) bool, False at padding.
        pool: "flatten" keeps every position (l * d features, padding set to zero), as in the paper; "mean" over the
            real positions; "last" is the newest position.

    Returns:
        (..., b, e), e = l * d or d.

    Examples:
        >>> hidden = torch.tensor([[[9.0], [1.0], [3.0]]])
        >>> real = torch.tensor([[False, True, True]])
        >>> [pool_sequence(hidden, real, pool=p).tolist() for p in ("flatten", "mean", "last")]
        [[[0.0, 1.0, 3.0]], [[2.0]], [[3.0]]]
    """
    choice("pool_sequence", "pool", pool, get_args(Pool))
    sizes: dict[str, int] = {}
    tensor("pool_sequence", "real", real, "... b l", "bool", sizes)
    tensor("pool_sequence", "hidden", hidden, "... b l d", "floating", sizes)
    if pool == "last":
        return hidden[..., -1, :]
    masked = hidden.masked_fill(~real[..., None], 0.0)  # not a product: padding may be anything, NaN included
    if pool == "flatten":
        return rearrange(masked, "... l d -> ... (l d)")
    return masked.sum(dim=-2) / real.sum(dim=-1, keepdim=True).to(hidden.dtype)


class Contrast(NamedTuple):
    """The two contrastive losses, which share one cosine matrix."""

    icl: Tensor
    ccl: Tensor


def contrast(
    anchors: Tensor | Sequence[Tensor],
    views: Tensor | Sequence[Tensor],
    *,
    temperature: float,
    variant: Variant = "paper",
) -> Contrast:
    r"""Intra- and cross-network contrastive learning, Eqs. 12-15, from one (n b) x (n b) cosine matrix.

    For every ordered pair (x, y), with g the cosine, a_u^x = H^x(s_u), and p_u^{y,m} = H^y(s_u^m):
    ``L^{x,y} = -sum_m log( exp(g(a_u^x, p_u^{y,m}) / τ) / sum_{k != u} exp(g(a_u^x, a_k^y) / τ) )``,
    a mean over users u. ICL sums the pairs x = y, CCL the ordered pairs x != y.

    As in the paper the positive is not in the denominator, so a loss may be negative. ``variant="reference_code"`` is
    the authors' public formula: logsumexp over the views instead of a sum of logs, and an exp(0) left in the
    denominator for k = u.

    Args:
        anchors: (n, b, e) representations of the original sequences. If users have unequally many features, as the
            flattened states of sequences of unequal length do, they may come in groups: a list of (n, r, e), each
            group with an e of its own. They count as filled up with zeros in front, which are not computed.
        views: (n, m, b, e) representations of the augmented sequences; in groups as the anchors are.
        temperature: τ.
        variant: "paper" or "reference_code".

    Returns:
        ``Contrast(icl, ccl)``, two scalars; ccl is exactly 0 at n = 1.

    Raises:
        EnsembleKDError: fewer than two sequences (there are no negatives), or an unknown variant.

    Examples:
        >>> anchors = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> icl, ccl = contrast(anchors, anchors[:, None], temperature=0.5)
        >>> round(icl.item(), 6), ccl.item()
        (-2.0, 0.0)
    """
    choice("contrast", "variant", variant, get_args(Variant))
    temperature = number("contrast", "temperature", temperature, above=0)
    own = [anchors] if isinstance(anchors, Tensor) else _listed("anchors", anchors)
    seen = [views] if isinstance(views, Tensor) else _listed("views", views)
    if len(own) != len(seen):
        fix = "Pass the groups of anchors and of views in the same order."
        raise EnsembleKDError("contrast", f"{len(own)} groups of views, as of anchors", len(seen), fix)
    sizes: dict[str, int] = {}
    for name, groups, axes in (("anchors", own, "n {b} {e}"), ("views", seen, "n m {b} {e}")):
        for i, group in enumerate(groups):
            tensor("contrast", name, group, axes.format(b=f"b{i}", e=f"e{i}"), "floating", sizes)
    own, seen = ([F.normalize(group, dim=-1) for group in groups] for groups in (own, seen))
    n, b = len(own[0]), sum(group.shape[1] for group in own)
    if b < 2:
        raise EnsembleKDError(
            "contrastive loss",
            "at least 2 sequences in a batch",
            f"{b}",
            "There are no negatives otherwise: use a larger batch, or leave ICL and CCL out.",
        )
    between = _all_cosines(own) / temperature
    positive = (
        torch.cat([einsum(a, p, "x u e, y m u e -> x y m u") for a, p in zip(own, seen, strict=True)], dim=-1)
        / temperature
    )
    itself = torch.eye(b, dtype=torch.bool, device=between.device)
    if variant == "paper":
        negatives = between.masked_fill(itself, -torch.inf).logsumexp(dim=-1)
        per_user = (negatives[:, :, None] - positive).sum(dim=2)
    else:
        negatives = between.masked_fill(itself, 0.0).logsumexp(dim=-1)
        per_user = negatives - positive.logsumexp(dim=2)
    pairs = per_user.mean(dim=-1)
    icl = pairs.diagonal().sum()
    # A masked sum rather than total - icl, so that ccl is exactly 0 for one member and loses no digits otherwise.
    ccl = pairs.masked_fill(torch.eye(n, dtype=torch.bool, device=pairs.device), 0.0).sum()
    return Contrast(icl, ccl)


def _listed(name: str, groups: Sequence[Tensor]) -> list[Tensor]:
    instance("contrast", name, groups, (Tensor, list, tuple), "Pass one tensor, or a list of groups.")
    if not groups:
        raise EnsembleKDError("contrast", f"{name} in one group or more", "none", "Pass a tensor (n, b, e).")
    return list(groups)


def _all_cosines(groups: Sequence[Tensor]) -> Tensor:
    """Inner products (x, y, u, k) of unit vectors in groups (n, r, e), of which two share the last features."""
    n = len(groups[0])
    flat = [rearrange(group, "n r e -> (n r) e") for group in groups]
    blocks: dict[tuple[int, int], Tensor] = {}
    for i, one in enumerate(flat):
        for j, other in enumerate(flat[: i + 1]):
            e = min(one.shape[1], other.shape[1])
            product = rearrange(one[:, -e:] @ other[:, -e:].T, "(x u) (y k) -> x y u k", x=n, y=n)
            blocks[i, j], blocks[j, i] = product, rearrange(product, "x y u k -> y x k u")
    rows = [torch.cat([blocks[i, j] for j in range(len(flat))], dim=3) for i in range(len(flat))]
    return torch.cat(rows, dim=2)


def attribute_cross_entropy(logits: Tensor, attributes: Tensor, real: Tensor) -> Tensor:
    r"""Binary cross-entropy of the attribute predictions, Eqs. 9-11: a mean over real positions and attributes.

    Written as ``sum_a softplus(x_a) - sum_{a in alpha_t} x_a``, so that no (positions, a) table of targets is made.

    Args:
        logits: (n, t, a) scores before the sigmoid.
        attributes: (t, k) int64 the classes in [0, a) that the item at each position has, filled up with -1.
        real: (t,) bool, False at padding, which never counts.

    Returns:
        (n,) one loss per member. Eq. 11 is their sum.

    Examples:
        >>> attributes = torch.tensor([[2, -1], [0, 3]])
        >>> real = torch.tensor([True, True])
        >>> attribute_cross_entropy(torch.zeros(1, 2, 4), attributes, real).exp().round(decimals=4)
        tensor([2.])
    """
    where, sizes = "attribute_cross_entropy", dict[str, int]()
    tensor(where, "logits", logits, "n t a", "floating", sizes)
    tensor(where, "attributes", attributes, "t k", "int64", sizes)
    tensor(where, "real", real, "t", "bool", sizes)
    a = logits.shape[-1]
    n, t, k = logits.shape[0], *attributes.shape
    has = (attributes >= 0) & real[:, None]
    index = attributes.clamp(min=0).expand(n, t, k)
    positive = logits.gather(2, index).masked_fill(~has, 0.0).sum(dim=(1, 2))
    every = F.softplus(logits).sum(dim=-1).masked_fill(~real, 0.0).sum(dim=1)
    return (every - positive) / (real.sum() * a)
