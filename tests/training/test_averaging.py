"""A run that ends by itself: a constant rate, and the average of the weights in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble_kd import EnsembleKD, EnsembleKDError, fit
from ensemble_kd.encoders import SASRec
from ensemble_kd.internal import files
from ensemble_kd.training import Ramp, WarmupStableAverage
from ensemble_kd.training.averaging import WeightAverage
from tests.training.runs import DATA, STEPS, assert_same_checkpoint, sasrec, train

SCHEDULE = WarmupStableAverage(warmup=0.5, power=3.0, patience=2, patience_steps=2 * STEPS)
SCORES = [1.0, 2.0, 4.0, 3.0, 3.0, 3.0, 9.0]  # of validation: epoch 2 is best, and those after it are worse


class Scripted:
    """A metric that says what it is told, and keeps the weights that it is asked about."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores
        self.weights: list[dict[str, Tensor]] = []

    def __call__(self, model: EnsembleKD, data: Any) -> float:
        self.weights.append({name: t.clone() for name, t in model.state_dict().items()})
        return self.scores[len(self.weights) - 1]


def watched(**changes: Any) -> tuple[list[dict[str, Tensor]], list[tuple[int, float]], Scripted, EnsembleKD]:
    """A run, and the weights after each of its steps."""
    rates: list[tuple[int, float]] = []
    model, metric, after = sasrec(), Scripted(list(SCORES)), []

    def note(entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "step":
            rates.append((entry["epoch"], entry["lr"]))
            after.append({name: t.detach().clone() for name, t in model.state_dict().items()})

    options: dict[str, Any] = {"epochs": 50, "schedule": SCHEDULE, "metric": metric, "log_every": 1, "callback": note}
    train(model, **(options | changes))
    return after, rates, metric, model


def test_what_is_validated_is_the_average_of_all_steps() -> None:
    after, _, metric, _ = watched()
    for epoch, seen in enumerate(metric.weights, start=1):
        last = epoch * STEPS
        for name, got in seen.items():
            shares = [(s**4 - (s - 1) ** 4) / last**4 for s in range(1, last + 1)]
            want = sum(share * weights[name].double() for share, weights in zip(shares, after[:last], strict=True))
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


def test_training_goes_on_from_the_weights_and_not_from_their_average() -> None:
    """The same steps as a run that averages nothing: of power 10^9 only the newest step counts."""
    after, *_ = watched()
    newest, _, metric, _ = watched(schedule=replace(SCHEDULE, power=1e9))
    for step, (one, other) in enumerate(zip(after, newest, strict=True)):
        assert all(torch.equal(t, other[name]) for name, t in one.items()), step
    for epoch, seen in enumerate(metric.weights, start=1):
        assert all(torch.equal(t, newest[epoch * STEPS - 1][name]) for name, t in seen.items())


def test_the_run_ends_by_itself_at_the_full_rate() -> None:
    _, rates, metric, _ = watched()
    assert len(metric.weights) == 5
    assert [rate for _, rate in rates] == pytest.approx([0.0, 5e-3] + [1e-2] * (5 * STEPS - 2))
    assert len(watched(schedule=replace(SCHEDULE, patience=3))[2].weights) == 6
    for steps, epochs in ((3 * STEPS, 6), (3 * STEPS + 1, 7)):
        found = watched(schedule=replace(SCHEDULE, patience_steps=steps), epochs=7)
        assert len(found[2].weights) == epochs
    assert len(watched(patience=1)[2].weights) == 4  # the sooner of both


def test_the_model_is_left_with_the_best_average() -> None:
    _, _, metric, model = watched()
    assert all(torch.equal(t, metric.weights[2][name]) for name, t in model.state_dict().items())


def test_data_that_holds_nothing_out_leaves_the_newest_average() -> None:
    after: list[dict[str, Tensor]] = []
    model = sasrec()

    def note(entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "step":
            after.append({name: t.detach().clone() for name, t in model.state_dict().items()})

    options: dict[str, Any] = {"window_step": 4, "batch_size": 64, "log_every": 1, "callback": note, "progress": False}
    fit(model, replace(DATA, holdout="none"), epochs=2, schedule=SCHEDULE, **options)
    average = {name: torch.zeros_like(t) for name, t in after[0].items()}
    for s, weights in enumerate(after, start=1):
        average = {name: t.lerp(weights[name], 1 - (1 - 1 / s) ** 4) for name, t in average.items()}
    for name, got in model.state_dict().items():
        torch.testing.assert_close(got, average[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(stop: int, tmp_path: Path) -> None:
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

    options: dict[str, Any] = {"epochs": 50, "schedule": SCHEDULE}
    train(sasrec(), output_dir=tmp_path / "whole", metric=metric_of(0), **options)
    with pytest.raises(Stopped):
        train(sasrec(), output_dir=tmp_path / "parts", metric=metric_of(0), callback=until, **options)
    # The entry is written before the checkpoint, so the stopped epoch's end is trained and validated again.
    train(sasrec(seed=5), output_dir=tmp_path / "parts", metric=metric_of(stop), resume=True, **options)
    for name in ("last.pt", "best.pt"):
        assert_same_checkpoint(tmp_path / "whole" / name, tmp_path / "parts" / name)


def test_steps_of_an_unfinished_epoch_do_not_end_a_run_that_goes_on(tmp_path: Path) -> None:
    class Stopped(BaseException):
        pass

    def until(entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "step" and entry["step"] == 3 * STEPS:
            raise Stopped

    options: dict[str, Any] = {"log_every": 1, "checkpoint_every_s": 0.0, "output_dir": tmp_path, "epochs": 50}
    options["schedule"] = replace(SCHEDULE, patience=1, patience_steps=STEPS + 1)
    with pytest.raises(Stopped):
        train(sasrec(), metric=Scripted(SCORES[2:]), callback=until, **options)
    assert files.load(tmp_path / "last.pt")["progress"]["batch"] > 0
    metric = Scripted(SCORES[4:6])  # those of the third and the fourth epoch
    train(sasrec(), metric=metric, resume=True, **options)
    assert len(metric.weights) == 1  # of the epoch that was stopped, after which two have passed


def test_a_run_killed_before_its_best_weights_were_written_finds_their_average(tmp_path: Path) -> None:
    train(sasrec(), output_dir=tmp_path / "whole", epochs=2, schedule=SCHEDULE)
    best = torch.load(tmp_path / "whole" / "best.pt", weights_only=True)
    (tmp_path / "whole" / "best.pt").unlink()
    model = sasrec(seed=3)
    train(model, output_dir=tmp_path / "whole", epochs=2, schedule=SCHEDULE, resume=True)
    assert best["epoch"] == 1
    assert all(torch.equal(t, best["model"][name]) for name, t in model.state_dict().items())


def test_another_power_is_another_run(tmp_path: Path) -> None:
    train(sasrec(), output_dir=tmp_path, epochs=1, schedule=SCHEDULE)
    with pytest.raises(EnsembleKDError, match=r"power: 3.0 then, 1.0 now"):
        train(sasrec(), output_dir=tmp_path, epochs=2, schedule=WarmupStableAverage(power=1.0), resume=True)


def test_an_error_in_validation_leaves_the_weights_of_training() -> None:
    model = sasrec()
    steps: list[dict[str, Tensor]] = []

    def note(entry: Mapping[str, Any]) -> None:
        steps.append({name: t.detach().clone() for name, t in model.state_dict().items()})

    def broken(model: EnsembleKD, data: Any) -> float:
        raise ValueError("no number")

    with pytest.raises(ValueError, match="no number"):
        train(model, schedule=SCHEDULE, metric=broken, log_every=1, callback=note)
    assert all(torch.equal(t, steps[-1][name]) for name, t in model.state_dict().items())


class Normed(SASRec):
    """With statistics that training moves, a count of batches, and a weight that it does not."""

    def __init__(self) -> None:
        super().__init__(9, d_model=4, num_layers=1, max_len=5)
        self.norm = nn.BatchNorm1d(4)
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)


def test_statistics_are_averaged_counts_and_frozen_weights_are_not() -> None:
    model = EnsembleKD(Normed, n=2, backend="loop")
    names = set(WeightAverage(model, 3.0).values)
    assert any(name.endswith("running_mean") for name in names)
    assert not any(name.endswith(("num_batches_tracked", "fixed")) for name in names)
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= names


@pytest.mark.parametrize("options", [{"patience": 0}, {"power": -1.0}, {"warmup": -1}])
def test_settings_that_make_no_schedule_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(EnsembleKDError, match=f"WarmupStableAverage: expected {next(iter(options))}"):
        WarmupStableAverage(**options)


def test_strong_kd_ends_by_itself_too() -> None:
    """The weights of KD on a schedule of their own do not keep a run from ending."""
    assert len(watched(transfer=Ramp(0.0, 0.1))[2].weights) == 5
