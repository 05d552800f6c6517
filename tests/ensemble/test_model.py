"""``EnsembleKD`` from the outside: construction, steps, scores, members, precision, and what is refused."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ensemble_kd import (
    AP,
    CCL,
    ICL,
    KD,
    EnsembleKD,
    EnsembleKDError,
    MaskedItem,
    NextItem,
)
from ensemble_kd.data import ItemAttributes
from ensemble_kd.encoders import BERT4Rec, SASRec
from ensemble_kd.losses import Loss
from tests.spec import reference

V, D = 12, 6
ATTRIBUTES = ItemAttributes.from_dict({1: [1, 2], 2: [3], 5: [1], 7: [2, 3], 12: [1]}, V)
ALL = AP() + 0.3 * ICL(temperature=0.5) + 0.2 * CCL(temperature=0.5) + 2.0 * KD(temperature=0.7)
IDS = torch.tensor([[0, 0, 3, 7, 9], [4, 8, 12, 1, 2], [0, 5, 6, 5, 11]])


class Rows(nn.Module):
    """Knows items alone, so that every position can be computed by hand; logs what it is called with."""

    num_items = V

    def __init__(self, log: list[tuple[int, ...]] | None = None) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(V + 2, D)
        self.log = log

    def forward(self, item_ids: Tensor) -> Tensor:
        if self.log is not None:
            self.log.append(tuple(item_ids.shape))
        return self.item_embedding(item_ids).tanh()


class Newest(Rows):
    """(b, d): the mean of the items."""

    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids).mean(dim=1)


class Gone(Rows):
    """Keeps no item row under the usual name."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.item_embedding = self.item_embedding, nn.Identity()  # type: ignore[assignment]

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.table(item_ids)


class Unmasked(Gone):
    """As the models of other libraries: padding and the items alone. It would fail on the mask token."""

    causal = True

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V + 1, D, padding_idx=0)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.table(item_ids.clamp(max=V))


class Tableless(nn.Module):
    """Embeds nothing."""

    num_items, causal = V, True

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, D)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.linear(item_ids.unsqueeze(-1).float())


def loud(model: EnsembleKD) -> EnsembleKD:
    """With large weights in the heads, so that no difference hides below a tolerance."""
    for i, p in enumerate(model.parameters()):
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
    return model


def make(encoder: Callable[[], nn.Module] = Rows, n: int = 3, **settings: Any) -> EnsembleKD:
    settings = {"losses": 0, **settings}
    return loud(EnsembleKD(encoder, n, **settings).double())


def masks(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Construction


def test_every_argument_but_the_first_has_a_default() -> None:
    model = EnsembleKD(lambda: BERT4Rec(V, d_model=8, num_heads=2, max_len=6))
    assert (len(model), model.num_items, model.max_len, model.mask_token) == (3, V, 6, V + 1)
    assert isinstance(model.objective, MaskedItem)
    assert list(model.loss(IDS).terms) == ["mip", "kd", "icl", "ccl"]
    assert isinstance(EnsembleKD(lambda: SASRec(V, d_model=8, num_heads=2, max_len=6)).objective, NextItem)
    assert isinstance(EnsembleKD(Newest).objective, NextItem)
    assert "ap" in EnsembleKD(Rows, item_attributes=ATTRIBUTES).loss(IDS).terms


def test_the_global_random_states_are_untouched_by_construction() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    model = EnsembleKD(lambda: BERT4Rec(V, d_model=8, num_heads=2, max_len=6), item_attributes=ATTRIBUTES)
    model.member(1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]  # noqa: NPY002
    assert random.getstate() == states[2]


def test_weights_follow_from_the_seed_and_member_0_not_from_n() -> None:
    first, again, other, many = (
        EnsembleKD(Rows, n, seed=s, item_attributes=ATTRIBUTES).state_dict()
        for n, s in ((2, 0), (2, 0), (2, 1), (4, 0))
    )
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, many[name][:2])
        if not name.endswith("bias"):
            assert not torch.equal(value, other[name])
            assert not torch.equal(value[0], value[1])


def test_state_names_and_loading(tmp_path: Path) -> None:
    def encoder() -> nn.Module:
        return BERT4Rec(V, d_model=8, num_heads=2, max_len=6)

    model = EnsembleKD(encoder, 3, item_attributes=ATTRIBUTES)
    plain = encoder().state_dict()
    assert list(model.encoder.state_dict()) == list(plain)
    assert all(value.shape == (3, *plain[name].shape) for name, value in model.encoder.state_dict().items())
    heads = {
        "item_classifier.weight",
        "item_classifier.bias",
        "attribute_classifier.weight",
        "attribute_classifier.bias",
    }
    assert set(model.state_dict()) == {f"encoder.{name}" for name in plain} | heads
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = EnsembleKD(encoder, 3, item_attributes=ATTRIBUTES, seed=5)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert torch.equal(other.eval()(IDS), model.eval()(IDS))


