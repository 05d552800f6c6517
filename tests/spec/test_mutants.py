"""Tests of the tests: wrong implementations, each of which a named identity must refuse.

A family is a plain implementation with a switch for its fault. With no fault it passes every identity of its function,
so a mutant dies of its fault alone; and every identity kills at least one mutant, so none is idle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor

from ensemble_kd import functional as F
from ensemble_kd.ensemble import EnsembleKD, Step
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import (
    CCL,
    ICL,
    KD,
    ItemLosses,
    Loss,
    terms_by_name,
)
from ensemble_kd.metrics import ranks
from ensemble_kd.objectives import Draw
from tests.spec.test_identities import (
    IDENTITIES,
    MASK,
    eager,
    masked_item,
    model_step,
    next_item,
    taught_eagerly,
    weigh,
)

Family = Callable[..., Any]
HUNT = settings(
    max_examples=200,
    phases=[Phase.generate],
    database=None,
    derandomize=True,
    deadline=None,
    report_multiple_bugs=False,
)
BRIEF = settings(HUNT, max_examples=10)


def log_softmax(p: Tensor, dim: int = -1, fault: str = "") -> Tensor:
    if fault == "overflowing exp":
        return torch.log(torch.exp(p) / torch.exp(p).sum(dim=dim, keepdim=True))
    normaliser = p.logsumexp(dim=dim, keepdim=True)
    return p - (normaliser.detach() if fault == "detached normaliser" else normaliser)


def ce(logits: Tensor, targets: Tensor, fault: str = "") -> Tensor:
    if fault == "shifts its input in place":
        logits -= logits.amax(dim=-1, keepdim=True)
    if fault == "padding is a class":
        logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1)
    log_z = log_softmax(logits, 1 if fault == "softmax over targets" else 2, fault)
    losses = -log_z.gather(2, targets.expand(len(logits), -1)[..., None])[..., 0]
    if fault == "smoothed towards item 0":
        losses = 0.9 * losses - 0.1 * log_z[..., 0]
    return losses.sum(dim=1) if fault == "sum over targets" else losses.mean(dim=1)


def kl(teacher: Tensor, student: Tensor, *, temperature: float, fault: str = "") -> Tensor:
    tau = 1.0 if fault == "no temperature" else temperature
    dim = -2 if fault == "softmax over targets" else -1
    fixed = teacher if fault == "teacher not detached" else teacher.detach()
    x, y = log_softmax(fixed / tau, dim, fault), log_softmax(student / tau, dim, fault)
    rows = (x.exp() * (x - y)).sum(dim=-1)
    if fault == "cross-entropy":
        rows = -(x.exp() * y).sum(dim=-1)
    elif fault == "symmetric":
        rows = (rows + (y.exp() * (y - x)).sum(dim=-1)) / 2
    elif fault == "student and teacher swapped":
        rows = (y.exp() * (y - x)).sum(dim=-1)
    elif fault == "sign lost":
        rows = -rows
    elif fault == "times tau squared":
        rows = rows * temperature**2
    return rows.sum(dim=-1) if fault == "sum over targets" else rows.mean(dim=-1)


def kd(logits: Tensor, *, temperature: float, scale_by_temperature_squared: bool = False, fault: str = "") -> Tensor:
    n = len(logits)
    if fault == "shifts its input in place":
        logits -= logits.amax(dim=-1, keepdim=True)
    p = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1) if fault == "padding is a class" else logits
    pair = partial(kl, temperature=temperature, fault=fault)
    pairs = {(x, y) for x in range(n) for y in range(n) if x != y or fault == "cross-entropy"}
    if fault == "half of the ordered pairs":
        pairs = {(x, y) for x, y in pairs if x < y}
    total = logits.new_zeros(())
    for x, y in sorted(pairs):
        if fault == "student detached":
            log_x, log_y = (log_softmax(q / temperature) for q in (p[x], p[y].detach()))
            total = total + (log_x.exp() * (log_x - log_y)).sum(dim=-1).mean()
        else:
            total = total + pair(p[x], p[y])
    if fault == "halved":
        total = total / 2
    elif fault == "mean over pairs":
        total = total / max(len(pairs), 1)
    elif fault == "teacher is the mean":
        total = n * sum((pair(p.mean(dim=0), p[y]) for y in range(n)), logits.new_zeros(()))
    elif fault == "entropy alone":
        total = sum((kl(q, torch.zeros_like(q), temperature=temperature) for q in p), logits.new_zeros(())) - 3
    asked = scale_by_temperature_squared and fault != "tau squared refused"
    return total * temperature**2 if asked or fault == "always tau squared" else total


def contrast(
    anchors: Tensor, views: Tensor, *, temperature: float, variant: str = "paper", fault: str = ""
) -> tuple[Tensor, Tensor]:
    n, b, _ = anchors.shape
    if fault == "normalises in place":
        anchors /= anchors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    if fault == "divides by a norm of zero":
        a, p = (x / x.norm(dim=-1, keepdim=True) for x in (anchors, views))
    elif fault == "no normalisation":
        a, p = anchors, views
    elif fault == "detached norm":
        a, p = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12).detach() for x in (anchors, views))
    else:
        a, p = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (anchors, views))
    code = variant == "reference_code" and fault != "variant ignored"
    totals = [anchors.new_zeros(()), anchors.new_zeros(())]
    for x in range(n):
        for y in range(n):
            own = y if fault == "anchors of y" else x
            others = p[y, 0] if fault == "negatives among views" else a[y]
            between = (a[own][:, None] * others[None]).sum(dim=-1) / temperature
            positive = (a[own][None] * p[y]).sum(dim=-1) / temperature  # (m, b)
            left = torch.eye(b, dtype=torch.bool)
            if code or fault == "exp(0) for k = u":
                between = between.masked_fill(left, 0.0)
            elif fault != "anchor against itself":
                between = between.masked_fill(left, -torch.inf)
            if fault == "positive in the denominator":
                negatives = torch.logaddexp(between.logsumexp(dim=1), positive)
            else:
                negatives = between.logsumexp(dim=1).expand_as(positive)
            if code or fault == "logsumexp over views":
                rows = negatives[0] - positive.logsumexp(dim=0)
            else:
                rows = (negatives - positive).sum(dim=0)
            if fault == "mean over views":
                rows = rows / len(positive)
            pair = rows.sum() if fault == "sum over users" else rows.mean()
            if fault == "later users weigh more":
                pair = (rows * torch.arange(b)).mean()
            if not (fault == "half of the ordered pairs" and x > y):
                totals[x != y] = totals[x != y] + pair
            if fault == "pairs x = y in CCL" and x == y:
                totals[1] = totals[1] + pair
    return totals[0], totals[1]


def pool(hidden: Tensor, real: Tensor, *, pool: str = "flatten", fault: str = "") -> Tensor:
    if fault == "zeroes in place":
        hidden *= real[..., None]
    masked = hidden if fault == "padding not zeroed" else hidden.where(real[..., None], 0.0)
    if pool == "flatten":
        return masked.flatten(-2)
    if pool == "mean":
        length = real.shape[1] if fault == "mean over l" else real.sum(dim=1, keepdim=True)
        return masked.sum(dim=-2) / length
    return hidden[..., 0, :] if fault == "oldest for newest" else hidden[..., -1, :]


def ap(logits: Tensor, attributes: Tensor, real: Tensor, fault: str = "") -> Tensor:
    a = logits.shape[2]
    if fault == "clamps in place":
        attributes.clamp_(min=0)
    index = attributes.clamp(min=0) if fault == "fillers are attribute 0" else attributes
    targets = (index[:, :, None] == torch.arange(a)).any(dim=1)
    sigma = torch.sigmoid(logits)
    if fault == "log of a sigmoid":
        losses = -torch.where(targets, sigma.log(), (1 - sigma).log())
    elif fault == "softmax over attributes":
        losses = -torch.where(targets, log_softmax(logits), 0.0)
    else:
        losses = torch.nn.functional.softplus(logits) - torch.where(targets, logits, 0.0)
    if fault == "gradient of the positives lost":
        losses = torch.nn.functional.softplus(logits) - torch.where(targets, logits, 0.0).detach()
    if fault == "later positions weigh more":
        losses = losses * torch.arange(1, len(real) + 1)[:, None]
    kept = losses if fault == "padding counts" else losses[:, real]
    total = kept.sum(dim=(1, 2)) / kept.shape[1]
    if fault == "divided by all positions":
        total = total * kept.shape[1] / len(real)
    return total if fault == "sum over attributes" else total / a


class Faulty(torch.autograd.Function):
    """The identity, with a fault in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: str) -> Tensor:
        ctx.fault, ctx.passed = fault, False
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        spent, ctx.passed = ctx.passed, True
        if ctx.fault == "gradients given away once" and spent:
            upstream = torch.zeros_like(upstream)
        elif ctx.fault == "scaled gradients scaled again" and spent:
            upstream = -3 * upstream
        elif ctx.fault == "upstream gradient dropped":
            upstream = torch.ones_like(upstream)
        elif ctx.fault == "second derivatives are 0":
            upstream = upstream.detach()
        return upstream, None


