"""A mixed ensemble is its members run alone: every term of a step, gradients and scores, for any order of kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import (
    AP,
    CCL,
    ICL,
    KD,
    Loss,
)
from ensemble_kd.objectives import MaskedItem, NextItem, Objective
from tests.spec import reference
from tests.spec.test_identities import ITEMS, TABLE, Attributes, Last, Running

TERMS = AP() + 0.5 * ICL() + 2.0 * KD(temperature=0.5, between="other")
CONTRASTED = AP() + 0.5 * (ICL() + CCL(temperature=1.0, pool="mean")) + 2.0 * KD(temperature=0.5)
IDS = torch.tensor([[0, 0, 3, 7, 9], [4, 8, 1, 6, 2], [0, 5, 5, 2, 1], [0, 0, 0, 9, 3]])


class Gated(nn.Module):
    """h_t = e_t gated by the mean of the e_s up to it, of any width."""

    causal = True

    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(ITEMS + 2, d, dtype=torch.float64)
        self.gate = nn.Linear(d, d, dtype=torch.float64)

    def forward(self, item_ids: Tensor) -> Tensor:
        real = (item_ids != 0)[..., None].to(self.gate.bias.dtype)
        e, count = self.item_embedding(item_ids) * real, real.cumsum(dim=1).clamp(min=1)
        return torch.sigmoid(self.gate(e.cumsum(dim=1) / count)) * e


class Counting(Running):
    """``Running`` in the type of its weights."""

    causal = True

    def forward(self, item_ids: Tensor) -> Tensor:
        table = self.item_embedding.weight
        real = (item_ids != 0)[..., None].to(table.dtype)
        e = self.item_embedding(item_ids) * real
        return torch.tanh(e + e.cumsum(dim=1) / (2 * real.cumsum(dim=1).clamp(min=1)))


KINDS: dict[str, list[Callable[[], nn.Module]]] = {
    "two and one": [Counting, Counting, Gated],
    "in turn": [Gated, Counting, Gated, Counting],
    "unequal widths": [lambda: Gated(2), Counting, lambda: Gated(5), lambda: Gated(2)],
}
OBJECTIVES: list[MaskedItem | NextItem] = [NextItem(views=2), NextItem(mask_ratio=0.4), MaskedItem(0.6, views=2)]


def mixed(kinds: str, dtype: torch.dtype = torch.float64, **options: Any) -> EnsembleKD:
    equal = kinds != "unequal widths"
    options = {"losses": CONTRASTED if equal else TERMS, "item_attributes": Attributes(3, TABLE), **options}
    model = EnsembleKD(KINDS[kinds], num_items=ITEMS, **options).to(dtype)
    with torch.no_grad():  # heads start near 0, where many faults are too small to see
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(dtype)
            p.add_(noise * (p != 0) if name.endswith("classifier.weight") else noise)  # columns of zeros stay
    return model


def alone(model: EnsembleKD) -> list[EnsembleKD]:
    """The members by themselves, each with weights and a width of its own."""
    return [model.member(i) for i in range(len(model))]


def by_the_oracles(members: list[EnsembleKD], losses: Loss, objective: Any, seed: int) -> dict[str, Tensor]:
    """Every term of a step from plain modules and the paper's formulas."""
    draw = objective.draw(IDS, mask_token=ITEMS + 1, generator=torch.Generator().manual_seed(seed))
    (m, b, length), classes = draw.inputs.shape, draw.targets - 1
    plain = [member.encoder for member in members]
    views = [net(draw.inputs.flatten(0, 1))[0] for net in plain]
    anchors = [net(draw.anchor)[0] for net in plain]
    kinds = [type(member.encoder.member(0)).__name__ + str(member.hidden_size) for member in members]
    found: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        found[name] = found[name] + value if name in found else value

    weights = {type(term).__name__.lower(): term for _, term in losses.weighted()}
    for view in range(m):
        here = draw.positions // (b * length) == view
        logits = []
        for member, states in zip(members, views, strict=True):
            weight, bias = member.classifier_weights()
            rows = states.reshape(-1, states.shape[-1])[draw.positions[here]]
            logits.append(reference.logits(rows[None], weight, bias)[0])
        add(objective.name, sum(reference.mip(p[None], classes[here])[0] for p in logits))  # type: ignore[arg-type]
        for x, teacher in enumerate(logits):
            for y, student in enumerate(logits):
                if x != y and (weights["kd"].between == "all" or kinds[x] != kinds[y]):
                    add("kd", reference.kl(teacher, student, 0.5))
    items = draw.anchor_items.flatten()
    for x, member in enumerate(members):
        head: Any = member.attribute_classifier
        q = reference.logits(anchors[x].reshape(1, -1, anchors[x].shape[-1]), head.weight, head.bias)
        add("ap", reference.ap(q, TABLE[items], items != 0)[0])
        for y in range(len(members)):
            for name, tau, kind in (("icl", 0.3, "flatten"), ("ccl", 1.0, "mean")):
                if name not in weights or (name == "icl") != (x == y):
                    continue
                real = draw.anchor != 0
                a, k = (reference.pooled(anchors[i][None], real, kind)[0] for i in (x, y))
                p = reference.pooled(views[y][None], draw.inputs.flatten(0, 1) != 0, kind)[0].unflatten(0, (m, b))
                add(name, reference.contrastive_pair(a, k, p, tau))
    return found


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("classifier", ["linear", "tied"])
@pytest.mark.parametrize(
    ("objective", "dtype"),
    [*((objective, torch.float64) for objective in OBJECTIVES), (OBJECTIVES[0], torch.float32)],
    ids=["next", "next, masked views", "masked", "next, float32"],
)
def test_mixed_step_is_that_of_its_members_alone(
    kinds: str, classifier: str, objective: Any, dtype: torch.dtype
) -> None:
    """To 1e-12 in float64, and to 1e-6 in float32 of what float64 gives."""
    model = mixed(kinds, dtype, classifier=classifier, objective=objective)
    members = [member.double() for member in alone(model)]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    losses = model.losses
    assert isinstance(losses, Loss)
    got = model.loss(IDS, generator=torch.Generator().manual_seed(1))
    got.total.backward()
    want = by_the_oracles(members, losses, objective, 1)
    assert got.terms.keys() == want.keys()
    factors = {type(term).__name__.lower(): weight for weight, term in losses.weighted()} | {objective.name: 1.0}
    total = sum(factors[name] * value for name, value in want.items())
    assert isinstance(total, Tensor)
    total.backward()
    for name, value in want.items():
        torch.testing.assert_close(got.terms[name].double(), value.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.total.detach().double(), total.detach(), rtol=tolerance, atol=tolerance)
    for i, member in enumerate(members):
        for mine, theirs in rows_of(model, member, i):
            assert (theirs.grad is None) == (mine is None)
            if mine is not None and theirs.grad is not None:
                size = float(theirs.grad.abs().max().clamp(min=1))
                torch.testing.assert_close(mine.double() / size, theirs.grad[0] / size, rtol=0, atol=tolerance)