def test_from_members_takes_copies() -> None:
    members = [Rows().double() for _ in range(2)]
    rows = [m.item_embedding.weight for m in members]
    before = [row.detach().clone() for row in rows]
    model = EnsembleKD.from_members(members, losses=0, objective=NextItem())
    hidden = model.hidden(IDS)
    for i, member in enumerate(members):
        assert torch.equal(hidden[i], member(IDS))
    model.loss(IDS).total.backward()
    loud(model)
    for member, row, old in zip(members, rows, before, strict=True):
        assert member.item_embedding.weight is row
        assert row.grad is None
        assert torch.equal(row, old)


def test_from_members_takes_modules_that_kept_a_result() -> None:
    class Keeping(Rows):
        def forward(self, item_ids: Tensor) -> Tensor:
            self.last = super().forward(item_ids)
            return self.last

    members = [Keeping(), Keeping()]
    want = torch.stack([m(IDS) for m in members])
    assert torch.equal(EnsembleKD.from_members(members).hidden(IDS), want)


# Steps


Want = list[tuple[int, int]]
COMPUTED: list[tuple[MaskedItem | NextItem, Loss | int, Want]] = [
    (MaskedItem(views=2), 0, [(6, 5)]),
    (MaskedItem(views=2), KD(), [(6, 5)]),
    (MaskedItem(views=2), 0 * AP() + 0 * ICL() + KD(), [(6, 5)]),
    (MaskedItem(views=2), AP(), [(9, 5)]),
    (MaskedItem(views=2), ICL(), [(9, 5)]),
    (MaskedItem(views=3), AP() + CCL(), [(12, 5)]),
    (NextItem(), 0, [(3, 4)]),
    (NextItem(), AP() + KD(), [(3, 4)]),
    (NextItem(views=2), AP(), [(6, 4)]),
    (NextItem(), AP() + ICL(), [(6, 4)]),
    (NextItem(views=2), CCL(), [(9, 4)]),
    (NextItem(mask_ratio=0.3), AP(), [(6, 4)]),
    (NextItem(mask_ratio=0.3), KD(), [(3, 4)]),
]


@pytest.mark.parametrize(("objective", "losses", "want"), COMPUTED)
def test_a_step_reads_only_what_its_terms_need_in_one_call(
    objective: MaskedItem | NextItem, losses: Loss | int, want: Want
) -> None:
    logs: list[list[tuple[int, ...]]] = []

    def encoder() -> nn.Module:
        logs.append([])
        return Rows(logs[-1])

    model = make(encoder, objective=objective, losses=losses, item_attributes=ATTRIBUTES)
    for log in logs:
        log.clear()
    model.loss(IDS)
    assert logs == [want] * 3


def test_view_0_serves_as_the_anchor_of_next_item() -> None:
    """With dropout two passes would differ: AP's loss is that of view 0's own hidden states."""

    class Dropping(Rows):
        def forward(self, item_ids: Tensor) -> Tensor:
            self.last = nn.functional.dropout(super().forward(item_ids), 0.5, self.training)
            return self.last

    model = make(Dropping, n=1, objective=NextItem(views=2), losses=AP(), item_attributes=ATTRIBUTES)
    got = model.loss(IDS).terms["ap"]
    head, items = model.attribute_classifier, IDS[:, 1:].masked_fill(IDS[:, :-1] == 0, 0).flatten()
    hidden = model.encoder.member(0).last[:3].reshape(-1, D)  # type: ignore[union-attr, index]
    logits = (hidden @ head.weight[0].T + head.bias[0])[None]
    want = reference.ap(logits, ATTRIBUTES.table[items], items != 0).sum()
    torch.testing.assert_close(got, want.detach())


def test_one_member_has_nobody_to_learn_from() -> None:
    for objective in (MaskedItem(0.5), NextItem()):
        model = make(n=1, objective=objective, losses=ICL() + CCL() + KD())
        terms = model.loss(IDS, generator=masks()).terms
        assert (terms["ccl"].item(), terms["kd"].item()) == (0.0, 0.0)
        assert terms["icl"].item() != 0
        model.losses = 5.0 * CCL() + 5.0 * KD()
        step = model.loss(IDS, generator=masks())
        assert torch.equal(step.total.detach(), step.terms[objective.name])


