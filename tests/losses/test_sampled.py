"""Sampled catalogues: candidates and their counts, the losses over them, sparse gradients and Adam by rows."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from ensemble_kd import (
    CCL,
    ICL,
    KD,
    EnsembleKD,
    EnsembleKDError,
    MaskedItem,
    NextItem,
    fit,
)
from ensemble_kd.data import synthetic
from ensemble_kd.encoders import BERT4Rec, SASRec
from ensemble_kd.ensemble import step
from ensemble_kd.losses import ItemLosses, item_losses, sampled_item_losses
from ensemble_kd.objectives import Candidates, draw_candidates, positions
from ensemble_kd.objectives.candidates import _candidates
from ensemble_kd.stacking import Backend, StackedModule, sparse_lookups, take_rows
from ensemble_kd.training import RowAdamW, clip_members_, optimizer
from ensemble_kd.training import gradients as by_member
from ensemble_kd.training.gradients import merge_rows
from tests.spec.strategies import Classified, classified, integers, seeds

V = 30
LOSSES = 0.1 * (ICL(temperature=0.5) + CCL(temperature=0.5)) + 0.5 * KD(temperature=0.3)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def draw(targets: Tensor, v: int, k: int, seed: int, *, reported: bool = True) -> Candidates:
    """As on a CPU, or as on an accelerator, which is not asked how many targets differ."""
    generator = torch.Generator().manual_seed(seed)
    if reported:
        return draw_candidates(targets, num_items=v, negatives=k, generator=generator)
    size = min(len(targets) + k, v)
    return _candidates(targets, targets.sort().values, num_items=v, size=size, known=0, generator=generator)


# -------------------------------------------------------------------------------------------------------- candidates


@given(st.integers(1, 40), st.integers(1, 12), st.data(), seeds, st.booleans())
def test_candidates_stand_for_every_item_once(v: int, t: int, data: st.DataObject, seed: int, reported: bool) -> None:
    k, targets = data.draw(st.integers(1, v)), 1 + integers(v, (t,), seed)
    items, counts, at = draw(targets, v, k, seed, reported=reported)
    distinct = set(targets.tolist())
    live = items[counts > 0]
    assert int(counts.sum()) == v
    assert set(items.tolist()) <= set(range(1, v + 1))
    assert len(set(live.tolist())) == len(live) == len(items)
    assert torch.equal(items[at], targets)
    assert counts[at].eq(1).all()
    sizes = [int(c) for c, item in zip(counts, items, strict=True) if c > 0 and int(item) not in distinct]
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert len(items) == min((len(distinct) if reported else t) + k, v)


def all_draws(targets: Tensor, v: int, k: int, *, reported: bool) -> list[Candidates]:
    """Every set of candidates that can be drawn; each is as likely, since in a stratum all items are."""
    found: dict[tuple[int, ...], Candidates] = {}
    for seed in range(400):
        candidates = draw(targets, v, k, seed, reported=reported)
        found[tuple(candidates.items.tolist())] = candidates
    others = v - len(targets.unique())
    drawn = len(candidates.items) - len(targets.unique())
    sizes = [(i + 1) * others // drawn - i * others // drawn for i in range(drawn)]
    assert len(found) == math.prod(sizes)
    return list(found.values())


@pytest.mark.parametrize("reported", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_over_all_draws_the_normaliser_is_right(k: int, reported: bool) -> None:
    v, targets = 8, torch.tensor([3, 6, 3])
    logits = torch.randn(v, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sums = [(c.counts * logits[c.items - 1].exp()).sum() for c in all_draws(targets, v, k, reported=reported)]
    assert_close(torch.stack(sums).mean(), logits.exp().sum(), **TIGHT)


def test_every_other_item_is_drawn_as_often_as_its_count_says() -> None:
    v, k, draws = 9, 3, 3000
    drawn = torch.zeros(v + 1)
    expected = torch.zeros(v + 1)
    for seed in range(draws):
        items, counts, _ = draw(torch.tensor([2]), v, k, seed)
        drawn[items] += 1
        expected[items] = 1 / counts
    assert (drawn / draws - expected).abs().max() < 5 * math.sqrt(0.25 / draws)


def test_the_draw_follows_its_generator_alone() -> None:
    targets, before = torch.tensor([4, 9]), torch.get_rng_state()
    first, again, other = (draw(targets, 1000, 16, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.items, again.items)
    assert not torch.equal(first.items, other.items)


# ------------------------------------------------------------------------------------------------------------ losses


def oracle(c: Classified, candidates: Candidates, tau: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy (n,) and KD over candidates, each counted as often as it says, in sums of exponentials."""
    n, t = c.hidden.shape[:2]
    real = [i for i in range(t) if c.valid is None or c.valid[i]]
    assert c.bias is not None

    def probabilities(x: int, i: int, tau: float) -> Tensor:
        logits = (c.weight[x][candidates.items - 1] * c.hidden[x, i]).sum(1) + c.bias[x][candidates.items - 1]  # type: ignore[index]
        e = candidates.counts * torch.exp(logits / tau)
        return e / e.sum()

    ce = [sum(-torch.log(probabilities(x, i, 1.0)[candidates.targets[i]]) for i in real) / len(real) for x in range(n)]
    kd = c.hidden.new_zeros(())
    live = candidates.counts > 0
    for (x, y), i in itertools.product(itertools.permutations(range(n), 2), real):
        teacher, student = probabilities(x, i, tau)[live].detach(), probabilities(y, i, tau)[live]
        kd = kd + (teacher * (teacher.log() - student.log())).sum() / len(real)
    return torch.stack(ce), kd  # type: ignore[arg-type]


