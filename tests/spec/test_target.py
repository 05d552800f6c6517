"""KD of the target's probability alone, and KD from better members alone: definitions, consequences, wrong versions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from ensemble_kd import functional as F
from ensemble_kd.distillation import FromTeacher
from ensemble_kd.encoders import SASRec
from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import KD, ItemLosses, Spread, item_losses, sampled_item_losses
from tests.spec import reference
from tests.spec.strategies import Classified, Predictions, classified, permutation, predictions, seeds
from tests.spec.test_identities import (
    Identity,
    agree,
    close,
    differentiable,
    eager,
    finite,
    fused_total,
    gradients,
    leaves_no_trace,
)
from tests.spec.zoo import checked_by, played

TAUS = st.sampled_from([0.5, 1.0, 2.0])
ALONE: dict[str, Any] = {"p": predictions(n=st.integers(1, 4)), "tau": TAUS}
FUSED: dict[str, Any] = {
    "case": classified(n=st.integers(2, 4)),
    "tau": TAUS,
    "part": st.sampled_from(["all", "target"]),
    "gate": st.sampled_from(["open", "better"]),
    "between": st.sampled_from(["all", "same", "other"]),
    "kinds": st.lists(st.integers(0, 1), min_size=4, max_size=4),
}


def plain(logits: Tensor, targets: Tensor, *, temperature: float, fault: str = "") -> Tensor:
    """The double loop, or a wrong one."""
    if fault == "shifts its input in place":
        logits -= logits.amax(dim=-1, keepdim=True)
    tau = 1.0 if fault == "no temperature" else temperature
    log_z = (logits / tau).log_softmax(-1)
    if fault == "overflowing exp":
        log_z = ((logits / tau).exp() / (logits / tau).exp().sum(-1, keepdim=True)).log()
    at = targets if fault != "first item for target" else torch.zeros_like(targets)
    mine = log_z.gather(2, at.expand(len(logits), -1)[..., None])[..., 0]
    others = log_z.masked_fill(torch.nn.functional.one_hot(at, log_z.shape[2]).bool(), -torch.inf).logsumexp(-1)
    learning = [part.detach() if fault == "student detached" else part for part in (mine, others)]
    total = logits.new_zeros(())
    for x in range(len(logits)):
        for y in range(len(logits)):
            fixed = [part[x] if fault == "teacher not detached" else part[x].detach() for part in (mine, others)]
            halves = [a.exp() * (a - b[y]) for a, b in zip(fixed, learning, strict=True)]
            if fault == "all items":
                row = log_z[x].detach()
                halves = [(row.exp() * (row - log_z[y])).sum(-1)]
            row = halves[0] if fault == "the rest left out" else sum(halves)
            if fault == "half of the ordered pairs" and x > y:
                continue
            if fault == "cross-entropy":
                row = -sum(a.exp() * b[y] for a, b in zip(fixed, learning, strict=True))
            total = total + (row.sum() if fault == "sum over targets" else row.mean())
    return total


def chosen(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    valid: Tensor | None = None,
    kd_weight: float = 0.0,
    fault: str = "",
    **options: Any,
) -> ItemLosses:
    """Cross-entropy and KD by the oracles, or by wrong ones."""
    kept = torch.ones(len(targets), dtype=torch.bool) if valid is None else valid
    p, tau = reference.logits(hidden[:, kept], weight, bias), options.pop("temperature")
    options["kinds"] = tuple(options.get("kinds", ()))
    judged, targets = p, targets[kept]
    if fault in ("part ignored", "gate ignored", "between ignored"):
        options.pop(fault.split()[0])
    if fault == "the best member teaches" and options.get("gate") == "better":
        # only the best of all, where every better one should
        best = torch.stack([torch.stack([reference.softmax(row)[t] for row, t in zip(member, targets, strict=True)])
                            for member in p]).argmax(0)  # fmt: skip
        value = p.new_zeros(())
        for y in range(len(p)):
            for t in range(len(targets)):
                pair = torch.stack([p[best[t], t], p[y, t]])[:, None]
                value = value + reference.kl(pair[0], pair[1], tau) / len(targets)
    elif fault == "worse members teach" and options.get("gate") == "better":
        everyone = reference.chosen_kd(judged, targets, tau, **{**options, "gate": "open"})
        value = everyone - reference.chosen_kd(judged, targets, tau, **options)
    elif fault == "gate at the temperature of KD" and options.get("gate") == "better":
        value = reference.chosen_kd(judged / tau, targets, 1.0, **options)
    else:
        value = reference.chosen_kd(judged, targets, tau, **options)
    if fault == "gate decides for the batch" and options.get("gate") == "better":
        order = reference.mip(p, targets).argsort(descending=True)
        value = sum(
            (reference.kl(p[x], p[y], tau) for i, y in enumerate(order) for x in order[i + 1 :]), p.new_zeros(())
        )
    ce = reference.mip(p, targets)
    return ItemLosses(ce.sum() + kd_weight * value, ce.detach(), value.detach())


def is_the_definition(f: Callable[..., Tensor], p: Predictions, tau: float) -> None:
    oracle = partial(reference.chosen_kd, targets=p.targets, tau=tau, part="target")
    agree(partial(f, targets=p.targets, temperature=tau), oracle, p.logits)


def gradient_is_a_factor_of_that_of_ce(f: Callable[..., Tensor], p: Predictions, tau: float) -> None:
    """(p_a - e) (1 - mu sum_x (pi_a - pi_x) / (1 - pi_a)), at temperature 1."""
    mu = 0.7

    def both(logits: Tensor) -> Tensor:
        return F.item_cross_entropy(logits, p.targets).sum() + mu * f(logits, p.targets, temperature=1.0)

    n, t, v = p.logits.shape
    z, e = p.logits.softmax(-1), torch.nn.functional.one_hot(p.targets, v)
    pi = (z * e).sum(-1)
    factor = 1 - mu * (n * pi - pi.sum(0)) / (z * (1 - e)).sum(-1)
    close(gradients(both, p.logits)[0], (z - e) * factor[..., None] / t, 1e-7)


def leaves_the_order_of_other_items(f: Callable[..., Tensor], p: Predictions, tau: float) -> None:
    """On items that are no target the gradient is a multiple of the student's own probabilities."""
    (slopes,) = gradients(partial(f, targets=p.targets, temperature=tau), p.logits)
    z = (p.logits / tau).softmax(-1)
    others = ~torch.nn.functional.one_hot(p.targets, p.logits.shape[2]).bool().expand_as(z)
    share = (slopes * others).sum(-1, keepdim=True) / (z * others).sum(-1, keepdim=True)
    close(slopes.where(others, 0), (share * z).where(others, 0), 1e-7)