def test_losses_may_be_set_anew() -> None:
    model = make(objective=MaskedItem(0.5), losses=ICL() + KD())
    both = model.loss(IDS, generator=masks())
    model.losses = 0.5 * KD()
    one = model.loss(IDS, generator=masks())
    model.losses = 0
    none = model.loss(IDS, generator=masks())
    assert list(both.terms) == ["mip", "kd", "icl"]
    assert list(one.terms) == ["mip", "kd"]
    assert list(none.terms) == ["mip"]
    torch.testing.assert_close(both.total - none.total, (both.terms["icl"] + both.terms["kd"]))
    torch.testing.assert_close(one.total - none.total, 0.5 * one.terms["kd"])
    with pytest.raises(EnsembleKDError, match="AP needs"):
        model.losses = AP()
    assert model.losses == 0


def test_equal_and_different_contrasts_agree_with_each_alone() -> None:
    for losses in (ICL() + CCL(), ICL() + CCL(temperature=1.0), ICL(pool="mean") + CCL(variant="reference_code")):
        model = make(objective=NextItem(views=2), losses=losses)
        together = model.loss(IDS).terms
        for _, term in losses.weighted():
            model.losses = term
            torch.testing.assert_close(model.loss(IDS).terms[term.name], together[term.name])


def test_the_backends_give_the_same_step_and_gradients() -> None:
    def encoder() -> nn.Module:
        return BERT4Rec(V, d_model=8, num_heads=2, max_len=6, dropout=0.0)

    results = []
    for backend in ("loop", "vmap"):
        model = make(encoder, losses=ALL, item_attributes=ATTRIBUTES, backend=backend)
        step = model.loss(IDS, generator=masks())
        step.total.backward()
        results.append((step.total.detach(), step.terms, [p.grad for p in model.parameters()], model(IDS).detach()))
        assert model.backend["train on cpu"].startswith(backend)
    torch.testing.assert_close(results[0], results[1])


def test_a_step_without_checks_is_the_same() -> None:
    model = make(objective=MaskedItem(0.5), losses=KD())
    checked, unchecked = (model.loss(IDS, generator=masks(), validate=v).total for v in (True, False))
    assert torch.equal(checked, unchecked)


# Scores


@pytest.mark.parametrize("classifier", ["linear", "tied", "item_embedding"])
@pytest.mark.parametrize("encoder", [Rows, Newest])
def test_scores_are_inner_products_and_their_mean(encoder: Callable[[], nn.Module], classifier: str) -> None:
    model = make(encoder, objective=NextItem(), classifier=classifier)
    scores = model.member_scores(IDS)
    assert scores.shape == (3, 3, V + 1)
    assert bool((scores[..., 0] == -torch.inf).all())
    hidden = model.hidden(IDS)
    newest = hidden if hidden.ndim == 3 else hidden[:, :, -1]
    weight = model.item_classifier.weight
    if classifier != "linear":
        assert weight is None
        weight = model.encoder.stacked_parameter("item_embedding.weight")[:, 1:-1]  # type: ignore[index]
    for i in range(3):
        want = newest[i] @ weight[i].T + model.item_classifier.bias[i]
        torch.testing.assert_close(scores[i, :, 1:], want)
    torch.testing.assert_close(model(IDS), scores.mean(dim=0))


@pytest.mark.parametrize("negatives", [None, 5])
def test_a_tie_to_a_table_without_a_mask_token_is_that_to_one_with_it(negatives: int | None) -> None:
    options = {"objective": NextItem(negatives=negatives), "losses": KD(), "classifier": "table"}
    without, with_mask = make(Unmasked, **options), make(Gone, **options)
    tables = [model.encoder.get_parameter("table.weight") for model in (without, with_mask)]
    assert [table.shape[1] for table in tables] == [V + 1, V + 2]
    with torch.no_grad():
        tables[1][:, :-1] = tables[0]
    assert torch.equal(without.member_scores(IDS), with_mask.member_scores(IDS))
    assert torch.equal(without.recommend(IDS, k=3).items, with_mask.recommend(IDS, k=3).items)
    totals = [model.loss(IDS, generator=masks()).total for model in (without, with_mask)]
    assert torch.equal(*totals)
    for total in totals:
        total.backward()
    grads = [table.grad.to_dense() for table in tables]  # type: ignore[union-attr]
    torch.testing.assert_close(grads[0][:, 1:], grads[1][:, 1:-1])
    assert not grads[1][:, -1].any()
    assert without.sparse_tables() == with_mask.sparse_tables()


def test_masked_item_scores_at_an_appended_mask() -> None:
    model = make(objective=MaskedItem())
    at_mask = model.hidden(torch.full((1, 1), V + 1))[:, 0, 0]
    weight, bias = model.classifier_weights()
    want = torch.einsum("nd,nvd->nv", at_mask, weight) + bias
    torch.testing.assert_close(model.member_scores(IDS)[:, 0, 1:], want)