def refuse(
    hidden: Tensor, v: int, targets: Tensor, valid: Tensor | None, tau: float, tile_rows: int | None, fault: str
) -> None:
    """The shared checks of the losses without logits; a fault lets one thing through."""
    wrong = {
        "hidden of whole numbers pass": not hidden.is_floating_point(),
        "no target passes": not len(targets),
        "targets of any type pass": targets.dtype != torch.int64,
        "one target too many passes": targets.shape != hidden.shape[1:2],
        "valid of any type passes": valid is not None and valid.dtype != torch.bool,
        "any temperature passes": not 0 < tau < math.inf,
        "any tile_rows pass": tile_rows is not None and tile_rows < 1,
    }
    if any(found for name, found in wrong.items() if name != fault):
        raise EnsembleKDError("plain", "good input", "bad input", "Mend it.")
    counted = targets if valid is None or valid.dtype != torch.bool else targets[valid]
    if (counted.lt(0).any() and fault != "target -1 is the last item") or counted.ge(v).any():
        raise EnsembleKDError("plain", "targets in [0, v)", "others", "Mend them.")


def fused(
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
    tile_rows: int | None = None,
    fault: str = "",
) -> ItemLosses:
    refuse(hidden, weight.shape[1], targets, valid, temperature, tile_rows, fault)
    hidden = Faulty.apply(hidden, fault if fault == "second derivatives are 0" else "")
    if fault == "zeroes padded rows in place" and valid is not None:
        hidden *= valid[:, None]
    if valid is not None and fault != "valid ignored":
        hidden, targets = hidden[:, valid], targets[valid]
    if fault == "half of the gradient":
        hidden = (hidden + hidden.detach()) / 2
    t = len(targets)
    rows = min(tile_rows or t, t)
    starts = range(0, t - t % rows if fault == "last tile dropped" else t, rows)
    cross_entropy, distilled = hidden.new_zeros(len(hidden)), hidden.new_zeros(())
    for start in starts:
        tile = slice(start, start + rows)
        logits = hidden[:, tile] @ weight.mT
        if bias is not None and fault != "no bias":
            logits = logits + bias[:, None]
        share = 1 / len(starts) if fault == "mean of tile means" else len(targets[tile]) / t
        tau = 1.0 if fault == "KD at temperature 1" else temperature
        cross_entropy = cross_entropy + share * ce(logits, targets[tile], fault)
        distilled = distilled + share * kd(
            logits, temperature=tau, scale_by_temperature_squared=scale_by_temperature_squared, fault=fault
        )
    coefficient = kd_weight * (ce_weight if fault == "KD times both weights" else 1.0)
    total = ce_weight * cross_entropy.sum() + (coefficient * distilled if kd_weight else 0.0)
    return ItemLosses(Faulty.apply(total, fault), cross_entropy, distilled)