def sampled(c: Classified, candidates: Candidates, **options: Any) -> ItemLosses:
    assert c.bias is not None
    picked = candidates.items - 1
    weight, bias = take_rows(c.weight, picked), take_rows(c.bias, picked)
    return sampled_item_losses(c.hidden, weight, bias, candidates.targets, candidates.counts, valid=c.valid, **options)


def gradients(total: Tensor, c: Classified) -> list[Tensor]:
    leaves = [x for x in (c.hidden, c.weight, c.bias) if x is not None]
    return [
        torch.zeros_like(x) if g is None else g.to_dense() if g.is_sparse else g
        for x, g in zip(leaves, torch.autograd.grad(total, leaves, allow_unused=True), strict=True)
    ]


def leaves(c: Classified) -> Classified:
    """With a bias, requiring gradients; targets become items, 1..v."""
    bias = torch.linspace(-1, 1, c.weight.shape[1], dtype=c.weight.dtype).expand(c.weight.shape[:2])
    made = [x.clone().requires_grad_() for x in (c.hidden, c.weight, bias)]
    return Classified(*made, c.targets + 1, c.valid)


@given(classified(), st.data(), seeds, st.booleans(), st.sampled_from([0.3, 1.0, 2.5]), st.booleans())
def test_losses_and_gradients_are_those_of_the_oracle(
    c: Classified, data: st.DataObject, seed: int, reported: bool, tau: float, squared: bool
) -> None:
    c = leaves(c)
    candidates = draw(
        c.targets, c.weight.shape[1], data.draw(st.integers(1, c.weight.shape[1])), seed, reported=reported
    )
    got = sampled(c, candidates, ce_weight=2.0, kd_weight=0.7, temperature=tau, scale_by_temperature_squared=squared)
    ce, kd = oracle(c, candidates, tau)
    kd = kd * (tau**2 if squared else 1)
    expected = 2.0 * ce.sum() + 0.7 * kd
    assert_close(got.cross_entropy, ce, rtol=1e-8, atol=1e-8)
    assert_close(got.kd, kd, rtol=1e-8, atol=1e-8)
    assert_close(got.total, expected, rtol=1e-8, atol=1e-8)
    for a, b in zip(gradients(got.total, c), gradients(expected, c), strict=True):
        assert_close(a, b, rtol=1e-7, atol=1e-8)