@pytest.mark.parametrize("encoder", [BERT4Rec, SASRec])
def test_padding_changes_no_score(encoder: Callable[..., nn.Module]) -> None:
    model = make(lambda: encoder(V, d_model=8, num_heads=2, max_len=9), n=2).eval()
    wider = torch.cat([IDS.new_zeros(3, 3), IDS], dim=1)
    torch.testing.assert_close(model(wider), model(IDS))
    torch.testing.assert_close(model(IDS[:1, 2:]), model(IDS)[:1])
    longer = torch.cat([torch.randint(1, V, (3, 20), generator=masks()), wider.clamp(min=1)], dim=1)
    torch.testing.assert_close(model(longer), model(longer[:, -(8 if model.objective.name == "mip" else 9) :]))


def test_recommendations_leave_out_what_was_seen() -> None:
    model = make(objective=NextItem())
    scores = model(IDS).detach()
    items, values = model.recommend(IDS, k=V, exclude_seen=True)
    for row, seen in enumerate(IDS.tolist()):
        unseen = [i for i in range(1, V + 1) if i not in seen]
        want = sorted(unseen, key=lambda i: -float(scores[row, i]))
        assert items[row].tolist() == want + [0] * (V - len(want))
        torch.testing.assert_close(values[row, : len(want)], scores[row, want])
        assert bool((values[row, len(want) :] == -torch.inf).all())
    every = model.recommend(IDS, k=V, exclude_seen=False)
    assert every.items.sort().values.tolist() == [list(range(1, V + 1))] * 3
    assert model.recommend(IDS, k=2).items.tolist() == items[:, :2].tolist()


def test_recommending_takes_evaluation_mode_and_gives_it_back() -> None:
    model = make(lambda: nn.Sequential(Rows(), nn.Dropout(0.5)), num_items=V)
    assert torch.equal(model.recommend(IDS, k=3).scores, model.recommend(IDS, k=3).scores)
    assert model.training
    assert model.encoder.member(2).training
    assert not model.recommend(IDS).scores.requires_grad


# Members and copies


@pytest.mark.parametrize("classifier", ["linear", "tied"])
@pytest.mark.parametrize("objective", [MaskedItem(0.5), NextItem()])
def test_a_member_scores_and_trains_as_its_row(objective: MaskedItem | NextItem, classifier: str) -> None:
    model = make(objective=objective, classifier=classifier, losses=AP() + ICL(), item_attributes=ATTRIBUTES)
    scores, items = model.member_scores(IDS).detach(), model.recommend(IDS, k=4)
    parts = []
    for i in range(3):
        alone = model.member(i)
        assert (len(alone), alone.training) == (1, True)
        torch.testing.assert_close(alone.member_scores(IDS)[0], scores[i])
        torch.testing.assert_close(alone(IDS), scores[i])
        parts.append(alone.loss(IDS, generator=masks()).total)
        parts[-1].backward()
        alone.register_forward_hook(lambda *_: None)
        alone.losses = 0
        loud(alone)
    assert not model._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model.recommend(IDS, k=4).scores, items.scores)
    torch.testing.assert_close(model.loss(IDS, generator=masks()).total, torch.stack(parts).sum())


def test_members_keep_what_is_frozen() -> None:
    model = make(item_attributes=ATTRIBUTES)
    model.item_classifier.requires_grad_(False)
    model.encoder.requires_grad_(False)
    frozen = {name for name, p in model.member(1).named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.item_embedding.weight", "item_classifier.weight", "item_classifier.bias"}
    before = copy.deepcopy(model.state_dict())
    model.losses = AP()
    model.loss(IDS).total.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"attribute_classifier.weight", "attribute_classifier.bias"}


def test_copies_and_pickles_score_alike_and_stand_apart() -> None:
    model = make(losses=ALL, item_attributes=ATTRIBUTES)
    want = model(IDS).detach().clone()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), want)
        assert repr(twin) == repr(model)
        torch.testing.assert_close(twin.loss(IDS, generator=masks()).total, model.loss(IDS, generator=masks()).total)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
    assert torch.equal(model(IDS), want)


