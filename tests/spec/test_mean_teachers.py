"""KD from moving averages of the other members: definitions, consequences, wrong versions, and a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ensemble_kd import functional as F
from ensemble_kd.distillation import FromTeacher
from ensemble_kd.distributed import Place
from ensemble_kd.encoders import GRU4Rec, SASRec
from ensemble_kd.ensemble import EnsembleKD, MeanTeachers
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import KD, Ambiguity, ItemLosses, Networks, item_losses, mean_teacher_losses
from ensemble_kd.objectives import NextItem
from tests.spec import reference
from tests.spec.strategies import Classified, Predictions, classified, permutation, predictions, seeds
from tests.spec.test_identities import Identity, agree, close, differentiable, finite, fused_total, gradients
from tests.spec.zoo import checked_by
from tests.training.runs import assert_ends_as, sasrec, train

TAUS = st.sampled_from([0.5, 1.0, 2.0])
ALONE: dict[str, Any] = {"p": predictions(n=st.integers(1, 4)), "tau": TAUS, "seed": seeds}
FUSED: dict[str, Any] = {
    "case": classified(n=st.integers(2, 4)),
    "tau": TAUS,
    "seed": seeds,
    "between": st.sampled_from(["all", "same", "other"]),
    "kinds": st.lists(st.integers(0, 1), min_size=4, max_size=4),
}


def other(x: Tensor, seed: int) -> Tensor:
    """What an average could have in the place of ``x``."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def averages_of(case: Classified, seed: int) -> Networks:
    bias = None if case.bias is None else other(case.bias, seed + 2)
    return Networks(other(case.hidden, seed), other(case.weight, seed + 1), bias)


def plain(logits: Tensor, averages: Tensor, *, temperature: float, fault: str = "") -> Tensor:
    """The double loop, or a wrong one."""
    tau = 1.0 if fault == "no temperature" else temperature
    log_z, log_a = (logits / tau).log_softmax(-1), (averages / tau).log_softmax(-1)
    if fault != "averages not detached":
        log_a = log_a.detach()
    if fault == "overflowing exp":
        log_z = ((logits / tau).exp() / (logits / tau).exp().sum(-1, keepdim=True)).log()
    if fault == "members for averages":
        log_a = log_z.detach()
    total = logits.new_zeros(())
    for x in range(len(logits)):
        for y in range(len(logits)):
            if x == y and fault != "its own average teaches, too":
                continue
            if fault == "half of the ordered pairs" and x > y:
                continue
            if fault == "only its own average" and x != y:
                continue
            one, two = (log_z[y], log_a[x]) if fault == "the other way round" else (log_a[x], log_z[y])
            row = (one.exp() * (one - two)).sum(-1)
            total = total + (row.sum() if fault == "sum over targets" else row.mean())
    return total / max(1, len(logits) - 1) if fault == "mean over averages" else total


def definition(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, averages: Networks, targets: Tensor, *,
    valid: Tensor | None = None, ce_weight: float = 1.0, kd_weight: float = 1.0, temperature: float = 1.0,
    between: str = "all", kinds: Any = (), fault: str = "",
) -> ItemLosses:  # fmt: skip
    """Cross-entropy and KD by the oracles, or by wrong ones."""
    kept = torch.ones(len(targets), dtype=torch.bool) if valid is None else valid
    p = reference.logits(hidden[:, kept], weight, bias)
    q = reference.logits(averages.hidden[:, kept], averages.weight, None if fault == "no bias" else averages.bias)
    kd = p.new_zeros(())
    for x in range(len(p)):
        for y in range(len(p)):
            fits = between == "all" or (kinds[x] == kinds[y]) == (between == "same")
            own = x == y and not (fault == "its own average teaches, too" and between == "same")
            if own or not (fits or fault == "between ignored"):
                continue
            kd = kd + reference.kl((p if fault == "members for averages" else q)[x], p[y], temperature)
    if fault == "invalid targets count" and valid is not None:
        kd = kd * kept.sum() / len(kept)
    ce = reference.mip(p, targets[kept])
    return ItemLosses(ce_weight * ce.sum() + kd_weight * kd, ce.detach(), kd.detach())