def taught(
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
    tile_rows: int | None = None,
    fault: str = "",
) -> ItemLosses:
    refuse(hidden, weight.shape[1], targets, valid, temperature, tile_rows, fault)
    hidden = Faulty.apply(hidden, fault if fault == "second derivatives are 0" else "")
    if fault == "zeroes padded rows in place" and valid is not None:
        queries *= valid[:, None]
    if valid is not None and fault != "valid ignored":
        hidden, queries, targets = hidden[:, valid], queries[valid], targets[valid]
    t = len(targets)
    rows = min(tile_rows or t, t)
    starts = range(0, t - t % rows if fault == "last tile dropped" else t, rows)
    cross_entropy, distilled = hidden.new_zeros(len(hidden)), hidden.new_zeros(())
    for start in starts:
        tile = slice(start, start + rows)
        share = 1 / len(starts) if fault == "mean of tile means" else len(targets[tile]) / t
        logits = hidden[:, tile] @ weight.mT + bias[:, None]
        teacher = queries[tile] @ keys.mT
        if fault != "teacher without its bias":
            teacher = teacher + key_bias
        cross_entropy = cross_entropy + share * ce(logits, targets[tile], fault)
        for i, student in enumerate(logits):
            pair = torch.stack([student, logits[i - 1] if fault == "the other student teaches" else teacher])
            one = kd(
                pair.flip(0) if fault == "half of the ordered pairs" else pair,
                temperature=temperature,
                scale_by_temperature_squared=scale_by_temperature_squared,
                fault=fault,
            )
            distilled = distilled + share * (one / len(logits) if fault == "mean over students" else one)
    coefficient = kd_weight * (ce_weight if fault == "KD times both weights" else 1.0)
    total = Faulty.apply(ce_weight * cross_entropy.sum() + coefficient * distilled, fault)
    return ItemLosses(total, cross_entropy, distilled)


