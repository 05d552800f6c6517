"""A run that ends by itself: a constant rate until validation settles, then the decay from the best epoch's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ensemble_kd import EnsembleKD, EnsembleKDError
from ensemble_kd.training import Ramp, WarmupStableDecay
from tests.training.runs import STEPS, assert_same_checkpoint, sasrec, train

SETTLING = WarmupStableDecay(warmup=0.5, patience=2, decay=0.4)
SCORES = [1.0, 2.0, 4.0, 3.0, 3.0, 2.0, 5.0]  # of validation: epoch 2 is best, and two after it are worse


class Scripted:
    """A metric that says what it is told, and keeps the weights that it is asked about."""

    def __init__(self, scores: list[float]) -> None:
        self.scores, self.weights = scores, []  # type: ignore[var-annotated]

    def __call__(self, model: EnsembleKD, data: Any) -> float:
        self.weights.append({name: t.clone() for name, t in model.state_dict().items()})
        return self.scores[len(self.weights) - 1]


def rates(**changes: Any) -> tuple[list[tuple[int, float]], Scripted, EnsembleKD]:
    seen: list[tuple[int, float]] = []

    def note(entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "step":
            seen.append((entry["epoch"], entry["lr"]))

    metric, model = Scripted(list(SCORES)), sasrec()
    options: dict[str, Any] = {"epochs": 50, "schedule": SETTLING, "metric": metric, "log_every": 1, "callback": note}
    train(model, **(options | changes))
    return seen, metric, model


def test_the_run_ends_by_itself_soon_after_validation_has_settled() -> None:
    """Five epochs at the full rate (the third was best), then 3 * .4 / .6 = 2 more in which it falls to the floor."""
    seen, metric, _ = rates()
    assert len(metric.weights) == 7
    full = [rate for epoch, rate in seen if 1 <= epoch < 5]
    assert full == [1e-2] * (4 * STEPS)
    falling = [rate for epoch, rate in seen if epoch >= 5]
    assert falling == pytest.approx([1e-2 * (0.01 + 0.99 * (1 - i / (2 * STEPS))) for i in range(2 * STEPS)])


def test_the_decay_begins_with_the_weights_of_the_best_epoch() -> None:
    """With no rate left in the decay, its epochs have the weights that it began with."""
    still = WarmupStableDecay(warmup=0.5, patience=2, decay=0.4, floor=0.0)
    _, metric, _ = rates(schedule=still, callback=None, batch_size=10**6)  # a step an epoch: the last one at rate .5
    moved = max(float((metric.weights[5][name] - t).abs().max()) for name, t in metric.weights[2].items())
    away = max(float((metric.weights[4][name] - t).abs().max()) for name, t in metric.weights[2].items())
    assert moved < 1.5e-2 < away  # Adam's steps are of the rate's size: one from the best, two from where it was left


def test_the_model_is_left_with_the_best_of_all_epochs() -> None:
    _, metric, model = rates()
    assert all(torch.equal(t, metric.weights[6][name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("stop", [3, 4, 5, 6])
def test_a_run_that_was_stopped_settles_as_one_that_was_not(stop: int, tmp_path: Path) -> None:
    class Stopped(BaseException):
        pass

    def until(entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "epoch" and entry["epoch"] == stop:
            raise Stopped

    def metric_of(done: int) -> Callable[[EnsembleKD, Any], float]:
        scripted = Scripted(SCORES[done:])

        def score(model: EnsembleKD, data: Any) -> float:
            return scripted(model, data)

        return score

    options: dict[str, Any] = {"epochs": 50, "schedule": SETTLING}
    train(sasrec(), output_dir=tmp_path / "whole", metric=metric_of(0), **options)
    with pytest.raises(Stopped):
        train(sasrec(), output_dir=tmp_path / "parts", metric=metric_of(0), callback=until, **options)
    # The entry is written before the checkpoint, so the stopped epoch's end is trained and validated again.
    train(sasrec(seed=5), output_dir=tmp_path / "parts", metric=metric_of(stop), resume=True, **options)
    for name in ("last.pt", "best.pt"):
        assert_same_checkpoint(tmp_path / "whole" / name, tmp_path / "parts" / name)


def test_a_run_that_improves_to_the_end_decays_within_its_bound() -> None:
    schedule = WarmupStableDecay(warmup=0.0, decay=0.5)
    shares = [schedule(epoch / 4, 4) for epoch in range(17)]
    assert shares[:9] == [1.0] * 9
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert schedule.stretch(done=3, best=0, epochs=4) is None  # its decay has begun by itself


@pytest.mark.parametrize("options", [{"patience": 0}, {"decay": 0.0}, {"decay": 1.0}, {"warmup": -1}, {"floor": 2}])
def test_settings_that_make_no_schedule_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(EnsembleKDError, match=f"WarmupStableDecay: expected {next(iter(options))}"):
        WarmupStableDecay(**options)


def test_strong_kd_settles_too() -> None:
    """The weights of KD on a schedule of their own do not keep a run from settling."""
    _, metric, model = rates(transfer=Ramp(0.0, 0.1))
    assert len(metric.weights) == 7
    assert all(isinstance(t, Tensor) for t in model.state_dict().values())