def is_the_definition(f: Callable[..., Tensor], p: Predictions, tau: float, seed: int) -> None:
    averages = other(p.logits, seed)

    def oracle(logits: Tensor, averages: Tensor) -> Tensor:
        pairs = [(x, y) for x in range(len(logits)) for y in range(len(logits)) if x != y]
        return sum((reference.kl(averages[x], logits[y], tau) for x, y in pairs), logits.sum() * 0)

    agree(partial(f, temperature=tau), oracle, p.logits, averages)


def with_members_as_averages_is_kd(f: Callable[..., Tensor], p: Predictions, tau: float, seed: int) -> None:
    agree(
        lambda logits: f(logits, logits, temperature=tau), partial(F.knowledge_distillation, temperature=tau), p.logits
    )


def moves_members_towards_the_others_average(f: Callable[..., Tensor], p: Predictions, tau: float, seed: int) -> None:
    """The gradient in y's logits is sum_x (z_y - a_x) / (tau t)."""
    averages = other(p.logits, seed)
    z, a = (p.logits / tau).softmax(-1), (averages / tau).softmax(-1)
    n, t, _ = z.shape
    want = ((n - 1) * z - (a.sum(0) - a)) / (tau * t)
    close(gradients(partial(f, averages=averages, temperature=tau), p.logits)[0], want, 1e-7)


def is_zero_only_where_all_agree(f: Callable[..., Tensor], p: Predictions, tau: float, seed: int) -> None:
    """Members that all score as one average does."""
    rows = p.logits[:1].expand_as(p.logits)
    close(f(rows, rows + 3.0, temperature=tau), torch.zeros((), dtype=torch.float64))
    if len(rows) > 1:
        moved = rows.clone()
        moved[0, 0, 0] += 1.0
        assert f(rows, moved, temperature=tau) > 1e-9


def commutes_with_permutations(f: Callable[..., Tensor], p: Predictions, tau: float, seed: int) -> None:
    order, averages = permutation(len(p.logits), seed), other(p.logits, seed)
    close(f(p.logits[order], averages[order], temperature=tau), f(p.logits, averages, temperature=tau))


def survives_extreme_logits(f: Callable[..., Tensor], p: Predictions, tau: float, seed: int) -> None:
    finite(partial(f, averages=other(p.logits, seed), temperature=tau), 1e4 * p.logits)


def is_the_double_loop(
    f: Callable[..., ItemLosses], case: Classified, tau: float, seed: int, between: str, kinds: list[int]
) -> None:
    options: dict[str, Any] = {"kd_weight": 1.5, "temperature": tau, "between": between}
    options["kinds"], averages = kinds[: len(case.hidden)], averages_of(case, seed)

    def bound(losses: Callable[..., ItemLosses]) -> Callable[..., ItemLosses]:
        return lambda hidden, weight, bias, targets, **more: losses(hidden, weight, bias, averages, targets, **more)

    agree(*(fused_total(bound(losses), case, **options) for losses in (f, definition)), *differentiable(case))
    every = [losses(*case[:3], averages, case.targets, valid=case.valid, **options) for losses in (f, definition)]
    close(every[0].kd, every[1].kd)
    close(every[0].cross_entropy, every[1].cross_entropy)


def with_own_factors_is_kd_of_peers(
    f: Callable[..., ItemLosses], case: Classified, tau: float, seed: int, between: str, kinds: list[int]
) -> None:
    """A decay of 0: the averages are the members as they are."""
    options: dict[str, Any] = {"kd_weight": 0.7, "temperature": tau, "between": between}
    options["kinds"], averages = kinds[: len(case.hidden)], Networks(*case[:3])
    mine = fused_total(lambda h, w, b, t, **more: f(h, w, b, averages, t, **more), case, **options)
    agree(mine, fused_total(partial(item_losses, compiled=False), case, **options), *differentiable(case))