@given(classified(), seeds, st.booleans())
def test_with_all_items_drawn_the_losses_are_the_full_ones(c: Classified, seed: int, reported: bool) -> None:
    c, v = leaves(c), c.weight.shape[1]
    options: dict[str, Any] = {"kd_weight": 0.7, "temperature": 0.3}
    full = item_losses(c.hidden, c.weight, c.bias, c.targets - 1, valid=c.valid, **options)
    got = sampled(c, draw(c.targets, v, v, seed, reported=reported), **options)
    for a, b in zip(got, full, strict=True):
        assert_close(a, b, **TIGHT)
    for a, b in zip(gradients(got.total, c), gradients(full.total, c), strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-10)


KINDS: dict[str, dict[str, Any]] = {
    "all": {},
    "target": {"part": "target"},
    "gate": {"gate": "better"},
    "gated target": {"part": "target", "gate": "better"},
    "same": {"between": "same", "kinds": (0, 1, 0)},
    "gated same": {"between": "same", "kinds": (0, 1, 0), "gate": "better"},
    "other": {"between": "other", "kinds": (0, 1, 0)},
    "ambiguity": {"ambiguity_weight": -0.5},
}


@pytest.mark.parametrize("tau", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_candidate_that_counts_for_c_items_is_c_equal_items(kind: str, tau: float) -> None:
    rng, counts = torch.Generator().manual_seed(0), torch.tensor([1, 4, 0, 1, 7, 2])
    hidden, weight = (torch.randn(3, rows, 4, generator=rng).double() for rows in (5, 6))
    bias, targets = torch.randn(3, 6, generator=rng).double(), torch.tensor([0, 3, 3, 0, 3])
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    items = torch.arange(6).repeat_interleave(counts)
    places = torch.tensor([items.tolist().index(i) for i in targets.tolist()])
    options: dict[str, Any] = {
        "kd_weight": 0.7,
        "temperature": tau,
        "scale_by_temperature_squared": True,
        "valid": torch.tensor([True, True, True, False, True]),
        **KINDS[kind],
    }
    expected = item_losses(hidden, weight[:, items], bias[:, items], places, **options)
    got = sampled_item_losses(hidden, weight, bias, targets, counts, ce_weight=1.0, **options)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(expected.total, leaves)
    for _ in range(2):  # the second time, the tiles are walked again
        for found, grad in zip(torch.autograd.grad(got.total, leaves, retain_graph=True), wanted, strict=True):
            assert_close(found, grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("tau", [1e-9, 0.1, 1.0, 3.0, 1e6])
def test_a_candidate_that_counts_nowhere_stays_nowhere_at_any_temperature(tau: float) -> None:
    counts = torch.tensor([1, 2, 0, 5])
    hidden, weight = torch.randn(2, 3, 4), torch.randn(2, 4, 4)
    losses, grads = [], []
    for lifted in (0.0, 50.0):
        bias = torch.zeros(2, 4)
        bias[:, 2] = lifted
        leaf = weight.clone().requires_grad_()
        found = sampled_item_losses(hidden, leaf, bias, torch.tensor([0, 1, 3]), counts, kd_weight=1.0, temperature=tau)
        found.total.backward()
        losses.append(torch.cat([found.cross_entropy, found.kd[None]]))
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert torch.isfinite(losses[0]).all()
    assert torch.isfinite(grads[0]).all()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(grads[0], grads[1])
    assert not grads[0][:, 2].any()


def test_logits_are_computed_once_at_any_temperature() -> None:
    hidden, weight, bias = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 6, 4), torch.zeros(3, 6)
    counted = []
    for tau in (1.0, 0.5):
        with FlopCounterMode(display=False) as flops:
            sampled_item_losses(
                hidden, weight, bias, torch.arange(5), torch.ones(6).long(), kd_weight=1.0, temperature=tau
            ).total.backward()
        counted.append(flops.get_total_flops())
    assert counted == [2 * (2 * 3 * 5 * 6 * 4)] * 2  # the logits, and the gradient in the states


def test_a_further_row_for_kd_is_checked_and_needs_no_bias() -> None:
    hidden, weight, row = torch.randn(2, 3, 4).double(), torch.randn(2, 6, 4).double(), torch.randn(6).double()
    with pytest.raises(EnsembleKDError, match=r"^item_losses: expected kd_bias"):
        item_losses(hidden, weight, None, torch.arange(3), kd_weight=1.0, kd_bias=row[:5])
    options: dict[str, Any] = {"kd_weight": 1.0, "temperature": 0.5, "kd_bias": row}
    got = item_losses(hidden, weight, None, torch.arange(3), **options)
    z = (hidden @ weight.mT / 0.5 + row).log_softmax(2)
    kd = sum((z[x].exp() * (z[x] - z[1 - x])).sum(1).mean() for x in (0, 1))
    assert_close(got.kd, kd)
    for a, b in zip(item_losses(hidden, weight, None, torch.arange(3), **options, compiled=True), got, strict=True):
        assert_close(a, b)
    plain = item_losses(hidden, weight, None, torch.arange(3))
    assert torch.equal(got.cross_entropy, plain.cross_entropy)


@pytest.mark.parametrize("counts", [torch.ones(5).long(), torch.ones(6), torch.ones(6, 1).long()])
def test_counts_that_do_not_fit_are_refused(counts: Tensor) -> None:
    hidden, weight, bias = torch.zeros(2, 3, 4), torch.zeros(2, 6, 4), torch.zeros(2, 6)
    with pytest.raises(EnsembleKDError, match=r"^sampled_item_losses: expected whole counts \(6,\), got torch."):
        sampled_item_losses(hidden, weight, bias, torch.tensor([0, 5, 1]), counts)


def test_the_more_negatives_the_nearer_to_the_full_losses() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 4, generator=rng).double(), torch.randn(2, 600, 4, generator=rng).double()
    c = Classified(hidden, weight, torch.zeros(2, 600).double(), 1 + integers(600, (5,), 0), None)
    options: dict[str, Any] = {"kd_weight": 1.0, "temperature": 1.5}
    full = item_losses(hidden, weight, None, c.targets - 1, **options)

    def error(k: int) -> Tensor:
        draws = [sampled(c, draw(c.targets, 600, k, seed), **options) for seed in range(20)]
        off = [torch.stack([*(d.cross_entropy - full.cross_entropy), d.kd - full.kd]) for d in draws]
        return torch.stack(off).square().mean(0).sqrt()

    few, some, many = error(8), error(64), error(512)
    assert (some < 0.6 * few).all()
    assert (many < 0.6 * some).all()