# Precision


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("classifier", ["linear", "tied"])
def test_autocast_keeps_losses_and_scores_in_float32(backend: str, classifier: str) -> None:
    def encoder() -> nn.Module:
        return BERT4Rec(V, d_model=8, num_heads=2, max_len=6, dropout=0.0)

    model = EnsembleKD(
        encoder,
        losses=ALL,
        item_attributes=ATTRIBUTES,
        backend=backend,
        classifier=classifier,  # type: ignore[arg-type]
    )
    exact = model.loss(IDS, generator=masks())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step, scores = model.loss(IDS, generator=masks()), model(IDS)
        members = model.member_scores(IDS)
    step.total.backward()
    assert {step.total.dtype, scores.dtype, members.dtype, *(t.dtype for t in step.terms.values())} == {torch.float32}
    torch.testing.assert_close(step.total, exact.total, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_float64_model_is_float64_throughout() -> None:
    built = EnsembleKD(lambda: Rows().double(), losses=ALL, item_attributes=ATTRIBUTES)
    moved = EnsembleKD(Rows, losses=ALL, item_attributes=ATTRIBUTES).to(torch.float64)
    for model in (built, moved):
        step = model.loss(IDS)
        assert {step.total.dtype, *(t.dtype for t in step.terms.values())} == {torch.float64}
        assert {model(IDS).dtype, model.member_scores(IDS).dtype} == {torch.float64}
        assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("classifier", ["linear", "tied"])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64])
def test_encoders_of_any_precision_train_and_score(stored: torch.dtype, out: torch.dtype, classifier: str) -> None:
    class Mixed(Rows):
        def forward(self, item_ids: Tensor) -> Tensor:
            return super().forward(item_ids).to(out)

    model = EnsembleKD(lambda: Mixed().to(stored), losses=ALL, item_attributes=ATTRIBUTES, classifier=classifier)
    step = model.loss(IDS, generator=masks())
    step.total.backward()
    want = torch.float64 if out == torch.float64 else torch.float32
    assert step.total.dtype == model(IDS).dtype == model.member_scores(IDS).dtype == want
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    torch.testing.assert_close(model(IDS), model.member_scores(IDS).mean(dim=0))


# What is refused


