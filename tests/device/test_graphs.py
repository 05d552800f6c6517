"""Steps as graphs: what changes between steps is followed, and nothing waits for the device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ensemble_kd.training.graphs as training_graphs
from ensemble_kd import EnsembleKD, EnsembleKDError, fit
from ensemble_kd.losses import AP, CCL, ICL, KD, Ambiguity, Loss
from ensemble_kd.training import Ramp, run
from ensemble_kd.training.gradients import clip_members_
from ensemble_kd.training.graphs import COLUMNS, MOST, WARM_UP, StepGraphs, set_rate
from ensemble_kd.training.run import Run
from tests.device import cases, graphs, simulated

pytestmark = pytest.mark.device


class Training:
    """A model and its steps, as they are or as graphs, from equal weights and equal draws."""

    def __init__(self, encoder: str, objective: str, *, as_graphs: bool) -> None:
        self.model: EnsembleKD = cases.build(encoder, cases.OBJECTIVES[objective], dropout=0.1, backend="loop")
        self.model.to(simulated.NAME)
        self.device = torch.device(simulated.NAME, 0)
        self.optimizer, self.runs = cases.optimizer(self.model), 0
        self.graphs = StepGraphs(self.step, self.device, longest=COLUMNS) if as_graphs else None
        torch.manual_seed(0)

    def step(self, batch: Tensor, share: float | Tensor, *_: object) -> dict[str, Tensor]:
        self.runs += 1
        with torch.autocast(simulated.NAME, torch.bfloat16):
            loss = self.model.loss(batch, validate=False, share=share)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        clip_members_(list(self.model.parameters()), 5.0)
        self.optimizer.step()
        return loss.terms

    def __call__(self, batch: Tensor, rate: float, share: float = 1.0) -> dict[str, Tensor]:
        set_rate(self.optimizer, rate, self.device)
        if self.graphs is None:
            return self.step(batch, share)
        return self.graphs(batch, repr(self.model.losses), numbers=(share,))

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}


def batches(number: int) -> list[Tensor]:
    windows = cases.data().train_windows(COLUMNS)
    windows = windows[(windows != 0).sum(1) > 1]
    return [windows[6 * i : 6 * i + 6] for i in range(number)]


@pytest.mark.parametrize(("encoder", "objective"), [("BERT4Rec", "masked"), ("GRU4Rec", "next")])
def test_graphs_follow_batches_rates_and_weights(encoder: str, objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_graphs, "WARM_UP", 1)
    plan: list[tuple[int, float, float]] = [(i, 1e-3 * (1 + i), 1.0) for i in range(3)]
    plan += [(i, 1e-3, 0.25) for i in range(3)]  # the weights of the terms change
    plan += [(2, 5e-2, 1.0), (1, 0.0, 0.25)]
    found, terms = [], []
    for as_graphs in (False, True):
        with simulated.device() as log:
            training, there = Training(encoder, objective, as_graphs=as_graphs), batches(3)
            there = [batch.to(simulated.NAME) for batch in there]
            training(there[0], 1e-3)
            log.clear()
            kept = [training(there[i], rate, share) for i, rate, share in plan]
            assert log.waits == []
            found.append(training.weights())
            terms.append([{name: float(value) for name, value in entry.items()} for entry in kept])
            if as_graphs:
                assert training.runs == 1 + 1  # as it is, and for the capture, whatever the weights
                log.clear()
                training(there[0], 1e-3)
                assert sum(log.operations.values()) < 20  # copies of the batch, the rate, the share and the terms
    assert terms[0] == terms[1]
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name]), name


def test_widths_are_a_few_and_kinds_are_dropped() -> None:
    seen = []

    def step(batch: Tensor, number: int) -> dict[str, Tensor]:
        seen.append(tuple(batch.shape))
        return {"x": batch.sum() * number}

    with simulated.device():
        steps = StepGraphs(step, torch.device(simulated.NAME, 0), longest=COLUMNS + 1)
        for width in (3, 5, 8, 7, 2):
            batch = torch.ones(2, width, dtype=torch.int64, device=simulated.NAME)
            assert int(steps(batch, 3)["x"]) == 6 * width
        assert seen == [(2, 8)] * (WARM_UP + 1)
        steps(torch.ones(2, 9, dtype=torch.int64, device=simulated.NAME), 3)
        assert seen[-1] == (2, 9)  # the longest that there is
        for number in range(MOST + 2):
            steps(batch, number)
        assert len(steps.kinds) == MOST


def test_a_step_that_waits_cannot_be_captured() -> None:
    def step(batch: Tensor) -> dict[str, Tensor]:
        return {"x": batch.sum() if int(batch.sum()) else batch.amax()}

    with simulated.device():
        steps = StepGraphs(step, torch.device(simulated.NAME, 0), longest=COLUMNS + 1)
        batch = torch.ones(2, 8, dtype=torch.int64, device=simulated.NAME)
        for _ in range(WARM_UP):
            steps(batch)
        with pytest.raises(EnsembleKDError, match=r"^fit: expected a step that a CUDA graph can capture, got Run"):
            steps(batch)


def test_the_simulation_repeats_what_it_recorded_alone() -> None:
    """A number of the host stays as it was; a tensor and the random state are followed; a capture runs nothing."""
    with simulated.device():
        weight, rate = torch.zeros(2, device=simulated.NAME), torch.full((), 1.0, device=simulated.NAME)
        number, graph = 1.0, graphs.Graph()
        with graphs.capture(graph):
            noise = torch.rand(2, device=simulated.NAME)
            weight.add_(rate).add_(number)
        assert weight.tolist() == [0.0, 0.0]
        number = 100.0
        rate.fill_(2.0)
        torch.manual_seed(3)
        graph.replay()
        assert weight.tolist() == [3.0, 3.0]
        torch.manual_seed(3)
        assert noise.tolist() == torch.rand(2, device=simulated.NAME).tolist()
        assert number == 100.0


def test_fit_with_graphs_trains_as_without() -> None:
    results = []
    for as_graphs in (False, True):
        with simulated.device():
            model = cases.build("SASRec", cases.OBJECTIVES["next"], backend="loop").to(simulated.NAME)
            options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "precision": "float32", "progress": False}
            result = fit(model, cases.data(), window=COLUMNS + 1, cuda_graphs=as_graphs, **options)
            results.append(([entry["train"] for entry in result.history], result.best, model.state_dict()))
            results[-1] = (*results[-1][:2], {name: x.cpu() for name, x in results[-1][2].items()})
    for mine, plain in zip(results[1][0], results[0][0], strict=True):
        assert mine == pytest.approx(plain, rel=1e-4)
    for name, weight in results[0][2].items():
        torch.testing.assert_close(results[1][2][name], weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "losses",
    [
        0.2 * (ICL(temperature=0.5) + CCL(temperature=0.5)) + 0.7 * KD(temperature=0.5) + -0.3 * Ambiguity() + AP(),
        0.7 * KD(scale_by_temperature_squared=True, on="spliced"),
    ],
    ids=["all", "spliced"],
)
def test_a_schedule_of_weights_captures_nothing_anew(losses: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares of a ramp are followed; only their zeros, where terms are left out, are a graph of their own."""
    monkeypatch.setattr(training_graphs, "WARM_UP", 1)
    monkeypatch.setattr(run, "set_rate", lambda optimizer, rate, _: set_rate(optimizer, rate, device))
    monkeypatch.setattr(Run, "_one_step", _one_padded_step)
    device, capture, found = torch.device(simulated.NAME, 0), StepGraphs._capture, []
    captured: list[StepGraphs] = []
    shares: set[float] = set()

    def counted(graphs: StepGraphs, *args: Any) -> None:
        captured.append(graphs)
        capture(graphs, *args)

    def ramp(epoch: float, epochs: int) -> float:
        shares.add(Ramp(0.25, 0.75)(epoch, epochs))
        return Ramp(0.25, 0.75)(epoch, epochs)

    monkeypatch.setattr(StepGraphs, "_capture", counted)
    for as_graphs in (False, True):
        with simulated.device():
            model = cases.build("SASRec", cases.OBJECTIVES["next"], losses=losses, backend="loop")
            model.to(simulated.NAME)
            options: dict[str, Any] = {"epochs": 3, "batch_size": 10, "precision": "float32", "progress": False}
            torch.manual_seed(0)
            result = fit(model, cases.data(), window=COLUMNS, cuda_graphs=as_graphs, transfer=ramp, **options)
            weights = {name: x.cpu() for name, x in model.state_dict().items()}
            found.append(([entry["train"] for entry in result.history], weights))
    assert len(shares) > 4
    assert 0.0 in shares
    kinds = [key[:2] for key in captured[0].kinds]  # type: ignore[index]
    assert 1 <= len(captured) <= len(kinds) <= 2 * len(set(kinds)) < len(shares)
    assert found[1][0] == found[0][0]
    for name, weight in found[0][1].items():
        assert torch.equal(found[1][1][name], weight), name