def rows_of(model: EnsembleKD, member: EnsembleKD, i: int) -> list[tuple[Tensor | None, Tensor]]:
    """The gradient of each weight of member i in the ensemble, and that weight alone."""
    kind = model.encoder.kinds[i]
    within = model.encoder.kinds[:i].count(kind)
    pairs = []
    for name, p in member.named_parameters():
        if name.startswith("encoder."):
            group = model.encoder.groups[kind]
            grad, at = dict(group.named_parameters())[name.removeprefix("encoder.")].grad, within
        else:
            grad, at = dict(model.named_parameters())[name].grad, i
        row = None if grad is None else grad.to_dense()[at]
        if row is not None and name.endswith("classifier.weight"):
            assert not row[:, member.hidden_size :].any()  # columns of zeros stay zero
            row = row[:, : member.hidden_size]
        pairs.append((row, p))
    return pairs


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("classifier", ["linear", "tied"])
@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_mixed_scores_are_those_of_its_members_alone(
    kinds: str, classifier: str, backend: Literal["loop", "vmap"]
) -> None:
    model = mixed(kinds, classifier=classifier, backend=backend).eval()
    members = alone(model)
    want = torch.stack([member(IDS) for member in members])
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(model.member_scores(IDS), want, **close)
    torch.testing.assert_close(model(IDS), want.mean(dim=0), **close)
    vectors, items = model.query_vectors(IDS), model.item_vectors()
    assert vectors.shape[1] == items.shape[1] == sum(model.widths) + 1
    assert (items != 0).any(dim=0).all()
    torch.testing.assert_close(vectors @ items.T, model(IDS)[:, 1:], **close)
    names = {name.partition(" ")[0] for name in model.backend.values()}
    assert names == {backend}
    top = model.recommend(IDS, k=3, exclude_seen=False)
    torch.testing.assert_close(top.scores, want.mean(dim=0).topk(3).values, **close)
    alike = EnsembleKD.from_members([member.encoder.member(0) for member in members], num_items=ITEMS, losses=0)
    torch.testing.assert_close(alike.hidden(IDS), model.hidden(IDS), **close)


@pytest.mark.parametrize("classifier", ["linear", "tied"])
def test_mixed_training_over_candidates(classifier: str) -> None:
    """With every item a candidate, the sampled losses are the full ones; tables get sparse gradients."""
    grads = []
    for negatives in (None, ITEMS):
        model = mixed("unequal widths", objective=NextItem(negatives=negatives), classifier=classifier)
        model.loss(IDS).total.backward()
        grads.append({name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None})
        sparse = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.is_sparse}
        assert sparse == set(model.sparse_tables())
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-10, atol=1e-10)


