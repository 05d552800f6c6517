"""Training a mixed ensemble: clipping per member, checkpoints, resume, the log, distillation, and what is saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ensemble_kd import (
    AP,
    CCL,
    ICL,
    KD,
    EnsembleKD,
    NextItem,
    fit,
)
from ensemble_kd.data import synthetic
from ensemble_kd.distillation import distill
from ensemble_kd.encoders import Caser, GRU4Rec, SASRec
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.evaluation import evaluate
from ensemble_kd.export import Scorer, load, save, to_program
from ensemble_kd.growing import grow
from ensemble_kd.training import clip_members_
from ensemble_kd.training.gradients import member_rows

V, LENGTH = 90, 8
SHAPES = [(SASRec, 8), (GRU4Rec, 5), (SASRec, 8), (Caser, 8)]
DATA = synthetic(num_users=60, num_items=V)


def kinds(d: int = 8) -> list:  # type: ignore[type-arg]
    return [
        lambda: SASRec(V, d_model=8, max_len=LENGTH),
        lambda: GRU4Rec(V, d_model=d, max_len=LENGTH),
        lambda: SASRec(V, d_model=8, max_len=LENGTH),
        lambda: Caser(V, d_model=8, max_len=LENGTH),
    ]


def model(d: int = 8, classifier: str = "linear", objective: NextItem | None = None) -> EnsembleKD:
    losses = 0.2 * AP() + 0.01 * ICL() + KD(temperature=1.0, between="same")
    return EnsembleKD(
        kinds(d),
        losses=losses + 0.01 * CCL() if d == 8 else losses,
        item_attributes=DATA.item_attributes,
        classifier=classifier,
        objective=objective,
    )


def test_gradients_are_clipped_per_member() -> None:
    mixed = model(d=5)
    mixed.loss(DATA.train_windows(LENGTH)[:16]).total.backward()
    alone = []
    for i in range(4):
        member = mixed.member(i)
        squares = torch.zeros(())
        for name, p in mixed.named_parameters():
            kind = mixed.encoder.kinds[i]
            if name.startswith("encoder.") and not name.startswith(f"encoder.{kind}."):
                continue
            row = mixed.encoder.kinds[:i].count(kind) if name.startswith("encoder.") else i
            if p.grad is not None:
                squares += p.grad[row].square().sum()
        alone.append(squares.sqrt())
        assert member.hidden_size == (5 if i == 1 else 8)
    parameters = list(mixed.parameters())
    rows = member_rows(mixed, parameters)
    limit = float(torch.stack(alone).median())
    norms = clip_members_(parameters, limit, rows)
    torch.testing.assert_close(norms, torch.stack(alone))
    after = clip_members_(parameters, 1e9, rows)
    torch.testing.assert_close(after, norms.clamp(max=limit))


@pytest.mark.parametrize(("d", "classifier", "negatives"), [(5, "linear", None), (5, "tied", 20)])
def test_a_mixed_run_resumes_exactly_and_learns(d: int, classifier: str, negatives: int | None, tmp_path: Path) -> None:
    objective = NextItem(negatives=negatives)
    options = {"batch_size": 32, "schedule": lambda epoch, epochs: 1.0, "progress": False, "lr": 3e-3}
    whole, parts = model(d, classifier, objective), model(d, classifier, objective)
    result = fit(whole, DATA, epochs=2, output_dir=tmp_path / "whole", **options)  # type: ignore[arg-type]
    for epochs in (1, 2):
        fresh = model(d, classifier, objective)
        fit(fresh, DATA, epochs=epochs, output_dir=tmp_path / "parts", resume=True, **options)  # type: ignore[arg-type]
        parts = fresh
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name
    assert list(result.best) == [*(f"member {i}" for i in range(4)), "ensemble"]
    if classifier == "linear":
        weight = whole.item_classifier.weight
        assert weight is not None
        assert not weight[1, :, d:].any()
    other = model(d, classifier, NextItem(negatives=negatives, views=2))
    with pytest.raises(EnsembleKDError, match="objective"):
        fit(other, DATA, epochs=3, output_dir=tmp_path / "parts", resume=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("classifier", ["linear", "tied"])
def test_a_mixed_ensemble_is_saved_exported_and_evaluated(classifier: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    mixed = model(5, classifier).eval()
    ids = DATA.inputs("test", LENGTH)[:6]
    path = save(mixed, tmp_path / "mixed.safetensors")
    again = load(path, kinds(5))
    assert torch.equal(again(ids), mixed(ids))
    with pytest.raises(EnsembleKDError, match="load: expected the encoder that was saved"):
        load(path, kinds(6))
    torch.testing.assert_close(Scorer(mixed)(ids), mixed(ids))
    torch.testing.assert_close(to_program(mixed).module()(ids), mixed(ids))
    found = evaluate(mixed, DATA, "test")
    for i in range(4):
        member = mixed.member(i)
        assert torch.equal(evaluate(member, DATA, "test").ranks["ensemble"], found.ranks[f"member {i}"])
        torch.testing.assert_close(member(ids), mixed.member_scores(ids)[i])
    sure = mixed.uncertainty(ids)
    assert bool((sure.mutual_information <= sure.entropy).all())
    student = distill(mixed, kinds()[0], DATA, epochs=1, progress=False).student
    assert (len(student), student.hidden_size) == (1, 8)
    with pytest.raises(EnsembleKDError, match="FromTeacher: expected KD"):
        distill(mixed, kinds()[0], DATA, losses=KD(between="same"), epochs=1, progress=False)


@pytest.mark.parametrize("classifier", ["linear", "tied"])
def test_a_mixed_ensemble_grows(classifier: str) -> None:
    mixed = model(5, classifier).eval()
    mixed.losses = 0
    ids = DATA.inputs("test", LENGTH)[:6]
    attributes = synthetic(num_users=60, num_items=V + 5).item_attributes
    assert attributes is not None
    table = attributes.table.clone()
    table[: V + 1] = DATA.item_attributes.table[:-1]  # type: ignore[union-attr]
    grown = grow(mixed, 5, item_attributes=replace(attributes, table=table))
    assert grown.encoder.kinds == mixed.encoder.kinds
    assert torch.equal(grown(ids)[:, : V + 1], mixed(ids))
    larger = [lambda kind=kind, d=d: kind(V + 5, d_model=d, max_len=LENGTH) for kind, d in SHAPES]
    same = grow(mixed, 5, encoder_fn=larger, item_attributes=replace(attributes, table=table))
    assert torch.equal(same(ids), grown(ids))