def is_at_most_all_of_kd(f: Callable[..., Tensor], p: Predictions, tau: float) -> None:
    value = f(p.logits, p.targets, temperature=tau)
    assert -1e-12 <= value <= F.knowledge_distillation(p.logits, temperature=tau) + 1e-9


def with_two_items_is_all_of_kd(f: Callable[..., Tensor], p: Predictions, tau: float) -> None:
    logits, targets = p.logits[..., :2], p.targets.clamp(max=1)
    oracle = partial(F.knowledge_distillation, temperature=tau)
    agree(partial(f, targets=targets, temperature=tau), oracle, logits)


def is_zero_where_all_know_the_target_as_well(f: Callable[..., Tensor], p: Predictions, tau: float) -> None:
    """The members differ in the order of the other items alone."""
    row = p.logits[0]
    members = []
    for seed in range(3):
        order = permutation(row.shape[1], seed)
        members.append(row.index_select(1, order))
        for t, target in enumerate(p.targets):
            at = int((order == target).nonzero()[0, 0])
            members[-1][t, [at, target]] = members[-1][t, [target, at]]
    close(f(torch.stack(members), p.targets, temperature=tau), torch.zeros((), dtype=torch.float64))


def commutes_with_permutations(f: Callable[..., Tensor], p: Predictions, tau: float, seed: int) -> None:
    one = partial(f, targets=p.targets, temperature=tau)
    close(one(p.logits[permutation(len(p.logits), seed)]), one(p.logits))


