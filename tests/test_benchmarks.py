"""The benchmarks run, report what they say they do, and measure against a baseline that computes the same losses."""

from __future__ import annotations

import pytest
import torch

from benchmarks import baseline
from ensemble_kd import EnsembleKD, MaskedItem
from ensemble_kd.data import synthetic
from ensemble_kd.encoders import BERT4Rec

WEIGHTS = [
    baseline.Weights(0.0, 0.0, 0.0, 0.0),
    baseline.Weights(0.7, 0.0, 0.0, 0.0),
    baseline.Weights(0.0, 0.3, 0.2, 0.0),
    baseline.Weights(0.0, 0.0, 0.0, 0.9),
    baseline.Weights(0.7, 0.3, 0.2, 0.9, temperature=0.5),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=["mip", "ap", "contrast", "kd", "all"])
def test_the_baseline_computes_the_librarys_loss(weights: baseline.Weights) -> None:
    data = synthetic(40, 100, num_clusters=10)
    model = EnsembleKD(
        lambda: BERT4Rec(100, d_model=8, max_len=9, dropout=0.0, init_std=0.5).double(),
        n=3,
        objective=MaskedItem(mask_ratio=0.3, views=3),
        losses=weights.losses(),
        item_attributes=data.item_attributes,
    )
    assert model.item_classifier.weight is not None
    with torch.no_grad():
        model.item_classifier.weight.mul_(20)  # far from uniform, so that distillation counts
        model.item_classifier.bias.normal_()
    item_ids = data.train_windows(8)[:12]
    members = baseline.members_of(model)
    step = model.loss(item_ids, generator=torch.Generator().manual_seed(5))
    draw = model.objective.draw(item_ids, mask_token=model.mask_token, generator=torch.Generator().manual_seed(5))
    assert model.attribute_table is not None
    total = baseline.loss(members, draw, model.attribute_table, weights)
    torch.testing.assert_close(total, step.total, rtol=1e-10, atol=1e-10)

    step.total.backward()
    total.backward()
    for name, stacked in model.encoder.named_parameters():
        grads = torch.stack([dict(member.encoder.named_parameters())[name].grad for member in members])  # type: ignore[misc]
        torch.testing.assert_close(grads, stacked.grad, rtol=1e-8, atol=1e-10)
    weight_grads = torch.stack([member.items.weight.grad for member in members])  # type: ignore[misc]
    torch.testing.assert_close(weight_grads, model.item_classifier.weight.grad, rtol=1e-8, atol=1e-10)
