"""Short runs that the tests of training compare: a model, a call of ``fit``, and what it left behind."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble_kd import (
    AP,
    CCL,
    ICL,
    KD,
    EnsembleKD,
    fit,
)
from ensemble_kd.data import synthetic
from ensemble_kd.encoders import SASRec
from ensemble_kd.evaluation import evaluate
from ensemble_kd.internal import files
from ensemble_kd.training import Cosine, FitResult

V = 60
DATA = synthetic(num_users=120, num_items=V, num_clusters=10, max_len=20)
STEPS = 4  # of an epoch of ``train``


def sasrec(**changes: Any) -> EnsembleKD:
    losses = AP() + 0.05 * (ICL() + CCL()) + 0.01 * KD()
    options: dict[str, Any] = {"n": 2, "losses": losses, "item_attributes": DATA.item_attributes} | changes
    return EnsembleKD(lambda: SASRec(V, d_model=8, num_layers=1, max_len=8, dropout=0.2), **options)


def train(model: EnsembleKD, **changes: Any) -> FitResult:
    options: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 64,
        "lr": 1e-2,
        "window_step": 4,
        "log_every": 3,
        "checkpoint_every_s": 0.0,
        "progress": False,
        "precision": "float32",  # on every machine
        "schedule": Cosine(warmup=0.5),
    }
    return fit(model, DATA, **(options | changes))


def timeless(entry: Any) -> Any:
    """A log entry without what a clock says."""
    return {name: value for name, value in entry.items() if name not in ("step_s", "train_s", "valid_s")}


def log_of(folder: Path) -> list[Any]:
    return [timeless(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list):
        for name, below in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from flatten(below, f"{path}/{name}")
    else:
        yield path, value


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Weights, optimizer, random state, position: everything but the clock, bit for bit."""
    one, other = (dict(flatten(files.load(path))) for path in (first, second))
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name.endswith(("train_s", "valid_s")):
            continue
        same = torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        assert same, name


def assert_ends_as(unbroken: tuple[EnsembleKD, FitResult, Path], folder: Path, model: EnsembleKD, got: Any) -> None:
    expected_model, expected, expected_folder = unbroken
    for (name, a), (_, b) in zip(expected_model.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert (got.best_epoch, got.best) == (expected.best_epoch, expected.best)
    assert [timeless(entry) for entry in got.history] == [timeless(entry) for entry in expected.history]
    assert log_of(folder) == log_of(expected_folder)
    for name in ("last.pt", "best.pt"):
        assert_same_checkpoint(folder / name, expected_folder / name)
    assert str(evaluate(model, DATA, "test")) == str(evaluate(expected_model, DATA, "test"))


def global_random_state() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), [str(x) for x in np.random.get_state()]]  # noqa: NPY002


def recording(model: EnsembleKD) -> list[dict[str, float]]:
    """The terms of every step that the model will take."""
    steps: list[dict[str, float]] = []
    loss = model.loss

    def record(*args: Any, **options: Any) -> Any:
        step = loss(*args, **options)
        steps.append({name: float(value) for name, value in step.terms.items()})
        return step

    model.loss = record  # type: ignore[method-assign]
    return steps