def _one_padded_step(run: Run, batch: Tensor, share: float, _: object) -> None:
    """A step as it is, of the batch that a graph would take."""
    batch = F.pad(batch, (COLUMNS - batch.shape[1], 0))
    run.progress.recent.add(run._whole_step(batch, share, share == 0, None))  # type: ignore[arg-type]


def test_a_graph_refuses_the_weights_that_a_step_refuses() -> None:
    with simulated.device():
        model = cases.build("SASRec", cases.OBJECTIVES["next"], losses=-0.8 * Ambiguity(), item_attributes=None)
        model.to(simulated.NAME)
        with pytest.raises(EnsembleKDError, match=r"a weight of Ambiguity >= -1, got -1\.6"):
            fit(model, cases.data(), cuda_graphs=True, transfer=lambda *_: 2.0, epochs=1, progress=False)


@pytest.mark.parametrize(
    ("objective", "options", "got"),
    [("next, sampled", {}, "an objective with negatives"), ("next", {"cuda_graphs": 2}, "cuda_graphs True or False")],
)
def test_fit_refuses_steps_that_no_graph_repeats(objective: str, options: dict[str, Any], got: str) -> None:
    with simulated.device():
        model = cases.build("SASRec", cases.OBJECTIVES[objective], losses=KD(), item_attributes=None)
        model.to(simulated.NAME)
        with pytest.raises(EnsembleKDError, match=re.escape(got)):
            fit(model, cases.data(), progress=False, **{"cuda_graphs": True, **options})
