"""Ensembles that were trained apart, as one: its scores are those of the members, whatever their classifiers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from ensemble_kd import EnsembleKD, EnsembleKDError, MaskedItem
from ensemble_kd.data import Vocabulary
from ensemble_kd.encoders import BERT4Rec, GRU4Rec, SASRec
from ensemble_kd.ensemble import join

IDS = torch.tensor([[0, 0, 3, 7, 9], [4, 8, 1, 2, 6]])


def sasrec(classifier: str, *, n: int = 2, d: int = 4, **options: Any) -> EnsembleKD:
    model = EnsembleKD(partial(SASRec, 9, d_model=d, max_len=6, dropout=0), n, classifier=classifier, **options)
    return _moved(model)


def gru4rec(classifier: str, d: int = 8, **options: Any) -> EnsembleKD:
    return _moved(EnsembleKD(partial(GRU4Rec, 9, d_model=d, max_len=5, dropout=0), 1, classifier=classifier, **options))


def _moved(model: EnsembleKD) -> EnsembleKD:
    """As after training: biases and embeddings that are not those of the start."""
    torch.manual_seed(len(model))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.double().eval()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: sasrec("tied"), lambda: gru4rec("linear")),
        (lambda: sasrec("linear"), lambda: gru4rec("tied")),
        (lambda: sasrec("tied"), lambda: gru4rec("tied", d=4)),
        (lambda: sasrec("linear"), lambda: sasrec("linear", n=1, d=6, seed=3)),
        (lambda: sasrec("item_embedding"), lambda: sasrec("tied", n=1)),
    ],
)
def test_each_member_scores_as_before(first: Any, second: Any) -> None:
    models = [first(), second()]
    joined = join(models)
    want = torch.cat([model.member_scores(IDS) for model in models])
    torch.testing.assert_close(joined.member_scores(IDS), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joined(IDS), want.mean(0), rtol=1e-12, atol=1e-12)
    assert not joined.training
    assert joined.max_len == min(m.max_len for m in models if m.max_len is not None)


def test_one_tie_stays_a_tie_and_members_are_copies() -> None:
    model = sasrec("tied")
    joined = join([model, sasrec("tied", n=1, seed=5)])
    assert joined.item_classifier.weight is None
    before = joined(IDS)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    torch.testing.assert_close(joined(IDS), before, rtol=0, atol=0)
    assert len(join([model])) == 2


def test_what_does_not_fit_is_refused() -> None:
    words, others = Vocabulary(list("abcdefghi")), Vocabulary(list("ihgfedcba"))
    masked = EnsembleKD(lambda: BERT4Rec(9, d_model=4, max_len=6), 1)
    fewer = EnsembleKD(lambda: SASRec(8, d_model=4, max_len=6), 1)
    with pytest.raises(EnsembleKDError, match=r"join: expected models\[1\] with objective NextItem, as the first, got"):
        join([sasrec("linear"), masked])
    with pytest.raises(EnsembleKDError, match=r"join: expected models\[1\] with num_items 9, as the first, got 8"):
        join([sasrec("linear"), fewer])
    with pytest.raises(EnsembleKDError, match=r"models\[1\] with device cpu, as the first, got meta"):
        join([sasrec("linear"), sasrec("linear").to("meta")])
    with pytest.raises(EnsembleKDError, match=r"models\[1\] with vocabulary"):
        join([sasrec("linear", vocabulary=words), sasrec("linear", vocabulary=others)])
    with pytest.raises(EnsembleKDError, match=r"join: expected models\[0\], a EnsembleKD|join: expected models\[0\]"):
        join([torch.nn.Linear(2, 2)])  # type: ignore[list-item]
    with pytest.raises(EnsembleKDError, match="join: expected a list of ensembles"):
        join([])
    assert isinstance(masked.objective, MaskedItem)
