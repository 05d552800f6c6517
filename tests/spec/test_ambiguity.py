"""Ambiguity: the members' spread around their ensemble, alone and in the item losses, and wrong versions of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble_kd import functional as F
from ensemble_kd.distillation import FromTeacher
from ensemble_kd.encoders import SASRec
from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import Ambiguity, ItemLosses, Spread, item_losses, sampled_item_losses
from ensemble_kd.objectives import NextItem
from tests.spec import reference
from tests.spec.strategies import Classified, Predictions, classified, permutation, predictions, seeds, temperatures
from tests.spec.test_identities import (
    Identity,
    agree,
    close,
    derives_itself,
    differentiable,
    eager,
    finite,
    fused_total,
    gradients,
    leaves_no_trace,
)
from tests.spec.test_mutants import fused
from tests.spec.zoo import checked_by, played

ALONE = {"p": predictions()}
FUSED: dict[str, Any] = {"case": classified(), "tau": temperatures, "weight": st.sampled_from([-1.0, -0.5, 0.7, 3.0])}


def plain(logits: Tensor, fault: str = "") -> Tensor:
    """The definition, or a wrong one."""
    if fault == "shifts its input in place":
        logits -= logits.amax(dim=-1, keepdim=True)
    p = logits if fault != "padding is a class" else torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1)
    log_p = p.log_softmax(-1)
    if fault == "overflowing exp":
        log_p = (p.exp() / p.exp().sum(-1, keepdim=True)).log()
    log_g = p.mean(0).log_softmax(-1)
    if fault == "mean of probabilities":
        log_g = log_p.logsumexp(0) - torch.tensor(float(len(p))).log()
    if fault == "median member":
        log_g = log_p[len(p) // 2]
    if fault == "ensemble of the first two":
        log_g = p[:2].mean(0).log_softmax(-1)
    if fault == "members cut off":
        log_p = log_p.detach()
    rows = (log_g.exp() * (log_g - log_p)).sum(-1)
    if fault == "from members to the ensemble":
        rows = (log_p.exp() * (log_p - log_g)).sum(-1)
    if fault == "cross-entropy":
        rows = -(log_g.exp() * log_p).sum(-1)
    if fault == "sign lost":
        rows = -rows
    members = rows.sum(-1) if fault == "sum over targets" else rows.mean(-1)
    return members.mean() if fault == "mean over members" else members.sum()


def in_tiles(*args: Any, ambiguity_weight: float, fault: str = "", **options: Any) -> ItemLosses:
    """The other losses from the zoo's plain ones, and ambiguity from stored logits."""
    hidden, weight, bias, _ = args
    valid = options.get("valid")
    others = fused(*args, **options)
    kept = hidden if valid is None or fault == "valid ignored" else hidden[:, valid]
    tau = options.get("temperature", 1.0) if fault == "at the temperature of KD" else 1.0
    logits = kept @ weight.mT / tau
    if bias is not None and fault != "no bias":
        logits = logits + bias[:, None] / tau
    value = plain(logits)
    coefficient = max(ambiguity_weight, 0.0) if fault == "no weight below 0" else ambiguity_weight
    if fault == "counts only with KD" and not options.get("kd_weight"):
        coefficient = 0.0
    return others._replace(total=others.total + coefficient * value, ambiguity=value.detach())


def is_the_definition(f: Callable[..., Tensor], p: Predictions) -> None:
    agree(f, reference.ambiguity, p.logits)


def is_what_the_ensemble_gains(f: Callable[..., Tensor], p: Predictions) -> None:
    """Cross-entropy of the ensemble = mean of the members' - ambiguity per member, values and gradients."""

    def members(logits: Tensor) -> Tensor:
        return F.item_cross_entropy(logits, p.targets).mean() - f(logits) / len(logits)

    agree(members, lambda logits: F.item_cross_entropy(logits.mean(0)[None], p.targets).sum(), p.logits)


def gradient_is_p_minus_p_g(f: Callable[..., Tensor], p: Predictions) -> None:
    (got,) = gradients(f, p.logits)
    want = (p.logits.softmax(-1) - p.logits.mean(0).softmax(-1)) / p.logits.shape[1]
    close(got, want)


def is_never_negative(f: Callable[..., Tensor], p: Predictions) -> None:
    assert f(p.logits) >= -1e-12


