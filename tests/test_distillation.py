"""Distillation: a student that ends near its teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ensemble_kd import (
    AP,
    ICL,
    KD,
    EnsembleKD,
    EnsembleKDError,
    MaskedItem,
    NextItem,
    distillation,
)
from ensemble_kd.data import synthetic
from ensemble_kd.distillation import distill
from ensemble_kd.encoders import BERT4Rec, GRU4Rec, SASRec
from ensemble_kd.training import Cosine, StepDecay

DATA = synthetic(num_users=120, num_items=90)


def test_spliced_sequences_teach_by_what_the_teacher_says_alone(monkeypatch: Any, teacher: EnsembleKD) -> None:
    """Where splicing changes nothing, the mean of both losses has half the cross-entropy and all of KD and AP."""
    monkeypatch.setattr(distillation, "splice", lambda ids, generator: ids)
    seen = []

    def first_step(model: EnsembleKD, data: Any, *, loss: Any, **_: Any) -> Any:
        ids = DATA.inputs("train", 10)
        step = model.loss(ids, generator=torch.Generator().manual_seed(0), item_loss=loss)
        seen.append((step.total.item(), {name: float(value) for name, value in step.terms.items()}))
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "fit", first_step)
    for spliced in (True, False):
        with pytest.raises(KeyboardInterrupt):
            distill(
                teacher, lambda: SASRec(90, d_model=8, max_len=10, dropout=0.0), DATA,
                losses=3 * KD(temperature=2.0) + 0.5 * AP(), spliced=spliced,
            )  # fmt: skip
    (both, terms), (alone, same) = seen
    assert terms == same
    assert both == pytest.approx(terms["nip"] / 2 + 3 * terms["kd"] + 0.5 * terms["ap"], rel=1e-5)
    assert alone == pytest.approx(terms["nip"] + 3 * terms["kd"] + 0.5 * terms["ap"], rel=1e-5)


def test_a_run_goes_on_only_with_its_own_teacher(tmp_path: Any, teacher: EnsembleKD) -> None:
    def encoder() -> SASRec:
        return SASRec(90, d_model=4, max_len=10)

    options: dict[str, Any] = {"window_step": 8, "progress": False, "output_dir": tmp_path}
    options["schedule"] = StepDecay()
    distill(teacher, encoder, DATA, epochs=1, **options)
    other = EnsembleKD(lambda: SASRec(90, d_model=8, max_len=10), n=3, item_attributes=DATA.item_attributes, seed=1)
    with pytest.raises(EnsembleKDError, match=r"resume: .* got teacher: item vectors with checksum .* then, "):
        distill(other, encoder, DATA, epochs=2, resume=True, **options)
    with pytest.raises(EnsembleKDError, match="got spliced: True then, False now"):
        distill(teacher, encoder, DATA, epochs=2, resume=True, spliced=False, **options)
    assert len(distill(teacher, encoder, DATA, epochs=2, resume=True, **options).result.history) == 2


@pytest.fixture(scope="module")
def teacher() -> EnsembleKD:
    return EnsembleKD(lambda: SASRec(90, d_model=8, max_len=10, dropout=0.3), n=3, item_attributes=DATA.item_attributes)


@pytest.mark.slow
def test_a_student_comes_to_say_what_its_teacher_says(teacher: EnsembleKD) -> None:
    """With nothing but a strong teacher, whose answers are sharp, the student's answers approach them."""
    with torch.no_grad():
        assert teacher.item_classifier.weight is not None
        teacher.item_classifier.weight.mul_(30)
    ids = DATA.inputs("train", 10)

    @torch.no_grad()
    def apart(model: EnsembleKD) -> float:
        p = teacher.eval()(ids)[:, 1:].log_softmax(-1)
        q = model.eval()(ids)[:, 1:].log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean().item()

    options: dict[str, Any] = {"epochs": 40, "lr": 2e-2, "window_step": 4, "batch_size": 64, "progress": False}
    options["schedule"] = Cosine(warmup=0.5)  # to the end, whatever validation says of such a teacher
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    found = distill(
        teacher,
        lambda: SASRec(90, d_model=16, max_len=10, dropout=0.0),
        DATA,
        losses=50.0 * KD(temperature=1.0),
        **options,
    )
    untaught = EnsembleKD(lambda: SASRec(90, d_model=16, max_len=10, dropout=0.0), 1)
    assert apart(found.student) < 0.5 * apart(untaught)
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())


def test_a_student_is_an_ordinary_network(teacher: EnsembleKD) -> None:
    options: dict[str, Any] = {"epochs": 1, "window_step": 8, "progress": False}
    found = distill(teacher, lambda: GRU4Rec(90, d_model=8, max_len=10), DATA, precision="bfloat16", **options)
    student = found.student
    assert type(student) is EnsembleKD
    assert repr(student.losses) == "0.2 * AP()"
    assert list(student.loss(DATA.inputs("train", 10)).terms) == ["nip", "ap"]
    assert {"nip", "ap", "kd"} == found.result.history[0]["train"].keys()
    again = EnsembleKD(lambda: GRU4Rec(90, d_model=8, max_len=10), 1, item_attributes=DATA.item_attributes)
    again.load_state_dict(student.state_dict())
    ids = DATA.inputs("test", 10)
    torch.testing.assert_close(again.eval()(ids), student.eval()(ids))


def test_several_students_are_an_ensemble(teacher: EnsembleKD) -> None:
    """Each learns as it would alone: member 0 of three, without dropout, is the student that is alone."""
    options: dict[str, Any] = {"epochs": 1, "window_step": 8, "progress": False}

    def encoder() -> SASRec:
        return SASRec(90, d_model=8, max_len=10, dropout=0.0)

    three = distill(teacher, encoder, DATA, n=3, **options)
    one = distill(teacher, encoder, DATA, **options)
    assert len(three.student) == 3
    ids = DATA.inputs("test", 10)
    torch.testing.assert_close(
        three.student.eval().member_scores(ids)[0], one.student.eval()(ids), rtol=1e-4, atol=1e-5
    )


def test_masked_items_and_sampled_teachers() -> None:
    options: dict[str, Any] = {"epochs": 1, "window_step": 8, "progress": False}
    masked = EnsembleKD(lambda: BERT4Rec(90, d_model=8, max_len=10), 2, objective=MaskedItem(views=2))
    found = distill(masked, lambda: BERT4Rec(90, d_model=4, max_len=10), DATA, **options)
    assert found.student.objective == MaskedItem(views=2)
    sampled = EnsembleKD(lambda: SASRec(90, d_model=8, max_len=10), 2, objective=NextItem(negatives=20))
    assert distill(sampled, lambda: SASRec(90, d_model=4, max_len=10), DATA, **options).student.objective == NextItem()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": AP()}, "distill: expected losses with KD"),
        ({"losses": KD() + ICL()}, "distill: expected losses with KD"),
        ({"objective": NextItem(negatives=5)}, "distill: expected an objective over all items"),
        ({"data": synthetic(num_users=30, num_items=100)}, "distill: expected data of 90 items, as the model, got 100"),
    ],
)
def test_errors(changes: dict[str, Any], message: str, teacher: EnsembleKD) -> None:
    arguments: dict[str, Any] = {"data": DATA, "epochs": 1, "progress": False} | changes
    with pytest.raises(EnsembleKDError, match=message):
        distill(teacher, lambda: SASRec(90, d_model=4, max_len=10), **arguments)