def survives_extreme_logits(f: Callable[..., Tensor], p: Predictions, tau: float) -> None:
    finite(partial(f, targets=p.targets, temperature=tau), 1e4 * p.logits)


def leaves_its_input(f: Callable[..., Tensor], p: Predictions, tau: float) -> None:
    leaves_no_trace(partial(f, targets=p.targets, temperature=tau), p.logits)


def is_the_double_loop(f: Callable[..., ItemLosses], case: Classified, tau: float, **options: Any) -> None:
    options = {**options, "kinds": options["kinds"][: len(case.hidden)], "kd_weight": 1.5, "temperature": tau}
    p = reference.logits(case.hidden, case.weight, case.bias).log_softmax(-1)
    known = p.gather(2, case.targets.expand(len(p), -1)[..., None])[..., 0].sort(dim=0).values
    assume(options["gate"] == "open" or bool((known.diff(dim=0) > 1e-9).all()))  # a tie may fall either way
    agree(*(fused_total(losses, case, **options) for losses in (f, chosen)), *differentiable(case))
    close(*(losses(*case[:4], valid=case.valid, **options).kd for losses in (f, chosen)))


TARGET = F.target_distillation
KINDS: list[tuple[Identity, Callable[..., Any], list[str]]] = [
    (
        Identity(is_the_definition, TARGET, ALONE),
        plain,
        ["all items", "the rest left out", "half of the ordered pairs", "no temperature", "sum over targets"],
    ),
    (
        Identity(gradient_is_a_factor_of_that_of_ce, TARGET, ALONE),
        plain,
        ["teacher not detached", "student detached", "first item for target"],
    ),
    (Identity(leaves_the_order_of_other_items, TARGET, ALONE), plain, ["all items", "first item for target"]),
    (Identity(is_at_most_all_of_kd, TARGET, ALONE), plain, ["cross-entropy"]),
    (Identity(with_two_items_is_all_of_kd, TARGET, ALONE), plain, ["the rest left out"]),
    (Identity(is_zero_where_all_know_the_target_as_well, TARGET, ALONE), plain, ["all items", "cross-entropy"]),
    (
        Identity(commutes_with_permutations, TARGET, {**ALONE, "seed": seeds}),
        plain,
        ["half of the ordered pairs"],
    ),
    (Identity(survives_extreme_logits, TARGET, ALONE), plain, ["overflowing exp"]),
    (Identity(leaves_its_input, TARGET, ALONE), plain, ["shifts its input in place"]),
    (
        Identity(is_the_double_loop, eager, FUSED),
        chosen,
        [
            "part ignored",
            "gate ignored",
            "between ignored",
            "worse members teach",
            "the best member teaches",
            "gate at the temperature of KD",
            "gate decides for the batch",
        ],
    ),
]
test_target, test_target_without_a_fault_passes, test_target_mutant = checked_by(KINDS)


def problem(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(n, *s, generator=rng, dtype=dtype) for s in ((4, 3), (6, 3), (6,)))
    return hidden, weight, bias, torch.tensor([0, 5, 2, 2])


def test_gate_leaves_the_best_member_alone() -> None:
    hidden, weight, bias, targets = problem(3)
    for part in ("all", "target"):
        leaf = hidden.clone().requires_grad_()
        options: dict[str, Any] = {"ce_weight": 0.0, "kd_weight": 1.0, "part": part, "gate": "better"}
        item_losses(leaf, weight, bias, targets, **options).total.backward()
        known = (hidden @ weight.mT + bias[:, None]).log_softmax(-1)[:, torch.arange(4), targets]
        assert leaf.grad is not None
        for t in range(4):
            learns = leaf.grad[:, t].abs().sum(-1) > 1e-12
            assert learns.tolist() == (known[:, t] < known[:, t].max()).tolist()