fused = partial(mean_teacher_losses, compiled=False)
PURE = F.mean_teacher_distillation
KINDS: list[tuple[Identity, Callable[..., Any], list[str]]] = [
    (
        Identity(is_the_definition, PURE, ALONE),
        plain,
        [
            "averages not detached", "members for averages", "its own average teaches, too", "only its own average",
            "half of the ordered pairs", "the other way round", "sum over targets", "no temperature",
            "mean over averages",
        ],
    ),
    (Identity(with_members_as_averages_is_kd, PURE, ALONE), plain, ["mean over averages", "averages not detached"]),
    (
        Identity(moves_members_towards_the_others_average, PURE, ALONE),
        plain,
        ["the other way round", "its own average teaches, too"],
    ),
    (Identity(is_zero_only_where_all_agree, PURE, ALONE), plain, ["members for averages"]),
    (Identity(commutes_with_permutations, PURE, ALONE), plain, ["half of the ordered pairs"]),
    (Identity(survives_extreme_logits, PURE, ALONE), plain, ["overflowing exp"]),
    (
        Identity(is_the_double_loop, fused, FUSED),
        definition,
        ["between ignored", "members for averages", "no bias", "its own average teaches, too", "invalid targets count"],
    ),
    (
        Identity(with_own_factors_is_kd_of_peers, fused, FUSED),
        definition,
        ["between ignored", "invalid targets count"],
    ),
]  # fmt: skip
test_mean_teachers, test_mean_teachers_without_a_fault_passes, test_mean_teachers_mutant = checked_by(KINDS)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_moving_average_is_a_mean_first_and_forgets_then(decay: float) -> None:
    values = [other(torch.zeros(3, dtype=torch.float64), seed) for seed in range(30)]
    average = values[0]
    for step, value in enumerate(values[1:], start=1):
        before = average.clone()
        got = F.moving_average(average, value, decay=decay, step=step)
        close(average, before, 0)
        if 1 - 1 / (step + 1) <= decay:
            close(got, torch.stack(values[: step + 1]).mean(0))
        else:
            close(got, decay * average + (1 - decay) * value)
        average = got
    if decay == 0:
        close(average, values[-1], 0)


IDS = torch.randint(1, 8, (6, 5), generator=torch.Generator().manual_seed(0))


def ensemble(kd: Any, **options: Any) -> EnsembleKD:
    every: dict[str, Any] = {"losses": kd, "n": 3} | options
    return EnsembleKD(lambda: SASRec(7, d_model=4, max_len=5, dropout=0, init_std=1.0), **every).double()