# ------------------------------------------------------------------------------------------------------------- model


def model_of(
    negatives: int | None, *, n: int = 3, classifier: str = "linear", backend: Backend = "auto", causal: bool = False
) -> EnsembleKD:
    encoder = SASRec if causal else BERT4Rec
    objective = NextItem(negatives=negatives) if causal else MaskedItem(negatives=negatives)
    return EnsembleKD(
        lambda: encoder(V, d_model=8, num_layers=1, max_len=10, dropout=0.0).double(),
        n,
        objective=objective,
        losses=LOSSES,
        classifier=classifier,
        backend=backend,
    )


def batch(seed: int = 0, high: int = V) -> Tensor:
    ids = 1 + integers(high, (5, 8), seed)
    ids[0, :5] = 0
    return ids


def dense(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.to_dense() if grad.is_sparse else grad


@pytest.fixture(params=[True, False], ids=["reported", "unreported"])
def selects(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on an accelerator, where targets that only fill up stay in the batch."""
    for module in (positions, step):
        monkeypatch.setattr(module, "selects", lambda batch: request.param)


@pytest.mark.usefixtures("selects")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("classifier", ["linear", "tied"])
@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_a_step_with_all_items_drawn_is_a_full_step(backend: Backend, classifier: str, causal: bool, n: int) -> None:
    steps, models = [], []
    for negatives in (None, V):
        model = model_of(negatives, n=n, classifier=classifier, backend=backend, causal=causal)
        steps.append(model.loss(batch(), generator=torch.Generator().manual_seed(5)))
        steps[-1].total.backward()
        models.append(model)
    assert_close(steps[1].total, steps[0].total, **TIGHT)
    assert_close(steps[1].terms, steps[0].terms, **TIGHT)
    tables = {"encoder.item_embedding.weight", "item_classifier.weight", "item_classifier.bias"}
    for (name, p), (_, q) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert_close(dense(q.grad), dense(p.grad), **TIGHT)
        assert q.grad is not None
        assert q.grad.is_sparse == (name in tables)


@pytest.mark.parametrize("classifier", ["linear", "tied"])
def test_gradients_hold_only_rows_that_the_step_touched(classifier: str) -> None:
    model, ids = model_of(4, classifier=classifier), batch(high=9)
    drawn = model.objective.draw(ids, mask_token=model.mask_token, generator=torch.Generator().manual_seed(1))
    assert drawn.candidates is not None
    model.loss(ids, generator=torch.Generator().manual_seed(1)).total.backward()
    read = set(drawn.inputs.flatten().tolist()) | set(ids.flatten().tolist())
    scored = set(drawn.candidates.items.tolist())

    def touched(name: str) -> set[int]:
        grad = model.get_parameter(name).grad
        assert grad is not None
        return set(grad._indices()[1].tolist())

    assert touched("item_classifier.bias") == {item - 1 for item in scored}
    assert touched("encoder.item_embedding.weight") == (read if classifier == "linear" else read | scored)
    assert len(read | scored) < V


def test_bfloat16_stays_close() -> None:
    totals = []
    for on in (False, True):
        model = model_of(8).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            step = model.loss(batch(), generator=torch.Generator().manual_seed(5))
        step.total.backward()
        assert all(bool(torch.isfinite(dense(p.grad)).all()) for p in model.parameters())
        totals.append(step.total.detach())
    assert_close(totals[1], totals[0], rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("objective", [MaskedItem, NextItem])
@pytest.mark.parametrize("negatives", [0, -1, 2.0, True])
def test_objectives_refuse_negatives_that_are_no_number(objective: type[NextItem], negatives: Any) -> None:
    text = f"{objective.__name__}: expected negatives, a whole number >= 1, got {negatives!r}"
    with pytest.raises(EnsembleKDError, match=text):
        objective(negatives=negatives)


def test_the_model_refuses_more_negatives_than_items() -> None:
    text = r"objective: expected 1 <= negatives <= 30 \(num_items\), got 31. Pass None for the full softmax."
    with pytest.raises(EnsembleKDError, match=text):
        model_of(31)


# ------------------------------------------------------------------------------------------------- sparse gradients


class Looks(nn.Module):
    """Looks items up, in the way that is asked for."""

    def __init__(self, way: str) -> None:
        super().__init__()
        kinds: dict[str, dict[str, Any]] = {
            "padding": {"padding_idx": 0},
            "by frequency": {"scale_grad_by_freq": True},
        }
        self.table = nn.Embedding(V + 2, 4, dtype=torch.float64, **kinds.get(way, {}))
        self.way = way

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.table(ids)
        return x @ (self.table.weight.T @ self.table.weight) if self.way == "product" else x


WAYS = {"plain": True, "padding": True, "product": False, "by frequency": False}


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("way", WAYS)
def test_sparse_lookups_give_the_dense_gradient(way: str, backend: Backend) -> None:
    stack, ids = StackedModule([Looks(way) for _ in range(3)], backend=backend), batch()
    upstream = torch.randn(3, 5, 8, 4, dtype=torch.float64)

    def gradient() -> Tensor:
        stack.zero_grad()
        (stack(ids) * upstream).sum().backward()
        (grad,) = (p.grad for p in stack.parameters())
        assert grad is not None
        return grad

    expected = gradient()
    with sparse_lookups(stack, at_least=V + 2):
        got = gradient()
    assert got.is_sparse == WAYS[way]
    assert_close(dense(got), expected, **TIGHT)
    assert not gradient().is_sparse  # afterwards all is as it was
    with sparse_lookups(stack, at_least=V + 3):
        assert not gradient().is_sparse


def test_ids_beyond_the_table_are_refused_and_not_read_from_the_next_members() -> None:
    stack = StackedModule([Looks("plain") for _ in range(2)])
    with sparse_lookups(stack, at_least=V + 2), pytest.raises(IndexError):
        stack(torch.tensor([[V + 2]]))
    assert all("forward" not in vars(child) for i in range(2) for child in stack.member(i).modules())


def sparse_gradient(shape: tuple[int, ...], picked: Tensor, seed: int) -> Tensor:
    """A gradient (n, r, \\*rest) of the rows picked, repeats among them."""
    table = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    rng = torch.Generator().manual_seed(seed)
    upstream = torch.randn(shape[0], len(picked), *shape[2:], generator=rng, dtype=torch.float64)
    (grad,) = torch.autograd.grad((take_rows(table, picked) * upstream).sum(), table)
    return grad


@pytest.fixture(params=["cpu", "accelerator"])
def merging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rows added up as on a CPU, or as on an accelerator."""
    if request.param == "accelerator":
        monkeypatch.setattr(by_member, "merge_rows", by_member._merge_in_place)
        monkeypatch.setattr(optimizer, "merge_rows", by_member._merge_in_place)


@given(st.sampled_from([(2, 6), (3, 5, 2), (1, 4, 2, 3)]), st.integers(0, 9), seeds)
def test_merging_keeps_the_gradient(shape: tuple[int, ...], picks: int, seed: int) -> None:
    grad = sparse_gradient(shape, integers(shape[1], (picks,), seed), seed)
    for merged in (merge_rows(grad), by_member._merge_in_place(grad)):
        assert_close(merged.to_dense(), grad.to_dense(), **TIGHT)
        assert_close(merged._values().square().sum(), grad.to_dense().square().sum(), **TIGHT)


@pytest.mark.usefixtures("merging")
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping_sees_sparse_gradients_as_dense_ones(max_norm: float) -> None:
    shapes: list[tuple[int, ...]] = [(2, 6), (2, 5, 3)]
    grads = [sparse_gradient(shape, torch.tensor([1, 4, 1]), i) for i, shape in enumerate(shapes)]
    a, b = ([torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes] for _ in range(2))
    for p, q, grad in zip(a, b, grads, strict=True):
        p.grad, q.grad = grad, grad.to_dense()
    assert_close(clip_members_(a, max_norm), clip_members_(b, max_norm))
    for p, q in zip(a, b, strict=True):
        assert_close(dense(p.grad), dense(q.grad), rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------------------------------------- RowAdamW


@pytest.mark.usefixtures("merging")
@pytest.mark.parametrize("rest", [(), (3,)])
def test_every_row_has_an_adam_of_its_own(rest: tuple[int, ...]) -> None:
    n, r = 2, 5
    table = nn.Parameter(torch.randn(n, r, *rest, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    optimizer = RowAdamW([table], lr=0.1, betas=(0.8, 0.95), weight_decay=0.2)
    alone = [table.detach()[i, j].clone().requires_grad_() for i in range(n) for j in range(r)]
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.2}
    own = [torch.optim.AdamW([row], **options) for row in alone]
    for seed, picked in enumerate([[0, 1], [1, 1, 3], [3], [1, 0, 1, 1], [0, 3]]):
        table.grad = sparse_gradient((n, r, *rest), torch.tensor(picked), seed)
        for at in itertools.product(range(n), set(picked)):
            k = at[0] * r + at[1]
            alone[k].grad = table.grad.to_dense()[at]
            own[k].step()
        optimizer.step()
    assert_close(table.detach(), torch.stack([row.detach() for row in alone]).view_as(table), rtol=1e-5, atol=1e-7)
    assert torch.equal(
        table.detach()[:, [2, 4]], torch.stack([alone[k].detach() for k in (2, 4, 7, 9)]).view(n, 2, *rest)
    )


def test_dense_gradients_are_adamws() -> None:
    a, b = ([nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))] for _ in range(2))
    ours, theirs = RowAdamW(a, lr=0.1, weight_decay=0.1), torch.optim.AdamW(b, lr=0.1, weight_decay=0.1, fused=True)
    for scale in (1.0, -3.0, 0.5):
        for p, q in zip(a, b, strict=True):
            p.grad, q.grad = p.detach() * scale, q.detach() * scale
        ours.step()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("dense_first", [True, False])
def test_a_gradient_may_turn_dense_or_sparse_later(dense_first: bool) -> None:
    p, q = (nn.Parameter(torch.ones(1, 3, 2, dtype=torch.float64)) for _ in range(2))
    ours, theirs = RowAdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1)
    for i in range(3):
        grad = sparse_gradient((1, 3, 2), torch.arange(3), i)  # all rows, so that row-wise and dense are one
        q.grad = grad.to_dense()
        p.grad = q.grad.clone() if (i == 0) == dense_first else grad
        ours.step()
        theirs.step()
    assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_a_saved_state_goes_on_exactly() -> None:
    ends = []
    for saved in (False, True):
        table = nn.Parameter(torch.ones(2, 5, 3))
        optimizer = RowAdamW([table], lr=0.1)
        for seed in range(4):
            if saved and seed == 2:
                state = optimizer.state_dict()
                optimizer = RowAdamW([table], lr=0.1)
                optimizer.load_state_dict(state)
            table.grad = sparse_gradient((2, 5, 3), torch.tensor([0, seed]), seed).float()
            optimizer.step()
        ends.append(table.detach())
    assert torch.equal(*ends)


def test_a_closure_is_called_once_with_gradients_on() -> None:
    table = nn.Parameter(torch.ones(1, 4, 2))
    calls = []

    def closure() -> float:
        loss = take_rows(table, torch.tensor([2])).sum()
        loss.backward()
        calls.append(float(loss.detach()))
        return calls[-1]

    assert RowAdamW([table]).step(closure) == 2.0
    assert calls == [2.0]
    assert not torch.equal(table[0, 2], table[0, 1])


# --------------------------------------------------------------------------------------------------------------- fit


class Killed(Exception):
    pass


def trained(folder: Path, *, kill_at: int | None = None) -> EnsembleKD:
    data = synthetic(num_users=60, num_items=400, max_len=12)
    model = EnsembleKD(
        lambda: BERT4Rec(400, d_model=8, num_layers=1, max_len=8),
        2,
        objective=MaskedItem(negatives=16),
        losses=LOSSES,
    )

    def watch(entry: Any) -> None:
        if entry["step"] == kill_at:
            raise Killed

    options: dict[str, Any] = {"epochs": 2, "batch_size": 32, "lr": 0.01, "window_step": 3, "log_every": 1}
    options |= {"progress": False, "checkpoint_every_s": 0.0, "output_dir": folder, "callback": watch, "resume": True}
    fit(model, data, **options)
    return model


@pytest.mark.slow
def test_a_killed_run_ends_as_one_never_killed(tmp_path: Path) -> None:
    unbroken = trained(tmp_path / "a")
    with pytest.raises(Killed):
        trained(tmp_path / "b", kill_at=5)
    resumed = trained(tmp_path / "b")
    for (name, a), (_, b) in zip(unbroken.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    states = [torch.load(tmp_path / run / "last.pt", weights_only=True)["optimizer"]["state"] for run in ("a", "b")]
    assert any(state["step"].ndim == 2 for state in states[0].values())
    for i, state in states[0].items():
        assert all(torch.equal(value, states[1][i][name]) for name, value in state.items())


@pytest.mark.parametrize("gate", ["best", None, np.zeros(3)])
def test_a_gate_is_checked_before_it_is_compared(gate: object) -> None:
    hidden, weight, bias = torch.zeros(2, 3, 4), torch.zeros(2, 6, 4), torch.zeros(2, 6)
    targets, counts = torch.tensor([1, 0, 1]), torch.ones(6).long()
    with pytest.raises(EnsembleKDError, match="sampled_item_losses: expected gate"):
        sampled_item_losses(hidden, weight, bias, targets, counts, temperature=0.5, gate=gate)  # type: ignore[arg-type]