def is_zero_for_equal_members(f: Callable[..., Tensor], p: Predictions) -> None:
    close(f(p.logits[:1].expand(3, -1, -1) + torch.tensor([0.0, 5.0, -2.0], dtype=torch.float64)[:, None, None]),
          torch.zeros((), dtype=torch.float64))  # fmt: skip


def commutes_with_permutations(f: Callable[..., Tensor], p: Predictions, seed: int) -> None:
    n, _, v = p.logits.shape
    close(f(p.logits[permutation(n, seed)][..., permutation(v, seed)]), f(p.logits))


def ignores_row_shifts(f: Callable[..., Tensor], p: Predictions) -> None:
    shifts = torch.arange(p.logits[..., 0].numel(), dtype=torch.float64).view_as(p.logits[..., :1])
    close(f(p.logits + shifts), f(p.logits))


def derives(f: Callable[..., Tensor], p: Predictions) -> None:
    derives_itself(f, p.logits)


def survives_extreme_logits(f: Callable[..., Tensor], p: Predictions) -> None:
    finite(f, 1e4 * p.logits)


def leaves_its_input(f: Callable[..., Tensor], p: Predictions) -> None:
    leaves_no_trace(f, p.logits)


def is_a_part_of_the_total(f: Callable[..., ItemLosses], case: Classified, tau: float, weight: float) -> None:
    for kd_weight in (0.0, 0.6):
        options = {"kd_weight": kd_weight, "temperature": tau, "ambiguity_weight": weight}
        agree(*(fused_total(losses, case, **options) for losses in (f, in_tiles)), *differentiable(case))
        got, want = (losses(*case[:4], valid=case.valid, **options) for losses in (f, in_tiles))
        close(got.ambiguity, want.ambiguity)


