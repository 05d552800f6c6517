"""Spliced sequences, and KD on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble_kd import AP, ICL, KD, EnsembleKD, EnsembleKDError, MaskedItem, NextItem
from ensemble_kd.data import synthetic
from ensemble_kd.distillation import FromTeacher
from ensemble_kd.encoders import BERT4Rec, SASRec
from ensemble_kd.losses import Ambiguity, scale_transfer
from ensemble_kd.objectives import splice

DATA = synthetic(num_users=40, num_items=90)


@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6), width=st.integers(7, 9), seed=st.integers(0, 999))
def test_spliced_rows_begin_as_one_row_and_end_as_another(lengths: list[int], width: int, seed: int) -> None:
    rows = [[10 * i + j for j in range(1, length + 1)] for i, length in enumerate(lengths, start=1)]
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    made = splice(ids, generator=torch.Generator().manual_seed(seed)).tolist()
    assert len(made) == len(rows)
    before = []
    for own, row in zip(rows, made, strict=True):
        items = [item for item in row if item]
        assert row == [0] * (width - len(items)) + items  # padding stands on the left alone
        kept = next((k for k in range(len(items), 0, -1) if items[-k:] == own[len(own) - k :]), 0)
        assert kept >= min(1, len(own))
        front = items[: len(items) - kept]
        if front:
            before.append(front[0] // 10)
            other = rows[front[0] // 10 - 1]
            start = other.index(front[0])
            assert other[start : start + len(front)] == front  # a piece of the other row ...
            assert start == 0 or len(items) == width  # ... from its beginning, as far as there is room
    assert len(set(before)) == len(before)  # no row stands before two


def test_splicing_differs_from_row_to_row_and_from_time_to_time() -> None:
    ids = torch.arange(1, 2001).view(200, 10)
    one, other = splice(ids), splice(ids)
    assert not torch.equal(one, other)
    kept = (one == ids).sum(dim=1)
    assert set(kept.tolist()) == set(range(1, 11))
    assert 4.5 < kept.double().mean() < 6.5


@pytest.mark.parametrize("masked", [False, True])
def test_kd_on_spliced_sequences_is_that_of_another_batch(masked: bool) -> None:
    """The other terms see the batch, KD sees sequences that were drawn after it; the total is their weighted sum."""
    encoder, objective = (BERT4Rec, MaskedItem()) if masked else (SASRec, NextItem())
    others = 0.5 * AP() + 0.1 * ICL() + 0.3 * Ambiguity()
    model = EnsembleKD(
        lambda: encoder(90, d_model=4, max_len=10, dropout=0.0, init_std=1.0),
        n=3,
        objective=objective,
        losses=others,
        item_attributes=DATA.item_attributes,
    ).double()
    ids = DATA.inputs("train", 9)
    by_hand, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    alone = model.loss(ids, generator=by_hand)
    model.losses = KD(temperature=0.7)
    taught = model.loss(splice(ids, generator=by_hand), generator=by_hand).terms["kd"]
    model.losses = others + 2.0 * KD(temperature=0.7, on="spliced")
    step = model.loss(ids, generator=own)
    torch.testing.assert_close(step.terms.pop("kd"), taught)
    torch.testing.assert_close(step.total, alone.total + 2 * taught)
    assert step.terms == alone.terms
    model.losses = scale_transfer(model.losses, 0.0)  # as a schedule does: no second pass then
    assert "kd" not in model.loss(ids, generator=own).terms
    model.losses = KD(on="spliced")
    with pytest.raises(EnsembleKDError, match=r"FromTeacher: expected KD\(temperature=0.3\), got KD\(.*on='spliced'"):
        model.loss(ids, item_loss=FromTeacher(model))


def test_spliced_sequences_have_no_true_items() -> None:
    for setting in ({"part": "target"}, {"gate": "better"}):
        with pytest.raises(EnsembleKDError, match=r"KD: expected part='all' and gate='open' with on='spliced', got KD"):
            KD(on="spliced", **setting)  # type: ignore[arg-type]
    assert repr(KD(on="spliced")) == "KD(temperature=0.3, on='spliced')"