def weighing(loss: Loss, fault: str = "") -> list[tuple[float, Loss]]:
    return [(1.0 if fault == "weights dropped" else weight, term) for weight, term in loss.weighted()]


def ranking(scores: Tensor, target: Tensor, exclude: Tensor | None = None, fault: str = "") -> Tensor:
    at = target.expand(scores.shape[:-1])[..., None]
    mark = scores.gather(-1, at)
    if fault == "hides excluded items in place" and exclude is not None:
        scores.scatter_(-1, exclude.expand(*scores.shape[:-1], -1), -torch.inf)
    ahead = scores > mark if fault == "a tie gives the target" else scores >= mark
    rival = torch.ones_like(ahead)
    if exclude is not None and fault != "exclude ignored":
        rival.scatter_(-1, exclude.expand(*scores.shape[:-1], -1), False)
        if fault == "target excluded":
            hidden = (exclude == target[:, None]).any(dim=1)
            ahead = ahead | hidden[:, None]
    if fault != "padding is an item":
        rival[..., 0] = False
    if fault != "target is its own rival":
        rival.scatter_(-1, at, False)
    return (ahead & rival).sum(dim=-1) + (fault == "ranks from 1")


def masking(item_ids: Tensor, ratio: float, views: int, newest: float | None, seed: int, fault: str = "") -> Draw:
    generator = None if fault == "global RNG" else torch.Generator().manual_seed(seed)
    b, length = item_ids.shape
    real = torch.ones_like(item_ids).bool() if fault == "padding masked" else item_ids != 0
    inputs = item_ids.expand(views, -1, -1).clone()
    draws: list[list[int]] = []
    for m in range(views):
        for u in range(b):
            at = real[u].nonzero()[:, 0].tolist()
            exact = ratio * len(at)
            count = math.floor(exact) if fault == "floor" else math.ceil(exact - 1e-9)
            count = math.ceil(exact) if fault == "ceiling of a rounded product" else count
            count = max(1, round(exact)) if fault == "nearest" else count
            order = torch.rand(len(at), generator=generator)
            if fault == "older first":
                order -= torch.arange(len(at)) * 0.1
            if newest is not None and fault != "newest ignored":
                chosen = bool(torch.rand((), generator=generator) < newest)
                order[-1] = 2.0 if chosen or fault == "newest always" else -1.0
            if fault == "each position by chance":
                drawn = [at[i] for i in (order < ratio).nonzero()[:, 0].tolist()]
            else:
                drawn = [at[i] for i in order.argsort(descending=True)[:count].tolist()]
            if fault == "same mask for all views" and m > 0:
                drawn = draws[u]
            draws.append(drawn)
    rows = torch.tensor([row for row, drawn in enumerate(draws) for _ in drawn], dtype=torch.int64)
    positions = rows * length + torch.tensor([i for drawn in draws for i in drawn], dtype=torch.int64)
    targets = inputs.flatten()[positions]
    inputs.view(-1)[positions] = MASK
    if fault == "targets read after masking":
        targets = inputs.flatten()[positions]
    return Draw(inputs, positions, targets, None, anchor=item_ids, anchor_items=item_ids)


