"""``calibrate``: the minimum of a convex loss, never worse than uniform weights, in oracles of other algebra."""

from __future__ import annotations

import pytest
import torch

from ensemble_kd import EnsembleKD, fit
from ensemble_kd.data import synthetic
from ensemble_kd.encoders import GRU4Rec, SASRec
from ensemble_kd.evaluation import calibrate, calibration_error, evaluate

V = 80
DATA = synthetic(num_users=150, num_items=V)


@pytest.fixture(scope="module")
def trained() -> EnsembleKD:
    factories = [
        lambda: SASRec(V, d_model=16, max_len=8, dropout=0.0),
        lambda: GRU4Rec(V, d_model=12, max_len=8),
        lambda: SASRec(V, d_model=16, max_len=8, dropout=0.0),
    ]
    model = EnsembleKD(factories, losses=0)
    fit(model, DATA, epochs=6, lr=1e-2, batch_size=64, progress=False)
    with torch.no_grad():
        assert model.item_classifier.weight is not None
        model.item_classifier.weight[2].normal_(
            generator=torch.Generator().manual_seed(0)
        )  # a member that knows nothing
        model.item_classifier.weight[0].mul_(3)
    return model.double().eval()


@torch.no_grad()
def log_loss(model: EnsembleKD) -> float:
    p = model(DATA.inputs("valid", 8))[:, 1:].softmax(dim=1)
    return float(-p[torch.arange(len(p)), DATA.target("valid") - 1].log().mean())


def test_calibrated_probabilities_are_better(trained: EnsembleKD) -> None:
    before = log_loss(trained)
    ndcg = evaluate(trained, DATA, "valid").rows["ensemble"]["NDCG@10"]
    found = calibrate(trained, DATA)
    assert found.before.log_loss == pytest.approx(before)
    assert found.before.ndcg == ndcg
    assert found.after.log_loss == pytest.approx(log_loss(trained))
    assert found.after.ndcg == evaluate(trained, DATA, "valid").rows["ensemble"]["NDCG@10"]
    assert found.after.log_loss < before - 0.1
    assert found.after.ndcg >= ndcg
    assert found.after.calibration_error < found.before.calibration_error
    assert trained.weights.mean() == pytest.approx(1.0)
    assert float(trained.factors[2]) < 0.2 * float(trained.factors.max())
    assert str(found).splitlines()[2].split() == ["uniform", "now"]
    again = calibrate(trained, DATA)
    torch.testing.assert_close(again.weights, found.weights)


def test_no_other_weights_are_better(trained: EnsembleKD) -> None:
    """The definition by brute force: random factors around the found ones all have a higher loss."""
    calibrate(trained, DATA)
    best, factors = log_loss(trained), trained.factors.clone()
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0):
        for _ in range(20):
            noise = torch.randn(3, generator=generator, dtype=torch.float64) * size * factors.max()
            tried = (factors + noise).clamp(min=0)
            if not bool(tried.any()):
                continue
            mean = tried.mean()
            trained.weigh(tried, torch.full((3,), float(1 / mean)))
            torch.testing.assert_close(trained.factors, tried)
            assert log_loss(trained) > best - 1e-9


def test_order_is_kept_if_the_best_weights_rank_worse(trained: EnsembleKD, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a common temperature alone is fitted."""
    import ensemble_kd.evaluation.calibration as module

    def ranked(model: EnsembleKD, *args: object, **options: object) -> object:
        found = evaluate(model, DATA, "valid")
        if not torch.equal(model.weights, torch.ones(3, dtype=torch.float64)):
            found.rows["ensemble"]["NDCG@10"] = 0.0  # type: ignore[index]
        return found

    monkeypatch.setattr(module, "evaluate", ranked)
    found = calibrate(trained, DATA)
    assert torch.equal(found.weights, torch.ones(3, dtype=torch.float64))
    assert len(set(found.temperatures.tolist())) == 1
    assert found.after.ndcg == found.before.ndcg
    assert found.after.log_loss < found.before.log_loss
    best = log_loss(trained)
    for factor in (0.9, 0.99, 1.01, 1.1):
        trained.weigh([1, 1, 1], found.temperatures * factor)
        assert log_loss(trained) > best


def test_some_users_are_enough(trained: EnsembleKD) -> None:
    found = calibrate(trained, DATA, users=50)
    assert found.after.log_loss < found.before.log_loss
    assert len(found.weights) == 3


def test_the_error_of_calibration() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(200_000, generator=generator)
    right = (torch.rand(200_000, generator=generator) < confidence).double()
    assert calibration_error(confidence, right) < 0.01
    assert calibration_error(confidence, 1 - right) > 0.3