def test_target_over_processes() -> None:
    """Two processes, of which one is played by what it would send. A gate needs the members in one."""
    hidden, weight, bias, targets = problem(4)
    for tau in (1.0, 0.5):
        options: dict[str, Any] = {"kd_weight": 1.0, "temperature": tau, "part": "target"}
        leaf = hidden.clone().requires_grad_()
        joined = item_losses(leaf, weight, bias, targets, **options)
        joined.total.backward()
        kd = []
        for mine, theirs in ((slice(2), slice(2, None)), (slice(2, None), slice(2))):
            there = hidden[theirs].clone().requires_grad_()
            run = partial(item_losses, targets=targets, **options)
            spread = played(4, partial(run, there, weight[theirs], bias[theirs]))
            own = hidden[mine].clone().requires_grad_()
            losses = run(own, weight[mine], bias[mine], spread=spread)
            losses.total.backward()
            assert leaf.grad is not None
            close(own.grad, leaf.grad[mine])
            kd.append(losses.kd)
        close(kd[0] + kd[1], joined.kd)
    with pytest.raises(EnsembleKDError, match="item_losses: expected gate='open' where members are spread"):
        item_losses(*problem(2), kd_weight=1.0, gate="better", spread=Spread(4, lambda x: x))


def test_target_over_candidates() -> None:
    """All items as candidates that count once are no sample."""
    hidden, weight, bias, targets = problem(3, torch.float32)
    counts = torch.ones(6, dtype=torch.long)
    for tau in (1.0, 0.5):
        for options in ({"part": "target"}, {"gate": "better"}):
            every: Any = {"kd_weight": 1.0, "temperature": tau, **options}
            got = sampled_item_losses(hidden, weight, bias, targets, counts, **every)
            close(got.kd, item_losses(hidden, weight, bias, targets, **every).kd, 1e-5)


def test_target_of_certain_members_stays_finite() -> None:
    """Where a probability is 1 as far as digits go, 1 - pi is not 0, and nothing explodes."""
    for scale in (20.0, 1e4):
        hidden = scale * torch.eye(3).expand(2, 3, 3).clone()
        hidden[1, 0] = hidden[1, 0].flip(0)
        leaf = hidden.requires_grad_()
        losses = item_losses(leaf, torch.eye(3).expand(2, 3, 3), None, torch.arange(3), kd_weight=1.0, part="target")
        losses.total.backward()
        assert 1 < losses.kd < torch.inf
        assert leaf.grad is not None
        assert leaf.grad.abs().max() < 3


def test_target_in_a_model() -> None:
    """The settings reach the loss; students of an ensemble outside refuse them."""
    ids = torch.randint(1, 8, (3, 5), generator=torch.Generator().manual_seed(0))
    model = EnsembleKD(lambda: SASRec(7, d_model=4, max_len=5, dropout=0, init_std=1.0), n=3).double()
    weight, bias = model.classifier_weights()
    p = model.hidden(ids[:, :-1]).flatten(1, 2) @ weight.mT + bias[:, None]
    for kd in (KD(temperature=0.7, part="target"), KD(temperature=0.7, gate="better")):
        model.losses = kd
        want = reference.chosen_kd(p, ids[:, 1:].flatten() - 1, 0.7, part=kd.part, gate=kd.gate)
        close(model.loss(ids).terms["kd"], want.detach())
        with pytest.raises(EnsembleKDError, match=r"FromTeacher: expected KD\(temperature=0.7\), got KD"):
            model.loss(ids, item_loss=FromTeacher(model))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"part": "target"}, {"gate": "better"}, {"part": "target", "gate": "better"}])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_target_compiles(options: dict[str, Any], tau: float) -> None:
    hidden, weight, bias, targets = problem(3, torch.float32)
    found = []
    for compiled in (True, False):
        leaf = hidden.clone().requires_grad_()
        every: Any = {"kd_weight": 1.0, "temperature": tau, "compiled": compiled, **options}
        losses = item_losses(leaf, weight, bias, targets, **every)
        losses.total.backward()
        found.append((losses.total.detach(), losses.kd, leaf.grad))
    for got, want in zip(*found, strict=True):
        close(got, want, 1e-5)