def test_mixed_members_keep_their_numbers_and_seeds() -> None:
    model = EnsembleKD([Gated, Counting, Gated], num_items=ITEMS, seed=3, losses=0)
    for kind in (Gated, Counting):
        same = EnsembleKD(kind, 3, num_items=ITEMS, seed=3, losses=0)
        for i, name in enumerate(("Gated", "Counting", "Gated")):
            if name == kind.__name__:
                assert torch.equal(model.hidden(IDS)[i], same.hidden(IDS)[i])
                assert torch.equal(model.member_scores(IDS)[i], same.member_scores(IDS)[i])


def test_one_kind_is_no_mixed_ensemble() -> None:
    """A list of equal factories, and a mapping, give the ensemble of one factory, bit for bit."""
    want = EnsembleKD(Counting, 3, num_items=ITEMS)
    for spelled in ([Counting, Counting, Counting], {Counting: 3}, [lambda: Counting() for _ in range(3)]):
        got = EnsembleKD(spelled, num_items=ITEMS)
        assert got.state_dict().keys() == want.state_dict().keys()
        assert all(torch.equal(t, want.state_dict()[name]) for name, t in got.state_dict().items())
        assert torch.equal(got.loss(IDS).total, want.loss(IDS).total)
    assert EnsembleKD({Counting: 2, Gated: 1}, num_items=ITEMS).encoder.kinds == (0, 0, 1)


class Ahead(Gated):
    causal = False


class Half(Gated):
    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids).float()


class Fewer(Counting):
    num_items = 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: EnsembleKD([Counting, Ahead], num_items=ITEMS),
            "objective: expected members that read alike, got causal ones, as member 0, and others, as member 1. "
            "Pass objective=MaskedItem() to train all of them on masked items.",
        ),
        (
            lambda: EnsembleKD([Counting, Last], num_items=ITEMS),
            "encoder output: expected hidden states (b, l, d) torch.float64 from all members, as from member 0, got "
            "(b, d) torch.float64 from member 1. One objective trains all members: give them outputs of one form and "
            "one type.",
        ),
        (
            lambda: EnsembleKD([Counting, Half], num_items=ITEMS),
            "encoder output: expected hidden states (b, l, d) torch.float64 from all members, as from member 0, got "
            "(b, l, d) torch.float32 from member 1. One objective trains all members: give them outputs of one form "
            "and one type.",
        ),
        (
            lambda: EnsembleKD([Fewer, type("More", (Gated,), {"num_items": 5})]),
            "EnsembleKD: expected members of 4 items, as member 0, got 5 in member 1. Build all encoders for one "
            "catalogue.",
        ),
        (
            lambda: EnsembleKD([Counting, lambda: Gated(4)], num_items=ITEMS, losses=CCL()),
            "CCL: expected members of one width d, whose states can be compared, got (3, 4). Give the encoders equal "
            "widths, or leave CCL out; ICL compares each member with itself alone.",
        ),
        (
            lambda: EnsembleKD([Counting, Gated], 3, num_items=ITEMS),
            "EnsembleKD: expected n = 2, the number of factories, got 3. Leave n out: there are as many members as "
            "factories.",
        ),
        (
            lambda: EnsembleKD([], num_items=ITEMS),
            "EnsembleKD: expected at least one factory, got none. Pass one factory per member.",
        ),
        (
            lambda: EnsembleKD([Counting, Gated()], num_items=ITEMS),  # type: ignore[list-item]
            "EnsembleKD: expected a factory () -> nn.Module, got Gated. Wrap the construction: "
            "EnsembleKD(lambda: MyEncoder(...)).",
        ),
        (
            lambda: EnsembleKD({Counting: 0}, num_items=ITEMS),
            "EnsembleKD: expected the count of a factory, a whole number in 1..1000, got 0. Pass such a number.",
        ),
        (
            lambda: EnsembleKD([Last, Last], num_items=ITEMS, objective=MaskedItem()),
            "MaskedItem: expected an encoder that returns (b, l, d), got one that returns (b, d). Masked positions "
            "need a hidden state each: train this encoder with objective=NextItem().",
        ),
    ],
)
def test_what_a_mixed_ensemble_refuses(build: Callable[[], EnsembleKD], message: str) -> None:
    with pytest.raises(EnsembleKDError) as error:
        build()
    assert str(error.value) == message


def test_mixed_defaults_leave_out_what_cannot_be() -> None:
    assert repr(EnsembleKD([Counting, Gated], num_items=ITEMS).losses).count("CCL") == 1
    unequal = EnsembleKD([Counting, lambda: Gated(4)], num_items=ITEMS)
    assert repr(unequal.losses) == "0.01 * ICL(temperature=0.3) + 0.001 * KD(temperature=0.3)"
    objective: Objective = unequal.objective
    assert objective == NextItem()
    masked = EnsembleKD([Counting, Ahead], num_items=ITEMS, objective=MaskedItem())
    assert masked.loss(IDS).total.isfinite()