def slopes(model: EnsembleKD, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model.loss(IDS, **options).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixed", [False, True], ids=["one architecture", "mixed"])
@pytest.mark.parametrize("more", [{}, {"between": "same"}, {"between": "other"}, {"on": "spliced"}], ids=str)
def test_teachers_that_have_just_begun_are_the_peers(more: dict[str, Any], mixed: bool) -> None:
    """Without dropout, values and gradients of a whole step."""

    def build(kd: KD) -> EnsembleKD:
        if not mixed:
            return ensemble(kd, classifier="tied")
        wide = partial(SASRec, 7, d_model=6, max_len=5, dropout=0, init_std=1.0)
        return EnsembleKD([wide, wide, partial(GRU4Rec, 7, d_model=4, max_len=5, dropout=0)], losses=kd).double()

    peers = build(KD(temperature=0.7, **more))
    averaged = build(KD(temperature=0.7, teacher="ema", **more))
    teachers = MeanTeachers(averaged)
    torch.manual_seed(0)
    want = slopes(peers)
    torch.manual_seed(0)
    got = slopes(averaged, item_loss=teachers)
    assert got.keys() == want.keys()
    for name, slope in want.items():
        close(got[name], slope)


def test_averages_move_slowly_and_teach_what_they_were() -> None:
    model = ensemble(KD(temperature=0.7, teacher="ema", decay=0.6))
    teachers = MeanTeachers(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    after = {name: value.clone() for name, value in model.state_dict().items()}
    for step in (1, 50):
        teachers.update(step=step)
        share = min(0.6, 1 - 1 / (step + 1))
        before = {name: share * before[name] + (1 - share) * after[name] for name in before}
        for name, average in teachers.state_dict().items():
            close(average, before[name])
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in teachers.averages.parameters())
    weight, bias = model.classifier_weights()
    p = model.hidden(IDS[:, :-1]).flatten(1, 2) @ weight.mT + bias[:, None]
    weight, bias = teachers.averages.classifier_weights()
    q = teachers.averages.hidden(IDS[:, :-1]).flatten(1, 2) @ weight.mT + bias[:, None]
    close(model.loss(IDS, item_loss=teachers).terms["kd"], F.mean_teacher_distillation(p, q, temperature=0.7).detach())


def test_averages_teach_without_dropout() -> None:
    """Evaluation mode: the same teacher in each of two steps."""
    model = EnsembleKD(lambda: SASRec(7, d_model=4, max_len=5, dropout=0.5), n=2, losses=KD(teacher="ema"))
    teachers = MeanTeachers(model)
    assert not teachers.averages.training
    assert model.training
    states = [teachers.averages.states(IDS[None], by_length=True, training=False).flat for _ in range(2)]
    close(states[0], states[1], 0)


class Stopped(BaseException):
    """Ends a run."""


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_a_run_with_averages_resumes_bit_for_bit(decay: float, tmp_path: Path) -> None:
    losses = 0.5 * KD(temperature=1.0, teacher="ema", decay=decay)
    whole = sasrec(losses=losses)
    result = train(whole, output_dir=tmp_path / "whole")

    def stop(entry: Any) -> None:
        if entry["step"] >= 6:
            raise Stopped

    with pytest.raises(Stopped):
        train(sasrec(losses=losses), output_dir=tmp_path / "stopped", callback=stop)
    model = sasrec(losses=losses, seed=4)
    got = train(model, output_dir=tmp_path / "stopped", resume=True)
    assert_ends_as((whole, result, tmp_path / "whole"), tmp_path / "stopped", model, got)
    kept = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
    assert kept["teachers"].keys() == kept["model"].keys()
    same = [torch.equal(average, kept["model"][name]) for name, average in kept["teachers"].items()]
    assert all(same) == (decay == 0)


def test_other_runs_keep_no_averages(tmp_path: Path) -> None:
    train(sasrec(), output_dir=tmp_path, epochs=1)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["teachers"] == {}


def test_what_cannot_be_had_is_said() -> None:
    model = ensemble(KD(teacher="ema"))
    with pytest.raises(EnsembleKDError, match=r"Mutual: expected averages of the members, which teach here, got KD"):
        model.loss(IDS)
    close(model.loss(IDS, share=0.0).total, ensemble(0).loss(IDS).total)
    for losses, got in ((KD(), "KD"), (0, "0"), (KD(teacher="ema") + 0.1 * Ambiguity(), "Ambiguity")):
        with pytest.raises(EnsembleKDError, match=rf"MeanTeachers: expected losses with KD.*got .*{got}"):
            MeanTeachers(ensemble(losses))
    with pytest.raises(EnsembleKDError, match="MeanTeachers: expected an objective over all items, got NextItem"):
        MeanTeachers(ensemble(KD(teacher="ema"), objective=NextItem(negatives=2)))
    shared = ensemble(KD(teacher="ema"))
    shared.place = Place(sharded=True)
    with pytest.raises(EnsembleKDError, match="MeanTeachers: expected all weights in this process, got a share"):
        MeanTeachers(shared)
    with pytest.raises(EnsembleKDError, match=r"FromTeacher: expected KD\(temperature=0.3\), got KD"):
        model.loss(IDS, item_loss=FromTeacher(model))
    for options, message in (
        ({"part": "target"}, "part='all' and gate='open' with teacher='ema'"),
        ({"gate": "better"}, "part='all' and gate='open' with teacher='ema'"),
        ({"decay": 1.0}, r"decay, a number in \[0, 1\)"),
        ({"teacher": "peers", "decay": 0.5}, "no decay where peers teach as they are"),
        ({"teacher": "mean"}, "teacher"),
    ):
        with pytest.raises(EnsembleKDError, match=f"KD: expected {message}"):
            KD(**{"teacher": "ema", **options})  # type: ignore[arg-type]
    hidden, weight = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    for averages in (Networks(hidden[:1], weight[:1], None), Networks(hidden, weight, torch.zeros(2, 5))):
        with pytest.raises(EnsembleKDError, match=r"mean_teacher_losses: expected averages with (hidden|bias)"):
            mean_teacher_losses(hidden, weight, None, averages, torch.tensor([0, 4, 2]))


@pytest.mark.slow
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_mean_teachers_compile(tau: float) -> None:
    rng, found = torch.Generator().manual_seed(0), []
    factors = [torch.randn(3, *size, generator=rng) for size in ((4, 3), (6, 3), (6,)) * 2]
    for compiled in (True, False):
        leaf = factors[0].clone().requires_grad_()
        every: dict[str, Any] = {"temperature": tau, "compiled": compiled}
        averages = Networks(*factors[3:])
        losses = mean_teacher_losses(leaf, *factors[1:3], averages, torch.tensor([0, 5, 2, 2]), **every)
        losses.total.backward()
        found.append((losses.total.detach(), losses.kd, leaf.grad))
    for got, want in zip(*found, strict=True):
        close(got, want, 1e-5)
