"""``grow``: old items' scores bit for bit, new rows by other algebra, and what cannot grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble_kd import (
    AP,
    EnsembleKD,
    MaskedItem,
    NextItem,
    fit,
)
from ensemble_kd.data import ItemAttributes, SequenceData, Vocabulary, synthetic
from ensemble_kd.distillation import distill
from ensemble_kd.encoders import BERT4Rec, Caser, GRU4Rec, SASRec
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.growing import grow
from ensemble_kd.presets import WARM_FIT

V, NEW = 80, 7
ENCODERS: dict[str, Callable[[int], nn.Module]] = {
    "BERT4Rec": lambda v: BERT4Rec(v, d_model=8, max_len=9, init_std=0.3),
    "SASRec": lambda v: SASRec(v, d_model=8, max_len=9, init_std=0.3),
    "GRU4Rec": lambda v: GRU4Rec(v, d_model=8, max_len=9),
    "Caser": lambda v: Caser(v, d_model=8, max_len=9),
}


def ensemble(name: str, classifier: str, n: int = 2, **options: Any) -> EnsembleKD:
    model = EnsembleKD(lambda: ENCODERS[name](V), n, classifier=classifier, **options)
    with torch.no_grad():
        model.item_classifier.bias.normal_(generator=torch.Generator().manual_seed(0))
    return model.eval()


def inputs(b: int, length: int) -> Tensor:
    ids = torch.randint(1, V + 1, (b, length), generator=torch.Generator().manual_seed(0))
    return ids.masked_fill(torch.arange(length) < torch.arange(b)[:, None] % length, 0)


def assert_knows_as_before(grown: EnsembleKD, model: EnsembleKD) -> None:
    ids = inputs(11, 9)
    assert torch.equal(grown(ids)[:, : V + 1], model(ids))
    assert torch.equal(grown.member_scores(ids)[..., : V + 1], model.member_scores(ids))
    assert torch.equal(grown.hidden(ids), model.hidden(ids))
    masked, elsewhere = ids.clone(), ids.clone()
    masked[:, -1], elsewhere[:, -1] = model.mask_token, grown.mask_token
    assert torch.equal(grown.hidden(elsewhere), model.hidden(masked))
    recommended = grown.recommend(ids, k=5, candidates=list(range(1, V + 1)))
    expected = model.recommend(ids, k=5, candidates=list(range(1, V + 1)))
    assert torch.equal(recommended.items, expected.items)


@pytest.mark.parametrize("with_factory", [False, True])
@pytest.mark.parametrize("classifier", ["linear", "tied"])
@pytest.mark.parametrize("name", ENCODERS)
def test_old_items_score_as_before_bit_for_bit(name: str, classifier: str, with_factory: bool) -> None:
    model = ensemble(name, classifier)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    factory = (lambda: ENCODERS[name](V + NEW)) if with_factory else None
    grown = grow(model, NEW, encoder_fn=factory)
    assert (grown.num_items, len(grown), grown.training) == (V + NEW, 2, False)
    assert_knows_as_before(grown, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    new_scores = grown.member_scores(inputs(11, 9))[..., V + 1 :]
    mean = model.member_scores(inputs(11, 9))[..., 1:].mean(-1, keepdim=True)  # the score is linear in the row
    torch.testing.assert_close(new_scores, mean.expand_as(new_scores), rtol=1e-4, atol=1e-5)
    # A larger model is an ordinary one: its state is that of a model built large.
    built = EnsembleKD(lambda: ENCODERS[name](V + NEW), 2, classifier=classifier)
    built.load_state_dict(grown.state_dict())
    assert torch.equal(built.eval()(inputs(4, 9)), grown(inputs(4, 9)))


@pytest.mark.parametrize("classifier", ["linear", "tied"])
def test_students_grow_and_members_stay_members(classifier: str) -> None:
    data = synthetic(num_users=40, num_items=V)
    teacher = ensemble("SASRec", classifier)
    student = distill(teacher, lambda: ENCODERS["SASRec"](V), data, epochs=1, progress=False).student.eval()
    assert_knows_as_before(grow(student, NEW), student)
    alone = teacher.member(1)
    assert torch.equal(grow(alone, NEW)(inputs(3, 9)), grow(teacher, NEW).member(1)(inputs(3, 9)))


class WithoutMask(nn.Module):
    """As the models of other libraries: a table of padding and the items."""

    causal, num_items, max_len = True, V, 9

    def __init__(self) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(V + 1, 8, padding_idx=0)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.item_embedding(item_ids)


@pytest.mark.parametrize("classifier", ["linear", "tied"])
def test_a_table_without_a_mask_token_grows(classifier: str) -> None:
    model = EnsembleKD(WithoutMask, 2, classifier=classifier).eval()
    grown, ids = grow(model, NEW), inputs(5, 9)
    table = grown.encoder.get_parameter("item_embedding.weight")
    assert table.shape == (2, V + NEW + 1, 8)
    assert torch.equal(table[:, : V + 1], model.encoder.get_parameter("item_embedding.weight"))
    assert torch.equal(grown(ids)[:, : V + 1], model(ids))
    grown.train().loss(ids.clamp(min=1) + NEW).total.backward()


def test_rows_by_attributes() -> None:
    table = {1: [1], 2: [1, 2], 3: [2], 81: [1], 82: [1, 2], 83: [3]}
    attributes = ItemAttributes.from_dict(table, V + 3)
    model = ensemble("SASRec", "linear")
    grown = grow(model, 3, item_attributes=attributes)
    assert_knows_as_before(grown, model)

    def check(before: Tensor, after: Tensor) -> None:  # rows of items 1.., by hand
        one, two = before[[0, 1]].mean(0), before[[1, 2]].mean(0)
        expected = torch.stack([one, (one + two) / 2, before.mean(0)])  # the third has an attribute that no one had
        torch.testing.assert_close(after[V:], expected)

    for i in range(2):
        check(model.item_classifier.weight[i].detach(), grown.item_classifier.weight[i].detach())  # type: ignore[index]
        check(model.item_classifier.bias[i].detach(), grown.item_classifier.bias[i].detach())
        name = "item_embedding.weight"
        check(model.encoder.get_parameter(name)[i, 1:-1].detach(), grown.encoder.get_parameter(name)[i, 1:-1].detach())


def test_attribute_prediction_goes_on() -> None:
    old = ItemAttributes.from_dict({1: [1], 2: [2], 9: [1, 2]}, V)
    new = ItemAttributes.from_dict({1: [1], 2: [2], 9: [2, 1], 81: [2, 3]}, V + 1)
    model = ensemble("SASRec", "linear", losses=AP(), item_attributes=old)
    grown = grow(model, 1, item_attributes=new)
    assert torch.equal(grown.attribute_classifier.weight[:, :2], model.attribute_classifier.weight)  # type: ignore[index]
    assert grown.attribute_classifier.bias.shape == (2, 3)
    assert set(grown.loss(inputs(4, 9)).terms) == {"nip", "ap"}
    with pytest.raises(EnsembleKDError, match="item_attributes, which the model learns from, got none"):
        grow(model, 1)
    changed = ItemAttributes.from_dict({1: [1], 2: [1], 9: [1, 2]}, V + 1)
    with pytest.raises(EnsembleKDError, match="old items with the attributes that they had, got item 2"):
        grow(model, 1, item_attributes=changed)
    with pytest.raises(EnsembleKDError, match="attributes of 81 items, got 80"):
        grow(model, 1, item_attributes=old)


def test_names_grow_with_the_model() -> None:
    names = tuple(f"i{i}" for i in range(V))
    model = ensemble("SASRec", "linear", vocabulary=Vocabulary(names))
    grown = grow(model, ["i3", "new", "newer"])
    assert (grown.num_items, grown.vocabulary) == (V + 2, Vocabulary((*names, "new", "newer")))
    assert grow(grown, []).num_items == V + 2
    rows = SequenceData.from_sequences([[1, 2, 82]], num_items=V + 2)
    data = SequenceData(rows.items, rows.offsets, V + 2, item_names=(*names, "x", "y"))
    assert grow(model, data).vocabulary == data.vocabulary
    with pytest.raises(EnsembleKDError, match=r"numbers the model's items as it does.*vocabulary=model\.vocabulary"):
        grow(model, SequenceData(rows.items, rows.offsets, V + 2, item_names=(*names[1:], "x", "y", "z")))
    for new in (3, rows):
        with pytest.raises(EnsembleKDError, match="names of the new items, as the model has a vocabulary"):
            grow(model, new)
    with pytest.raises(EnsembleKDError, match="names of new items for a model with a vocabulary, or a number"):
        grow(ensemble("SASRec", "linear"), ["a"])
    with pytest.raises(EnsembleKDError, match="at least the 80 items of the model, got 78"):
        grow(model, -2)


def test_a_grown_model_trains_on_and_learns_the_new_items() -> None:
    small = synthetic(num_users=40, num_items=V)
    model = ensemble("SASRec", "tied", losses=0)
    fit(model, small, epochs=1, progress=False)
    rows = [[*row.tolist(), V + 1 + u % NEW] * 2 for u, row in enumerate(small.items[:200].view(-1, 5))]
    data = SequenceData.from_sequences(rows, num_items=V + NEW)
    grown = grow(model, data)
    before = evaluate_loss(grown, data)
    fit(grown, data.newest(9), epochs=6, batch_size=8, lr=1e-2, progress=False)
    assert evaluate_loss(grown, data) < before - 0.5
    table = grown.encoder.get_parameter("item_embedding.weight").detach()
    assert all(not torch.equal(table[0, V + 1], table[0, V + 1 + i]) for i in range(1, NEW))


def evaluate_loss(model: EnsembleKD, data: SequenceData) -> float:
    with torch.no_grad():
        return float(model.eval().loss(data.train_windows(9)).total)


class Odd(nn.Module):
    """An encoder that holds the size of the catalogue in a place of its own."""

    def __init__(self, v: int, **changes: Any) -> None:
        super().__init__()
        self.num_items, self.embedding = v, nn.Embedding(v + 2, 4)
        for name, value in changes.items():
            setattr(self, name, value)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.embedding(ids)
        return out


def test_sizes_that_grow_cannot_know_ask_for_the_factory() -> None:
    for changes, words in (
        ({"mask": V + 1}, "got mask 81"),
        ({"out": nn.Linear(4, V)}, "got out.out_features 80"),
        ({"scale": nn.Parameter(torch.ones(3, V + 2))}, r"got scale of shape \(3, 82\)"),
    ):
        model = EnsembleKD(lambda changes=changes: Odd(V, **changes), 1, objective=MaskedItem(), losses=0)  # type: ignore[misc]
        with pytest.raises(EnsembleKDError, match=words):
            grow(model, 2)
    model = EnsembleKD(lambda: Odd(V, mask=V + 1), 1, objective=MaskedItem(), losses=0).eval()
    grown = grow(model, 2, encoder_fn=lambda: Odd(V + 2, mask=V + 3))
    ids = inputs(3, 4)
    assert torch.equal(grown(ids)[:, : V + 1], model(ids))
    assert grown.encoder.member(0).mask == V + 3
    with pytest.raises(EnsembleKDError, match=r"'embedding\.weight': \(82, 4\) before, \(85, 4\) from the factory"):
        grow(model, 2, encoder_fn=lambda: Odd(V + 3))
    # By chance as many features as items: no one can know which is which.
    wide = EnsembleKD(lambda: SASRec(8, d_model=8, max_len=8), 1, objective=NextItem(), losses=0).eval()
    with pytest.raises(EnsembleKDError, match="Pass encoder_fn"):
        grow(wide, 1)
    assert grow(wide, 1, encoder_fn=lambda: SASRec(9, d_model=8, max_len=8)).num_items == 9


def test_frozen_parameters_stay_frozen() -> None:
    model = ensemble("SASRec", "linear")
    model.encoder.get_parameter("item_embedding.weight").requires_grad_(False)
    model.item_classifier.bias.requires_grad_(False)
    for factory in (None, lambda: ENCODERS["SASRec"](V + 1)):
        grown = grow(model, 1, encoder_fn=factory)
        frozen = [name for name, p in grown.named_parameters() if not p.requires_grad]
        assert frozen == ["encoder.item_embedding.weight", "item_classifier.bias"]


def test_a_student_keeps_the_names_and_grows_with_them() -> None:
    data, names = synthetic(num_users=40, num_items=V), Vocabulary(range(100, 100 + V))
    teacher = ensemble("SASRec", "linear", vocabulary=names)
    student = distill(teacher, lambda: ENCODERS["SASRec"](V), data, epochs=1, progress=False).student
    assert student.vocabulary == names
    assert grow(student, [7]).vocabulary == names.extended([7])


def test_a_warm_start_begins_near_what_the_model_knew() -> None:
    """WARM_FIT costs little of what ten epochs have learned, though the newest items alone are seen again."""
    data = synthetic(num_users=300, num_items=V)
    model = EnsembleKD(lambda: SASRec(V, d_model=16, max_len=9), 2, losses=0)
    trained = fit(model, data, epochs=10, batch_size=32, progress=False).best["ensemble"]["NDCG@10"]
    history = fit(model, data.newest(12), progress=False, **WARM_FIT).history
    scores = [entry["valid"]["ensemble"]["NDCG@10"] for entry in history]
    assert min(scores) > 0.9 * trained