class Giving(Rows):
    """Returns what it is told to."""

    def __init__(self, give: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.give = give

    def forward(self, item_ids: Tensor) -> Any:
        return self.give(super().forward(item_ids))


class Ending(Rows):
    """Leaves out all positions but the last where it may, and returns there what it is told to."""

    def __init__(self, give: Callable[[Tensor], object] = lambda h: h[:, -1], log: Any = None) -> None:
        super().__init__(log)
        self.give = give

    def forward(self, item_ids: Tensor, *, newest: bool = False) -> Any:
        if newest:
            item_ids = item_ids[:, -1:]
        h = super().forward(item_ids)
        return self.give(h) if newest else h


class Few(Rows):
    """Lacks the row of the mask token."""

    def __init__(self) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(V + 1, D)


class Listed(Rows):
    """Reaches its parameter through a list, past the stack."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.item_embedding.weight]

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.weights[0][item_ids]


SHAPES = "encoder output: expected hidden states (b, l, d) or (b, d), got "
RETURN = "Return hidden states (b, l, d), or (b, d) for the newest position alone."
LAST = "With newest=True, return forward's last position, (b, d), or give that keyword another name."
LEFT = "Pad on the left with 0 (ensemble_kd.encoders turns right padding), and leave empty rows out."
NUMBER = "Renumber the items from 1 without gaps, or raise num_items."
ROWS = "Its embedding needs V + 2 rows: padding, the items 1..V, the mask token. Call it by itself first."
TIE = 'Use classifier="linear", "tied", or the dotted path of the item embedding.'
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no num_items": (
        lambda: EnsembleKD(lambda: nn.Embedding(9, 4)),
        "EnsembleKD: expected a whole number num_items >= 1, got None. Pass num_items=..., or give the encoder an "
        "attribute of that name.",
    ),
    "max_len 0": (
        lambda: EnsembleKD(Rows, max_len=0),
        "EnsembleKD: expected a whole number max_len >= 1, got 0. Pass max_len=..., or give the encoder an attribute "
        "of that name.",
    ),
    "no module": (
        lambda: EnsembleKD(lambda: None),  # type: ignore[arg-type, return-value]
        "encoder_fn: expected an nn.Module, got NoneType. Return the module that maps item_ids (b, l) to hidden states "
        "(b, l, d).",
    ),
    "from_members twice": (
        lambda: EnsembleKD.from_members([Rows()] * 2),
        "from_members: expected a new module for each member, got the same module twice. Build a new module for each "
        "member, or they would share their weights.",
    ),
    "from no members": (
        lambda: EnsembleKD.from_members([]),
        "from_members: expected at least one member, got none. Pass one module or more.",
    ),
    "a tuple": (
        lambda: EnsembleKD(lambda: Giving(lambda h: (h, h))),
        f"encoder output: expected a tensor, got tuple. {RETURN}",
    ),
    "rank 4": (
        lambda: EnsembleKD(lambda: Giving(lambda h: h[None])),
        f"{SHAPES}(1, 2, 4, 6) for item_ids of shape (2, 4). {RETURN}",
    ),
    "rank 1": (
        lambda: EnsembleKD(lambda: Giving(lambda h: h[:, 0, 0])),
        f"{SHAPES}(2,) for item_ids of shape (2, 4). {RETURN}",
    ),
    "another length": (
        lambda: EnsembleKD(lambda: Giving(lambda h: h[:, 1:])),
        f"{SHAPES}(2, 3, 6) for item_ids of shape (2, 4). {RETURN}",
    ),
    "another length later": (
        lambda: EnsembleKD(lambda: Giving(lambda h: h[:, :4])).loss(IDS),
        "encoder output: expected (b, l, d), got (9, 4, 6) for item_ids of shape (9, 5). Return one hidden state per "
        "input position, whatever the length.",
    ),
    "another newest": (
        lambda: EnsembleKD(lambda: Ending(lambda h: 2 * h[:, -1])),
        "forward(item_ids, newest=True): expected the last of the hidden states, (2, 6), got one that differs by "
        f"100.0%. {LAST}",
    ),
    "another shape of the newest": (
        lambda: EnsembleKD(lambda: Ending(lambda h: h)),
        "forward(item_ids, newest=True): expected the last of the hidden states, (2, 6), got Tensor (2, 1, 6) "
        f"torch.float32. {LAST}",
    ),
    "integers": (
        lambda: EnsembleKD(lambda: Giving(lambda h: h.long())),
        f"encoder output: expected floating-point hidden states, got torch.int64. {RETURN}",
    ),
    "no row for the mask": (
        lambda: EnsembleKD(Few),
        "encoder: expected a module that reads item_ids (2, 4) with ids up to 13, got IndexError: index out of range "
        f"in self. {ROWS}",
    ),
    "no row for the last item": (
        lambda: EnsembleKD(Few, num_items=V + 1, objective=NextItem()),
        "encoder: expected a module that reads item_ids (2, 4) with ids up to 13, got IndexError: index out of range "
        f"in self. {ROWS}",
    ),
    "a parameter in a list": (
        lambda: EnsembleKD(Listed),
        "encoder: expected a forward that runs within calls alone, got a part of it that ran without weights. Switch "
        "activation checkpointing off: it runs forward again in backward. Look parameters up by their names: a "
        "reference kept elsewhere is never trained.",
    ),
    "MaskedItem on (b, d)": (
        lambda: EnsembleKD(Newest, objective=MaskedItem()),
        "MaskedItem: expected an encoder that returns (b, l, d), got one that returns (b, d). Masked positions need a "
        "hidden state each: train this encoder with objective=NextItem().",
    ),
    "a class for an objective": (
        lambda: EnsembleKD(Rows, objective=NextItem),  # type: ignore[arg-type]
        "objective: expected MaskedItem(...) or NextItem(...), got <class "
        "'ensemble_kd.objectives.next_item.NextItem'>. Pass one, such as objective=NextItem().",
    ),
    "a word for an objective": (
        lambda: EnsembleKD(Rows, objective="mask"),  # type: ignore[arg-type]
        "objective: expected MaskedItem(...) or NextItem(...), got 'mask'. Pass one, such as objective=NextItem().",
    ),
    "a class for a loss": (
        lambda: EnsembleKD(Rows, losses=KD),  # type: ignore[arg-type]
        "losses: expected a sum of ICL, CCL, KD, Ambiguity, AP, or 0 for none, got <class "
        "'ensemble_kd.losses.terms.KD'>. See ensemble_kd.losses.",
    ),
    "AP without attributes": (
        lambda: EnsembleKD(Rows, losses=AP() + KD()),
        "losses: expected item_attributes, which AP needs, got none. Pass item_attributes, or leave AP out of losses.",
    ),
    "attributes of another catalogue": (
        lambda: EnsembleKD(Rows, num_items=V - 1, item_attributes=ATTRIBUTES),
        "item_attributes: expected a table of 13 rows and >= 1 attributes, got 14 rows and 3 attributes. Build them "
        "with ItemAttributes.from_dict(..., num_items).",
    ),
    "a dictionary of attributes": (
        lambda: EnsembleKD(Rows, item_attributes={1: [2]}),  # type: ignore[arg-type]
        "item_attributes: expected a table of 14 rows and >= 1 attributes, got dict. Build them with "
        "ItemAttributes.from_dict(..., num_items).",
    ),
    "no embedding to tie to": (
        lambda: EnsembleKD(Gone, classifier="tied"),
        "classifier: expected an embedding named item_embedding, got an encoder with table (14, 6). Use "
        "classifier='table', or \"linear\".",
    ),
    "no embedding at all": (
        lambda: EnsembleKD(Tableless, objective=NextItem(), classifier="a.b"),
        f"classifier: expected an embedding named a.b, got an encoder without tables of more than 12 rows. {TIE}",
    ),
    "an embedding without the mask token": (
        lambda: EnsembleKD(Unmasked, objective=NextItem(mask_ratio=0.5), classifier="table"),
        "classifier: expected an embedding of shape (14, 6), got table.weight of shape (13, 6). Give the mask token, "
        "which this objective shows, a row after the items' (num_items + 2 rows).",
    ),
    "an embedding of another shape": (
        lambda: EnsembleKD(Gone, classifier="table", num_items=V - 1),
        f"classifier: expected an embedding of shape (13, 6), got table.weight of shape (14, 6). {TIE}",
    ),
    "an embedding of no use without masks": (
        lambda: EnsembleKD(Gone, classifier="table", num_items=V - 2, objective=NextItem()),
        "classifier: expected an embedding of shape (12, 6) or (11, 6), got table.weight of shape (14, 6). " + TIE,
    ),
    "a list of ids": (
        lambda: make().loss([[1, 2]]),  # type: ignore[arg-type]
        "loss: expected item_ids as an int64 tensor, got list. Convert them: torch.as_tensor(item_ids).",
    ),
    "a float batch": (
        lambda: make().loss(IDS.float()),
        "loss: expected item_ids as an int64 tensor, got torch.float32. Convert them: item_ids.long().",
    ),
    "a batch of one axis": (
        lambda: make()(IDS[0]),
        "forward: expected item_ids of shape (b, l), got (5,). Pass a row for each sequence, item_ids[None] for one.",
    ),
    "an empty batch": (
        lambda: make().member_scores(IDS[:0]),
        "member_scores: expected item_ids of shape (b, l), got (0, 5). Pass a row for each sequence, item_ids[None] "
        "for one.",
    ),
    "ids below 0": (lambda: make().loss(IDS - 1), f"loss: expected item_ids in 0..12, got -1. {NUMBER}"),
    "the mask token in a loss": (lambda: make().loss(IDS + 1), f"loss: expected item_ids in 0..12, got 13. {NUMBER}"),
    "ids above V + 1": (lambda: make().hidden(IDS + 2), f"hidden: expected item_ids in 0..13, got 14. {NUMBER}"),
    "a row of padding": (
        lambda: make().loss(IDS * torch.tensor([[1], [0], [1]])),
        f"loss: expected an item in the last column of every row, got a row that ends in padding. {LEFT}",
    ),
    "padding inside": (
        lambda: make().recommend(torch.tensor([[1, 0, 2]])),
        f"recommend: expected padding on the left only, got a row with 0 after an item. {LEFT}",
    ),
    "nothing to predict": (
        lambda: make(objective=NextItem()).loss(torch.tensor([[0, 1], [2, 3]])),
        "loss: expected rows of at least 2 items, got a shorter row. Leave shorter rows out: one item has no next item "
        "to learn from.",
    ),
    "one sequence": (
        lambda: make(losses=CCL()).loss(IDS[:1]),
        "contrastive loss: expected at least 2 sequences in a batch, got 1. There are no negatives otherwise: use a "
        "larger batch, or leave ICL and CCL out.",
    ),
    "a temperature of 0": (
        lambda: ICL(temperature=0.0),
        "ICL: expected temperature, a finite number > 0, got 0.0. Pass such a number.",
    ),
    "a negative weight": (
        lambda: -1.0 * KD(),
        "losses: expected the weight of a loss, a finite number >= 0, got -1.0. Pass such a number.",
    ),
    "k = 0": (
        lambda: make().recommend(IDS, k=0),
        "recommend: expected k of 12 items, a whole number in 1..12, got 0. Pass such a number.",
    ),
    "k = 13": (
        lambda: make().recommend(IDS, k=13),
        "recommend: expected k of 12 items, a whole number in 1..12, got 13. Pass such a number.",
    ),
    "k = 2.0": (
        lambda: make().recommend(IDS, k=2.0),  # type: ignore[arg-type]
        "recommend: expected k of 12 items, a whole number in 1..12, got 2.0. Pass such a number.",
    ),
    "member 3 of 3": (lambda: make().member(3), "member: expected an index below 3, got 3. Count from 0."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str) -> None:
    attempt, text = REFUSED[name]
    with pytest.raises(EnsembleKDError) as caught:
        attempt()
    assert str(caught.value) == text


def test_numbers_of_numpy_are_numbers() -> None:
    model = EnsembleKD(Rows, np.int64(2), num_items=np.int64(V), seed=np.int64(1))  # type: ignore[arg-type]
    assert (len(model), type(model.num_items)) == (2, int)


def test_next_item_asks_for_no_row_of_the_mask_token() -> None:
    assert EnsembleKD(Few, objective=NextItem()).loss(IDS).total.isfinite()


class Counted(nn.Module):
    """Padding as no position at all, and BatchNorm where ``mixes``; logs the widths that it is called with."""

    num_items = V

    def __init__(self, widths: list[int], mixes: bool = False) -> None:
        super().__init__()
        self.item_embedding, self.norm = nn.Embedding(V + 2, D), nn.BatchNorm1d(D) if mixes else nn.Identity()
        self.widths = widths

    def forward(self, item_ids: Tensor) -> Tensor:
        self.widths.append(item_ids.shape[1])
        x = self.item_embedding(item_ids) * (item_ids != 0)[..., None]
        return self.norm(x.cumsum(dim=1).tanh().mT).mT  # type: ignore[no-any-return]


RAGGED = torch.zeros(9, 20, dtype=torch.int64)
for _row, _length in enumerate([20, 2, 3, 17, 5, 9, 8, 2, 20]):
    RAGGED[_row, -_length:] = torch.arange(_length) * (_row + 1) % V + 1


@pytest.mark.parametrize("objective", [NextItem(), NextItem(views=2, mask_ratio=0.3), MaskedItem(views=2)], ids=repr)
@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("classifier", ["linear", "tied"])
def test_rows_by_length_give_the_same_loss_without_padding(objective: Any, backend: Any, classifier: str) -> None:
    widths: list[int] = []
    model = EnsembleKD(
        lambda: Counted(widths).double(),
        3,
        objective=objective,
        losses=ALL,
        item_attributes=ATTRIBUTES,
        backend=backend,
        classifier=classifier,
    )
    found = []
    for by_length in (False, True):
        model.zero_grad()
        widths.clear()
        step = model.loss(RAGGED, generator=torch.Generator().manual_seed(0), by_length=by_length)
        step.total.backward()
        found.append([step.total, *step.terms.values(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(set(widths)) > 2 if by_length else len(set(widths)) == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


def test_rows_that_depend_on_each_other_stay_together() -> None:
    widths: list[int] = []
    model = EnsembleKD(lambda: Counted(widths, mixes=True), 2, objective=NextItem(), losses=0)
    widths.clear()
    model.loss(RAGGED, by_length=True)
    assert set(widths) == {19}
    widths.clear()
    model.eval().loss(RAGGED, by_length=True)
    assert set(widths) > {19}


def test_rows_by_length_work_for_the_newest_position_alone() -> None:
    model = EnsembleKD(lambda: Newest().double(), 2, losses=ICL() + CCL())  # a mean over padding, too: width matters
    ids = IDS[1:2].repeat(4, 1)
    one, other = (model.loss(ids, by_length=by_length).total for by_length in (False, True))
    torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


def test_next_items_are_not_asked_of_an_encoder_that_has_seen_them() -> None:
    with pytest.raises(EnsembleKDError, match="NextItem: expected an encoder whose states depend on no later item"):
        EnsembleKD(lambda: BERT4Rec(V, d_model=4, max_len=5), objective=NextItem())
    assert EnsembleKD(lambda: BERT4Rec(V, d_model=4, max_len=5)).objective == MaskedItem()


class Scores(Rows):
    """Returns logits for hidden states, as many models do."""

    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids) @ self.item_embedding.weight[:-1].T


def test_scores_are_not_taken_for_hidden_states() -> None:
    with pytest.raises(EnsembleKDError, match=r"got d = 13, a column per item: logits, it seems. Return the states"):
        EnsembleKD(Scores)
    trained = make()
    with pytest.raises(EnsembleKDError, match="expected finite hidden states, got inf or nan"):
        EnsembleKD.from_members([trained.member(0), trained.member(1)])


def test_an_objective_that_lacks_a_part_is_told_which() -> None:
    class Half:
        def draw(self) -> None: ...

    with pytest.raises(EnsembleKDError, match="objective: expected all members of an Objective, got none of min_items"):
        EnsembleKD(Rows, objective=Half())  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", [NextItem(), MaskedItem()], ids=repr)
def test_scores_ask_for_the_newest_state_alone(objective: Any) -> None:
    log: list[tuple[int, ...]] = []
    model = EnsembleKD(lambda: Ending(log=log), 2, objective=objective).eval()
    plain = EnsembleKD(Rows, 2, objective=objective).eval()
    log.clear()
    for ask in (model, model.recommend, model.query_vectors, model.member_scores, model.query_states):
        ask(IDS[:, -3:])  # type: ignore[operator]
    assert log == [(len(IDS), 1)] * 10
    assert torch.equal(model(IDS), plain(IDS))
    log.clear()
    model.train()(IDS)  # what is drawn at random stays as it is
    assert log[0][1] > 1