def following(item_ids: Tensor, views: int, fault: str = "") -> Draw:
    inputs, wanted = item_ids[:, :-1], item_ids[:, 1:]
    if fault == "predicts its own input":
        wanted = inputs
    if fault != "first item from padding":
        wanted = wanted.masked_fill(inputs == 0, 0)
    every = wanted.expand(views, -1, -1).flatten()
    positions = (every != 0).nonzero()[:, 0]
    return Draw(inputs.expand(views, -1, -1), positions, every[positions], None, anchor=inputs, anchor_items=wanted)


def plain_step(model: EnsembleKD, item_ids: Tensor, seed: int, fault: str = "") -> Step:
    generator = None if fault == "global RNG" else torch.Generator().manual_seed(seed)
    last = model.newest_only
    draw = model.objective.draw(item_ids, mask_token=model.mask_token, newest_only=last, generator=generator)
    if fault == "masks the caller's ids":
        item_ids[:, -1] = model.mask_token
    (m, b, _), (weight, bias) = draw.inputs.shape, model.classifier_weights()
    views, anchor = model.hidden(draw.inputs.flatten(0, 1)), model.hidden(draw.anchor)
    if fault == "views give no gradient":
        views = views.detach()
    if fault == "the classifier gives no gradient":
        weight = weight.detach()
    if fault == "anchor is the first view":
        anchor = views[:, :b] if m > 1 else views.roll(1, dims=1)
    logits = views.reshape(len(model), -1, views.shape[-1])[:, draw.positions] @ weight.mT + bias[:, None]
    targets = draw.targets if fault == "classes start at 0" else draw.targets - 1
    targets = targets.clamp(max=logits.shape[2] - 1)
    times = 1 if fault == "mean over views" else m
    items = draw.anchor_items.flatten()
    counted = torch.ones_like(items).bool() if fault == "AP at padding" else items != 0
    head: Any = model.attribute_classifier
    tags = anchor.reshape(len(model), -1, anchor.shape[-1]) @ head.weight.mT + head.bias[:, None]
    terms = {model.objective.name: times * ce(logits, targets).sum()}
    total = terms[model.objective.name]
    table: Any = model.attribute_table
    for name, (weight_of, term) in terms_by_name(model.losses).items():
        if isinstance(term, KD):
            terms[name] = times * kd(logits, temperature=term.temperature)
        elif isinstance(term, ICL | CCL):
            real = draw.anchor != 0, draw.inputs.flatten(0, 1) != 0
            kind = "flatten" if fault == "pool ignored" else term.pool
            pairs = zip((anchor, views), real, strict=True)
            a, p = (h if last else pool(h, r, pool=kind) for h, r in pairs)
            terms[name] = contrast(a, p.unflatten(1, (m, b)), temperature=term.temperature)[name == "ccl"]
        else:
            terms[name] = ap(tags, table[items], counted).sum()
        total = total + (1.0 if fault == "weights dropped" else weight_of) * terms[name]
    if fault == "later users weigh more":
        total = total + 0.01 * (torch.arange(b) * item_ids[:, -1]).sum()
    return Step(total, {name: value.detach() for name, value in terms.items()})


