"""Devices without float64, such as Apple's, run everything: no tensor there has that type."""

from __future__ import annotations

import pytest
import torch

from ensemble_kd import MaskedItem, metrics
from ensemble_kd.data import ItemAttributes
from ensemble_kd.evaluation import calibrate, evaluate
from ensemble_kd.growing import grow
from ensemble_kd.training import fit
from tests.device import cases, simulated

pytestmark = pytest.mark.device


@pytest.fixture(autouse=True)
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the device be one whose widest type is float32, as MPS."""
    by_device = metrics.widest
    here = lambda device: torch.float32 if device.type == simulated.NAME else by_device(device)  # noqa: E731
    monkeypatch.setattr(metrics, "widest", here)


@pytest.mark.parametrize(("encoder", "objective"), [("BERT4Rec", "masked"), ("SASRec", "next, masked inputs")])
def test_a_model_is_made_trained_evaluated_calibrated_and_grown(encoder: str, objective: str) -> None:
    data = cases.data()
    with simulated.device() as log:
        model = cases.build(encoder, cases.OBJECTIVES[objective]).to(simulated.NAME)
        fit(model, data, epochs=1, batch_size=16, window=cases.LENGTH, progress=False)
        evaluate(model, data, "test")
        calibrate(model, data)
        model.recommend(data.inputs("test", cases.LENGTH).to(simulated.NAME), k=3)
        assert data.item_attributes is not None
        table = data.item_attributes.table
        grow(
            model,
            3,
            item_attributes=ItemAttributes(
                data.item_attributes.num_attributes, torch.cat([table[:-1], table[1:4], table[-1:]])
            ),
        )
        assert model.device.type == simulated.NAME
        assert log.doubles == set()


def test_metrics_of_ranks_there() -> None:
    ranks = torch.tensor([0, 3, 11])
    with simulated.device() as log:
        found = metrics.metric_row(ranks.to(simulated.NAME))
        assert log.doubles == set()
    assert found == pytest.approx(metrics.metric_row(ranks), abs=1e-6)


def test_the_log_notices_float64() -> None:
    with simulated.device() as log:
        torch.ones(2, device=simulated.NAME).double()
        assert len(log.doubles) == 1


def test_encoders_are_wrapped_there_as_well() -> None:
    """Construction on the device compares hidden states, which it does on the host."""
    with simulated.device() as log:
        members = [cases.build("SASRec", cases.OBJECTIVES["next"]).to(simulated.NAME).encoder.member(0)]
        log.clear()
        cases.EnsembleKD.from_members(members, objective=MaskedItem(), losses=0)
        cases.EnsembleKD.from_members(members, losses=0)
        assert log.doubles == set()
