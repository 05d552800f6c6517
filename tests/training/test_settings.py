"""The arguments of ``fit`` are checked by one rule, before anything is trained or written."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_kd import EnsembleKDError, fit
from ensemble_kd.training.settings import Settings
from tests.training.runs import DATA, sasrec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs, a whole number in 1..1000000, got 0"),
        ({"epochs": 2**62}, "epochs, a whole number in 1..1000000, got 4611686018427387904"),
        ({"epochs": True}, "epochs, a whole number in 1..1000000, got True"),
        ({"batch_size": 2.0}, "batch_size, a whole number >= 1, got 2.0"),
        ({"window_step": 0}, "window_step, a whole number >= 1, got 0"),
        ({"log_every": 0}, "log_every, a whole number >= 1, got 0"),
        ({"window": 0}, "window, a whole number >= 1, got 0"),
        ({"window": 10}, "window <= 9, which the encoder can read, got 10"),
        ({"patience": 0}, "patience, a whole number >= 1, got 0"),
        ({"seed": -1}, "seed, a whole number in 0..9223372036854775807, got -1"),
        ({"lr": 0.0}, "lr, a finite number > 0, got 0.0"),
        ({"lr": math.nan}, "lr, a finite number > 0, got nan"),
        ({"lr": math.inf}, "lr, a finite number > 0, got inf"),
        ({"lr": "1e-3"}, "lr, a finite number > 0, got '1e-3'"),
        ({"weight_decay": -0.1}, "weight_decay, a finite number >= 0, got -0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm, a number > 0, got 0.0"),
        ({"checkpoint_every_s": -1.0}, "checkpoint_every_s, a number >= 0, got -1.0"),
        ({"precision": "float16"}, "precision 'auto', 'float32' or 'bfloat16', got 'float16'"),
        ({"exclude": "seen"}, "exclude 'none', 'window' or 'history', got 'seen'"),
        ({"schedule": lambda e, n: -e}, "a schedule of finite shares >= 0, got -0.25 at epoch 0.25"),
        ({"transfer": lambda e, n: math.nan}, "a schedule of finite shares >= 0, got nan at epoch 0.0"),
        ({"schedule": 3}, "schedule, a function, got 3"),
        ({"schedule": None}, "schedule, a function, got None"),
        ({"schedule": lambda e, n: "1"}, "a schedule of finite shares >= 0, got '1' at epoch 0.0"),
        ({"transfer": 0.5}, "transfer, a function, got 0.5"),
        ({"callback": 1}, "callback, a function, got 1"),
        ({"loss": 1}, "loss, an ItemLoss, got 1"),
        ({"loss": len}, "loss, an ItemLoss, got <built-in function len>"),
        ({"resume": "no"}, "resume True or False, got 'no'"),
        ({"by_length": None}, "by_length True or False, got None"),
        ({"output_dir": 5}, "output_dir, a path, got 5"),
        ({"output_dir": __file__}, f"output_dir, a folder, got the file {__file__}"),
        ({"resume": True, "output_dir": None}, "output_dir with resume=True, got None"),
        ({"resume": True, "overwrite": True}, "resume or overwrite, got both"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_are_checked_before_anything_is_written(changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(EnsembleKDError) as caught:
        fit(sasrec(), DATA, **({"epochs": 2, "output_dir": tmp_path / "run", "progress": False} | changes))
    assert str(caught.value).startswith(f"fit: expected {message}. ")
    assert not (tmp_path / "run").exists()


def test_every_argument_is_a_setting() -> None:
    """``fit`` builds its settings from its own arguments: names and types stand in both places alike."""
    parameters = list(inspect.signature(fit).parameters.values())
    assert [p.name for p in parameters[:2]] == ["model", "data"]
    given = {p.name: p.annotation for p in parameters[2:]}
    assert given | {"epochs": "int"} == {f.name: f.type for f in fields(Settings)}  # a bound where none is given
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:])


def test_numbers_of_numpy_are_numbers() -> None:
    whole = dict.fromkeys(("epochs", "batch_size", "window_step", "log_every", "patience", "window"), np.int64(2))
    real = {"lr": np.float32(0.5), "weight_decay": np.float64(0), "max_grad_norm": np.int32(1)}
    given = {p.name: p.default for p in inspect.signature(fit).parameters.values()} | whole | real
    settings = Settings(**{name: value for name, value in given.items() if name not in ("model", "data")})
    assert all(type(getattr(settings, name)) is int for name in whole)
    assert all(type(getattr(settings, name)) is float for name in real)
    assert len(fit(sasrec(losses=0), DATA, epochs=np.int64(1), window=np.int32(4), progress=False).history) == 1