FAMILIES: dict[Callable[..., Any], Family] = {
    F.item_cross_entropy: ce,
    F.kl_divergence: kl,
    F.knowledge_distillation: kd,
    F.contrast: contrast,
    F.pool_sequence: pool,
    F.attribute_cross_entropy: ap,
    eager: fused,
    taught_eagerly: taught,
    weigh: weighing,
    ranks: ranking,
    masked_item: masking,
    next_item: following,
    model_step: plain_step,
}
REFUSALS = [
    "hidden of whole numbers pass",
    "no target passes",
    "targets of any type pass",
    "one target too many passes",
    "valid of any type passes",
    "any temperature passes",
    "any tile_rows pass",
    "target -1 is the last item",
]
# The identity -> the faults that it must notice in the family of its function.
KILLS: dict[str, list[str]] = {
    "ce_is_minus_log_probability": ["softmax over targets", "smoothed towards item 0"],
    "ce_ignores_row_shifts": ["padding is a class", "softmax over targets"],
    "ce_of_equal_scores_is_log_v": ["padding is a class"],
    "ce_is_a_mean_over_targets": ["sum over targets"],
    "ce_commutes_with_permutations": ["smoothed towards item 0"],
    "ce_derives_itself": ["detached normaliser"],
    "ce_survives_extreme_logits": ["overflowing exp"],
    "ce_leaves_no_trace": ["shifts its input in place"],
    "kl_is_the_definition": ["symmetric", "student and teacher swapped"],
    "kl_of_equal_distributions_is_zero": ["cross-entropy"],
    "kl_is_never_negative": ["sign lost"],
    "kl_ignores_row_shifts": ["softmax over targets"],
    "kl_temperature_only_divides_logits": ["no temperature", "times tau squared"],
    "kl_is_a_mean_over_targets": ["sum over targets"],
    "kl_leaves_the_teacher_alone": ["teacher not detached"],
    "kl_derives_itself": ["detached normaliser"],
    "kl_survives_extreme_logits": ["overflowing exp"],
    "kd_is_the_double_loop": ["halved", "mean over pairs", "student detached", "teacher is the mean", "symmetric"],
    "kd_gradient_is_n_z_minus_s": ["teacher not detached", "student detached", "halved"],
    "kd_ignores_row_shifts": ["padding is a class"],
    "kd_commutes_with_permutations": ["half of the ordered pairs"],
    "kd_is_zero_for_one_member": ["cross-entropy"],
    "kd_is_zero_for_identical_members": ["cross-entropy"],
    "kd_is_never_negative": ["entropy alone"],
    "kd_is_a_mean_over_targets": ["sum over targets"],
    "kd_at_high_temperature_is_squared_distance": ["always tau squared", "no temperature"],
    "kd_takes_tau_squared_when_asked": ["tau squared refused"],
    "kd_survives_extreme_logits": ["overflowing exp"],
    "kd_leaves_no_trace": ["shifts its input in place"],
    "contrast_is_the_definition": ["positive in the denominator", "anchors of y", "variant ignored", "mean over views"],
    "contrast_commutes_with_permutations": ["later users weigh more", "half of the ordered pairs"],
    "ccl_between_twins_is_icl": ["half of the ordered pairs", "pairs x = y in CCL"],
    "ccl_is_zero_for_one_member": ["pairs x = y in CCL"],
    "contrast_ignores_scale": ["no normalisation", "detached norm"],
    "contrast_at_high_temperature_counts_negatives": ["exp(0) for k = u", "anchor against itself", "sum over users"],
    "contrast_adds_up_over_views": ["logsumexp over views", "mean over views"],
    "contrast_takes_negatives_from_anchors_only": ["negatives among views"],
    "contrast_derives_itself": ["detached norm"],
    "contrast_survives_zero_and_huge_vectors": ["divides by a norm of zero"],
    "contrast_leaves_no_trace": ["normalises in place"],
    "pool_is_the_definition": ["mean over l", "oldest for newest"],
    "pool_ignores_what_stands_at_padding": ["padding not zeroed"],
    "pool_ignores_columns_of_padding": ["padding not zeroed", "oldest for newest"],
    "pool_leaves_no_trace": ["zeroes in place"],
    "ap_is_the_definition": ["softmax over attributes", "padding counts"],
    "ap_of_zero_logits_is_log_2": ["sum over attributes", "divided by all positions"],
    "ap_ignores_padding": ["padding counts", "divided by all positions"],
    "ap_ignores_fillers": ["fillers are attribute 0"],
    "ap_commutes_with_permutations": ["later positions weigh more"],
    "ap_derives_itself": ["gradient of the positives lost"],
    "ap_survives_extreme_logits": ["log of a sigmoid"],
    "ap_leaves_no_trace": ["clamps in place"],
    "fused_is_the_definition": ["no bias", "teacher not detached", "valid ignored", "halved"],
    "fused_is_unfused": ["KD at temperature 1", "tau squared refused", "padding is a class"],
    "fused_tiles_of_any_size_agree": ["last tile dropped", "mean of tile means"],
    "fused_total_is_linear": ["KD times both weights"],
    "fused_skips_invalid_targets": ["valid ignored"],
    "fused_derives_itself": ["half of the gradient"],
    "fused_survives_extreme_logits": ["overflowing exp"],
    "fused_leaves_no_trace": ["zeroes padded rows in place"],
    "fused_refuses_bad_input": REFUSALS,
    "fused_gives_gradients_twice": [
        "gradients given away once",
        "scaled gradients scaled again",
        "upstream gradient dropped",
    ],
    "fused_never_mistakes_a_second_derivative": ["second derivatives are 0"],
    "taught_is_kd_with_one_that_does_not_learn": [
        "half of the ordered pairs",
        "teacher not detached",
        "halved",
        "teacher without its bias",
        "KD times both weights",
        "tau squared refused",
        "no temperature",
    ],
    "taught_reports_what_it_adds_up": ["KD times both weights", "valid ignored", "sum over targets"],
    "taught_tiles_of_any_size_agree": ["last tile dropped", "mean of tile means"],
    "taught_students_do_not_meet": ["mean over students", "the other student teaches"],
    "taught_by_itself_it_learns_nothing": ["cross-entropy", "teacher without its bias"],
    "taught_skips_invalid_targets": ["valid ignored"],
    "taught_survives_extreme_logits": ["overflowing exp"],
    "taught_leaves_no_trace": ["zeroes padded rows in place"],
    "taught_refuses_bad_input": REFUSALS,
    "taught_gives_gradients_twice": [
        "gradients given away once",
        "scaled gradients scaled again",
        "upstream gradient dropped",
    ],
    "taught_never_mistakes_a_second_derivative": ["second derivatives are 0"],
    "weights_are_linear": ["weights dropped"],
    "rank_is_a_count_of_rivals": ["exclude ignored", "a tie gives the target"],
    "rank_of_a_constant_scorer_is_last": ["a tie gives the target"],
    "rank_of_the_best_is_zero": ["ranks from 1", "target is its own rival"],
    "rank_never_counts_padding": ["padding is an item"],
    "rank_ignores_an_excluded_target": ["target excluded"],
    "rank_leaves_no_trace": ["hides excluded items in place"],
    "mask_count_is_the_ceiling": ["each position by chance", "floor", "nearest", "ceiling of a rounded product"],
    "mask_never_falls_on_padding": ["padding masked"],
    "mask_targets_are_what_it_hides": ["targets read after masking"],
    "mask_repeats_from_a_generator": ["global RNG"],
    "mask_differs_between_views_and_sequences": ["same mask for all views"],
    "mask_falls_on_every_position_alike": ["older first"],
    "mask_hides_the_newest_as_often_as_asked": ["newest ignored", "newest always"],
    "next_item_targets_follow_their_inputs": ["predicts its own input", "first item from padding"],
    "step_is_what_the_oracles_add_up_to": [
        "views give no gradient",
        "the classifier gives no gradient",
        "mean over views",
        "classes start at 0",
        "AP at padding",
        "anchor is the first view",
        "pool ignored",
        "weights dropped",
    ],
    "step_is_linear_in_its_weights": ["weights dropped"],
    "step_ignores_columns_of_padding": ["AP at padding"],
    "step_ignores_the_order_of_sequences": ["later users weigh more"],
    "step_leaves_no_trace": ["global RNG", "masks the caller's ids"],
}
MUTANTS = [(check, fault) for check, faults in KILLS.items() for fault in faults]


def family_of(check: str) -> Family:
    return FAMILIES[IDENTITIES[check].of]


@pytest.mark.parametrize(
    ("check", "fault"), MUTANTS, ids=[f"{family_of(c).__name__}: {f} killed-by {c}" for c, f in MUTANTS]
)
def test_mutant(check: str, fault: str) -> None:
    with pytest.raises(AssertionError):
        IDENTITIES[check].hold(partial(family_of(check), fault=fault), HUNT)


@pytest.mark.parametrize("check", IDENTITIES)
def test_without_its_fault_a_family_passes(check: str) -> None:
    IDENTITIES[check].hold(family_of(check), BRIEF)


def test_every_identity_kills_a_mutant() -> None:
    assert KILLS.keys() == IDENTITIES.keys()


def test_the_zoo_is_large() -> None:
    assert len({(family_of(check), fault) for check, fault in MUTANTS}) >= 24