def joint_training_is_that_of_one_network(f: Callable[..., ItemLosses], case: Classified, **_: Any) -> None:
    def ensemble(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = (hidden @ weight.mT + (0 if case.bias is None else bias[:, None])).mean(0)[None]
        kept = torch.ones(len(case.targets), dtype=torch.bool) if case.valid is None else case.valid
        return len(hidden) * F.item_cross_entropy(logits[:, kept], case.targets[kept]).sum()

    agree(fused_total(f, case, ambiguity_weight=-1.0), ensemble, *differentiable(case))


DEFINITION = Identity(is_the_definition, F.ambiguity, ALONE)
GAIN = Identity(is_what_the_ensemble_gains, F.ambiguity, ALONE)
GRADIENT = Identity(gradient_is_p_minus_p_g, F.ambiguity, ALONE)
PART = Identity(is_a_part_of_the_total, eager, FUSED)
JOINT = Identity(joint_training_is_that_of_one_network, eager, FUSED)
KINDS = [
    (
        DEFINITION,
        plain,
        ["mean of probabilities", "from members to the ensemble", "mean over members", "median member"],
    ),
    (GAIN, plain, ["sum over targets", "ensemble of the first two", "sign lost"]),
    (GRADIENT, plain, ["members cut off", "mean over members"]),
    (Identity(is_never_negative, F.ambiguity, ALONE), plain, ["sign lost"]),
    (Identity(is_zero_for_equal_members, F.ambiguity, ALONE), plain, ["cross-entropy"]),
    (Identity(commutes_with_permutations, F.ambiguity, {**ALONE, "seed": seeds}), plain, ["median member"]),
    (Identity(ignores_row_shifts, F.ambiguity, ALONE), plain, ["padding is a class"]),
    (Identity(derives, F.ambiguity, ALONE), plain, ["members cut off"]),
    (Identity(survives_extreme_logits, F.ambiguity, ALONE), plain, ["overflowing exp"]),
    (Identity(leaves_its_input, F.ambiguity, ALONE), plain, ["shifts its input in place"]),
    (PART, in_tiles, ["at the temperature of KD", "no weight below 0", "counts only with KD", "no bias"]),
    (JOINT, in_tiles, ["no weight below 0", "valid ignored"]),
]
test_ambiguity, test_ambiguity_without_a_fault_passes, test_ambiguity_mutant = checked_by(KINDS)


@settings(max_examples=20)
@given(case=classified())
def test_ambiguity_in_tiles_of_any_size(case: Classified) -> None:
    options: dict[str, Any] = {"ambiguity_weight": -0.5, "kd_weight": 0.3, "temperature": 0.5}
    whole, by_rows = (fused_total(eager, case, tile_rows=rows, **options) for rows in (None, 1))
    agree(by_rows, whole, *differentiable(case))


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("kd_weight", [0.0, 1.0])
def test_ambiguity_over_processes(members: int, kd_weight: float) -> None:
    """Two processes, of which one is played by what it would send: values add up, gradients are those of one."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(2 * members, size, 3, generator=rng, dtype=torch.float64) for size in (4, 6))
    targets = torch.tensor([0, 5, 2, 2])
    options: dict[str, Any] = {"ambiguity_weight": -0.7, "kd_weight": kd_weight, "temperature": 0.5}
    leaf = hidden.clone().requires_grad_()
    joined = item_losses(leaf, weight, None, targets, **options)
    joined.total.backward()
    parts = [slice(members), slice(members, None)]
    found = []

    def over(hidden: Tensor, weight: Tensor, spread: Spread) -> ItemLosses:
        return item_losses(hidden, weight, None, targets, spread=spread, **options)

    for mine, theirs in (parts, parts[::-1]):
        there = hidden[theirs].clone().requires_grad_()
        spread = played(2 * members, partial(over, there, weight[theirs]))
        own = hidden[mine].clone().requires_grad_()
        losses = over(own, weight[mine], spread)
        losses.total.backward()
        assert leaf.grad is not None
        close(own.grad, leaf.grad[mine])
        found.append(losses)
    close(found[0].ambiguity + found[1].ambiguity, joined.ambiguity)
    close(found[0].total + found[1].total, joined.total.detach())


def test_ambiguity_over_candidates() -> None:
    """All items as candidates that count once are no sample."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(3, 5, 4), torch.randn(3, 7, 4), torch.randn(3, 7)
    targets, counts = torch.tensor([0, 3, 6, 2, 2]), torch.ones(7, dtype=torch.long)
    for tau in (1.0, 0.5):
        options: Any = {"kd_weight": 1.0, "temperature": tau, "ambiguity_weight": -0.5}
        got = sampled_item_losses(hidden, weight, bias, targets, counts, **options)
        want = item_losses(hidden, weight, bias, targets, **options)
        close(got.ambiguity, want.ambiguity, 1e-5)
        close(got.total, want.total, 1e-5)


def test_ambiguity_of_one_member_is_0() -> None:
    hidden, weight, targets = torch.randn(1, 2, 3), torch.randn(1, 4, 3), torch.tensor([0, 3])
    assert item_losses(hidden, weight, None, targets, ambiguity_weight=-1.0).ambiguity == 0
    assert F.ambiguity(torch.randn(1, 2, 3)) == 0


def test_ambiguity_in_a_step() -> None:
    """A sum over views of means; the weight applies to it, and a teacher outside refuses it."""
    ids = torch.randint(1, 8, (3, 5), generator=torch.Generator().manual_seed(0))
    model = EnsembleKD(
        lambda: SASRec(7, d_model=4, max_len=5, dropout=0), n=3, objective=NextItem(2), losses=0
    ).double()
    alone = model.loss(ids)
    model.losses = -0.5 * Ambiguity()
    step = model.loss(ids)
    p = model.hidden(ids[:, :-1]).flatten(1, 2) @ model.classifier_weights()[0].mT
    close(step.terms["ambiguity"], 2 * reference.ambiguity(p + model.classifier_weights()[1][:, None]).detach())
    close(step.total, alone.total - 0.5 * step.terms["ambiguity"])
    with pytest.raises(EnsembleKDError, match="FromTeacher: expected losses without Ambiguity, got -1"):
        model.loss(ids, item_loss=FromTeacher(model))


@pytest.mark.slow
def test_ambiguity_compiles() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(3, 5, 4), torch.randn(3, 7, 4), torch.randn(3, 7)
    targets = torch.tensor([0, 3, 6, 2, 2])
    totals = []
    for compiled in (True, False):
        leaf = hidden.clone().requires_grad_()
        options: Any = {"kd_weight": 1.0, "temperature": 0.5, "ambiguity_weight": -0.5, "compiled": compiled}
        found = item_losses(leaf, weight, bias, targets, **options)
        found.total.backward()
        totals.append((found.total.detach(), found.ambiguity, leaf.grad))
    for got, want in zip(*totals, strict=True):
        close(got, want, 1e-5)
