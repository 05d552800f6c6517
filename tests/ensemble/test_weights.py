"""Weights and temperatures of members: one mean, in every answer, in states, files, members and students."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ensemble_kd import EnsembleKD
from ensemble_kd.data import synthetic
from ensemble_kd.distillation import FromTeacher
from ensemble_kd.encoders import GRU4Rec, SASRec
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.evaluation import evaluate
from ensemble_kd.export import Scorer, load, save
from ensemble_kd.growing import grow
from ensemble_kd.losses import KD
from ensemble_kd.metrics import ranks

V = 80
DATA = synthetic(num_users=50, num_items=V)
IDS = DATA.inputs("test", 6)[:7]
WEIGHTS, TEMPERATURES = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.5, 3.0, 2.0])
FACTORIES = [
    lambda: SASRec(V, d_model=8, max_len=6),
    lambda: GRU4Rec(V, d_model=6, max_len=6),
    lambda: SASRec(V, d_model=8, max_len=6),
]


def plain() -> EnsembleKD:
    model = EnsembleKD(FACTORIES, losses=0).double().eval()
    with torch.no_grad():
        assert model.item_classifier.weight is not None
        model.item_classifier.weight.mul_(30)  # probabilities that differ
        model.item_classifier.bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


def weighted() -> EnsembleKD:
    model = plain()
    model.weigh(WEIGHTS, TEMPERATURES)
    return model


def expected(model: EnsembleKD) -> Tensor:
    """The definition: the mean of weight · logits / temperature."""
    logits = model.member_scores(IDS)[..., 1:]
    scaled = [w * z / t for w, z, t in zip(WEIGHTS.tolist(), logits, TEMPERATURES.tolist(), strict=True)]
    return (scaled[0] + scaled[1] + scaled[2]) / 3


def test_ones_change_no_bit() -> None:
    model, same = plain(), plain()
    same.weigh([5, 5, 5])
    assert torch.equal(same.weights, torch.ones(3, dtype=torch.float64))
    assert torch.equal(same(IDS), model(IDS))
    for how in ("logits", "probabilities", "ranks"):
        got, want = (m.recommend(IDS, k=5, aggregate=how) for m in (same, model))  # type: ignore[arg-type]
        assert torch.equal(got.items, want.items)
        assert torch.equal(got.scores, want.scores)
    assert torch.equal(same.query_vectors(IDS), model.query_vectors(IDS))


def test_every_answer_counts_members_by_their_weights() -> None:
    model = weighted()
    torch.testing.assert_close(model.weights, torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64))
    want = expected(model)
    torch.testing.assert_close(model(IDS)[:, 1:], want)
    torch.testing.assert_close(model.query_vectors(IDS) @ model.item_vectors().T, want)
    torch.testing.assert_close(Scorer(model)(IDS)[:, 1:], want)
    top = model.recommend(IDS, k=4, exclude_seen=False)
    torch.testing.assert_close(top.scores, want.topk(4).values)
    logits = model.member_scores(IDS)[..., 1:] / TEMPERATURES.double()[:, None, None]
    p = (WEIGHTS.double()[:, None, None] * logits.softmax(dim=-1)).sum(dim=0) / 3
    top = model.recommend(IDS, k=4, exclude_seen=False, aggregate="probabilities")
    torch.testing.assert_close(top.scores, p.topk(4).values)
    entropies = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    entropy = -(p * p.log()).sum(-1)
    sure = model.uncertainty(IDS)
    torch.testing.assert_close(sure.entropy, entropy)
    information = entropy - (2 * entropies[0] + entropies[2]) / 3
    torch.testing.assert_close(sure.mutual_information, information)


def test_evaluation_ranks_by_the_weighted_scores() -> None:
    model = weighted()
    found = evaluate(model, DATA, "test", exclude="none").ranks
    scores = model(DATA.inputs("test", 6))
    assert torch.equal(found["ensemble"], ranks(scores[None], DATA.target("test"))[0])
    uniform = evaluate(plain(), DATA, "test", exclude="none").ranks
    assert all(torch.equal(found[f"member {i}"], uniform[f"member {i}"]) for i in range(3))
    assert not torch.equal(found["ensemble"], uniform["ensemble"])


def test_weights_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model, want = weighted(), weighted()(IDS)
    assert "weights" not in plain().state_dict()
    fresh = plain()
    fresh.load_state_dict(model.state_dict())
    for same in (fresh, copy.deepcopy(model), load(save(model, tmp_path / "m.safetensors"), FACTORIES)):
        torch.testing.assert_close(same(IDS), want, rtol=0, atol=0)
    fresh.load_state_dict(plain().state_dict())
    assert torch.equal(fresh(IDS), plain()(IDS))
    assert not fresh.is_weighted
    member = model.member(2)
    torch.testing.assert_close(member(IDS)[:, 1:], model.member_scores(IDS)[2, :, 1:] / 2.0)
    torch.testing.assert_close(grow(model, 3)(IDS)[:, : V + 1], want, rtol=0, atol=0)


def test_a_teacher_teaches_by_its_weights() -> None:
    """A teacher of whose members one counts is that member at its temperature."""
    model = plain()
    model.weigh([0, 0, 1], [1, 1, 2])
    alone = model.member(2)
    assert float(alone.temperatures) == 2
    student = EnsembleKD(FACTORIES[0], 1, losses=KD(temperature=1.0)).double().eval()
    steps = []
    for teacher in (model, alone):
        generator = torch.Generator().manual_seed(0)
        steps.append(student.loss(IDS, item_loss=FromTeacher(teacher, spliced=False), generator=generator).total)
    torch.testing.assert_close(steps[0], steps[1])


@pytest.mark.parametrize(
    ("weights", "temperatures", "message"),
    [
        ([1, 2], None, "weigh: expected 3 weights, at least 0, one of them more, got [1.0, 2.0]. Pass one"),
        ([1, -1, 1], None, "weigh: expected 3 weights, at least 0, one of them more, got [1.0, -1.0, 1.0]. Pass one"),
        ([0, 0, 0], None, "weigh: expected 3 weights, at least 0, one of them more, got [0.0, 0.0, 0.0]. Pass one"),
        ([1, 1, float("nan")], None, "weigh: expected 3 weights, at least 0, one of them more, got [1.0, 1.0, nan]."),
        ([1, 1, 1], [1, 0, 1], "weigh: expected 3 temperatures, above 0, got [1.0, 0.0, 1.0]. Pass one"),
    ],
)
def test_other_weights_are_refused(weights: list[float], temperatures: list[float] | None, message: str) -> None:
    with pytest.raises(EnsembleKDError) as error:
        plain().weigh(weights, temperatures)
    assert str(error.value).startswith(message)
