"""How batches become inputs, targets and queries, counted by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

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
from ensemble_kd.ensemble import step as training_step
from ensemble_kd.objectives import mask_positions, positions
from tests.spec import reference

V, MASK = 30, 31


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def triangle(length: int = 20) -> Tensor:
    """Row r has r + 1 items, all different."""
    place = torch.arange(length)
    return (place + 1).expand(length, -1) * (place >= length - 1 - place[:, None])


def test_without_a_generator_masks_follow_the_global_one() -> None:
    objective, ids = MaskedItem(0.3, views=2), triangle()
    torch.manual_seed(3)
    first = objective.draw(ids, mask_token=MASK)
    torch.manual_seed(3)
    assert torch.equal(objective.draw(ids, mask_token=MASK).inputs, first.inputs)
    assert first.anchor is ids
    assert first.anchor_items is ids
    assert first.valid is None


def test_counts_of_masks_are_those_of_exact_fractions() -> None:
    items = torch.arange(1, 400)
    for below in (2, 3, 7, 12, 15, 40, 97, 1000):
        for above in {1, below // 7 + 1, below // 3 + 1, 2 * below // 3, below - 1, below}:
            share = Fraction(above, below)
            exact = [max(1, math.ceil(share * n)) for n in items.tolist()]
            assert positions.mask_counts(items, above / below).tolist() == exact


def test_a_tiny_ratio_masks_one_item_and_none_of_an_empty_row() -> None:
    ids = torch.tensor([[0, 0, 0], [0, 0, 4], [1, 2, 3]])
    for ratio in (1e-12, 1e-3, 0.3):
        _, valid = mask_positions(ids, views=4, mask_ratio=ratio)
        assert valid.sum(dim=-1).tolist() == [[0, 1, 1]] * 4


@pytest.mark.parametrize("views", [1, 2, 3])
def test_next_item_predicts_every_following_item(views: int) -> None:
    ids = torch.tensor([[0, 0, 7, 8], [1, 2, 3, 4]])
    draw = NextItem(views=views).draw(ids, mask_token=MASK)
    assert torch.equal(draw.inputs, ids[:, :-1].expand(views, -1, -1))
    here = [(2, 8), (3, 2), (4, 3), (5, 4)]  # into the flattened (b, l - 1): after 7, 1, 2, 3
    assert list(zip(draw.positions.tolist(), draw.targets.tolist(), strict=True)) == [
        (6 * view + at, item) for view in range(views) for at, item in here
    ]
    assert draw.anchor.tolist() == [[0, 0, 7], [1, 2, 3]]
    assert draw.anchor_items.tolist() == [[0, 0, 8], [2, 3, 4]]


def test_next_item_with_one_vector_a_sequence_predicts_the_newest() -> None:
    ids = torch.tensor([[0, 0, 7, 8], [1, 2, 3, 4]])
    draw = NextItem(views=2).draw(ids, mask_token=MASK, newest_only=True)
    assert draw.positions.tolist() == [0, 1, 2, 3]
    assert draw.targets.tolist() == [8, 4, 8, 4]
    assert draw.anchor_items.tolist() == [[8], [4]]


def test_next_item_masks_inputs_and_keeps_targets() -> None:
    ids = triangle()[1:]
    plain = NextItem(views=2).draw(ids, mask_token=MASK)
    draw = NextItem(views=2, mask_ratio=0.4).draw(ids, mask_token=MASK, generator=seeded())
    masked = draw.inputs == MASK
    for r in range(len(ids)):
        assert masked[:, r].sum(dim=1).tolist() == [reference.mask_count(0.4, r + 1)] * 2
    assert not bool((masked & (ids[:, :-1] == 0)).any())
    assert torch.equal(draw.positions, plain.positions)
    assert torch.equal(draw.targets, plain.targets)
    assert torch.equal(draw.anchor, ids[:, :-1])
    assert (NextItem().views_are_unmasked, NextItem(mask_ratio=0.4).views_are_unmasked) == (True, False)


def test_queries_end_in_what_is_scored_and_fit_the_encoder() -> None:
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    masked, following = MaskedItem(), NextItem()
    assert masked.query(ids, mask_token=MASK, max_len=None).tolist() == [[0, 1, 2, MASK], [3, 4, 5, MASK]]
    assert masked.query(ids, mask_token=MASK, max_len=3).tolist() == [[1, 2, MASK], [4, 5, MASK]]
    assert masked.query(ids, mask_token=MASK, max_len=1).tolist() == [[MASK], [MASK]]
    assert following.query(ids, mask_token=MASK, max_len=None) is ids
    assert following.query(ids, mask_token=MASK, max_len=2).tolist() == [[1, 2], [4, 5]]


@pytest.mark.parametrize(
    "objective", [MaskedItem(0.3, views=2), MaskedItem(1.0, views=1), NextItem(), NextItem(views=2, mask_ratio=0.3)]
)
def test_the_path_of_accelerators_gives_the_same_losses(
    objective: MaskedItem | NextItem, monkeypatch: pytest.MonkeyPatch
) -> None:
    attributes = ItemAttributes.from_dict({i: [1 + i % 3] for i in range(1, V, 2)}, V)
    kind = BERT4Rec if isinstance(objective, MaskedItem) else SASRec
    model = EnsembleKD(
        lambda: kind(V, d_model=8, num_heads=2, max_len=20, dropout=0.0),
        n=2,
        objective=objective,
        losses=AP() + 0.1 * (ICL() + CCL()) + KD(),
        item_attributes=attributes,
    ).double()
    ids = triangle(8)[1:]
    results = []
    for select in (True, False):
        for module in (positions, training_step):
            monkeypatch.setattr(module, "selects", lambda batch, select=select: select)
        draw = objective.draw(ids, mask_token=MASK, generator=seeded())
        assert (draw.valid is None) == select
        model.zero_grad()
        step = model.loss(ids, generator=seeded())
        step.total.backward()
        results.append((step, [p.grad for p in model.parameters()]))
    (selected, grads), (carried, others) = results
    torch.testing.assert_close(carried.total, selected.total)
    torch.testing.assert_close(carried.terms, selected.terms)
    torch.testing.assert_close(others, grads)


ONE = "Pass such a number."
REFUSED = {
    "ratio 0": (lambda: MaskedItem(0.0), f"MaskedItem: expected mask_ratio, a number in (0, 1], got 0.0. {ONE}"),
    "ratio 1.5": (lambda: MaskedItem(1.5), f"MaskedItem: expected mask_ratio, a number in (0, 1], got 1.5. {ONE}"),
    "ratio nan": (lambda: MaskedItem(math.nan), f"MaskedItem: expected mask_ratio, a number in (0, 1], got nan. {ONE}"),
    "ratio text": (lambda: MaskedItem("1"), f"MaskedItem: expected mask_ratio, a number in (0, 1], got '1'. {ONE}"),
    "ratio True": (lambda: MaskedItem(True), f"MaskedItem: expected mask_ratio, a number in (0, 1], got True. {ONE}"),
    "newest": (lambda: MaskedItem(newest=-0.1), f"MaskedItem: expected newest, a number in [0, 1], got -0.1. {ONE}"),
    "next ratio": (
        lambda: NextItem(mask_ratio=2),
        f"NextItem: expected mask_ratio, a number in [0, 1], got 2. {ONE}",
    ),
    "views 0": (
        lambda: MaskedItem(views=0),
        f"MaskedItem: expected views, a whole number in 1..1000, got 0. {ONE}",
    ),
    "views 1.5": (
        lambda: NextItem(views=1.5),
        f"NextItem: expected views, a whole number in 1..1000, got 1.5. {ONE}",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str) -> None:
    make, text = REFUSED[name]
    with pytest.raises(EnsembleKDError) as caught:
        make()
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "objective",
    [MaskedItem(mask_ratio=0.3, views=3), MaskedItem(negatives=4), NextItem(views=2), NextItem(mask_ratio=0.3)],
    ids=repr,
)
@pytest.mark.parametrize("newest_only", [False, True])
@given(sequences=st.lists(st.integers(2, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_with_known_lengths_an_accelerator_draws_what_a_cpu_does(
    objective: MaskedItem | NextItem, newest_only: bool, sequences: list[int], seed: int
) -> None:
    ids = torch.stack([torch.nn.functional.pad(torch.arange(1, n + 1), (9 - n, 0)) for n in sequences])
    draws = []
    for select in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(positions, "selects", lambda batch, select=select: select)
            generator = torch.Generator().manual_seed(seed)
            draws.append(
                objective.draw(
                    ids,
                    mask_token=11,
                    newest_only=newest_only,
                    generator=generator,
                    lengths=None if select else sequences,
                )
            )
    cpu, other = draws
    assert other.valid is None
    assert torch.equal(cpu.inputs, other.inputs)
    assert torch.equal(cpu.positions, other.positions)
    assert torch.equal(cpu.targets, other.targets)
    assert other.attributed == int((cpu.anchor_items != 0).sum())
    assert other.lengths == (cpu.anchor != 0).sum(1).tolist()
