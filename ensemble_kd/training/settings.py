"""The settings of a training run, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, get_args

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.evaluation import Exclude, Precision
from ensemble_kd.training.schedules import Schedule

Callback = Callable[[Mapping[str, Any]], None]
SAMPLES = 4  # of the schedule, in an epoch


@dataclass(frozen=True)
class Settings:
    """The arguments of ``fit`` beside the model and the data; see there.

    Raises:
        EnsembleKDError: a value that cannot be used, before anything is trained or written.

    Examples:
        >>> from ensemble_kd.training import StepDecay
        >>> Settings(
        ...     epochs=0, batch_size=8, lr=1e-3, weight_decay=0.0, schedule=StepDecay(), transfer=None,
        ...     max_grad_norm=None, window=None, window_step=1, by_length=True, precision="float32", exclude="history",
        ...     patience=None, output_dir=None, resume=False, checkpoint_every_s=0.0, log_every=1, callback=None,
        ...     progress=False, seed=0,
        ... )
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: fit: expected epochs, a whole number >= 1, got 0. Pass such a number.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    schedule: Schedule
    transfer: Schedule | None
    max_grad_norm: float | None
    window: int | None
    window_step: int
    by_length: bool
    precision: Precision
    exclude: Exclude
    patience: int | None
    output_dir: str | PathLike[str] | None
    resume: bool
    checkpoint_every_s: float
    log_every: int
    callback: Callback | None
    progress: bool
    seed: int

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "window_step", "log_every"):
            _whole(name, getattr(self, name), least=1)
        _whole("seed", self.seed, least=0)
        for name in ("window", "patience"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least=1)
        _number("lr", self.lr, above_zero=True)
        _number("weight_decay", self.weight_decay)
        _number("checkpoint_every_s", self.checkpoint_every_s, most=math.inf)
        if self.max_grad_norm is not None:
            _number("max_grad_norm", self.max_grad_norm, above_zero=True, most=math.inf)
        for name in ("lr", "weight_decay", "max_grad_norm"):
            if getattr(self, name) is not None:  # a NumPy number is a float, but no checkpoint may hold one
                object.__setattr__(self, name, float(getattr(self, name)))
        for name, choices in (("precision", get_args(Precision)), ("exclude", get_args(Exclude))):
            if getattr(self, name) not in choices:
                expected = f"{name} " + " or ".join(map(repr, choices))
                raise EnsembleKDError("fit", expected, repr(getattr(self, name)), "Choose one of these.")
        if self.resume and self.output_dir is None:
            raise EnsembleKDError("fit", "output_dir with resume=True", "None", "Say where the checkpoint is.")
        for schedule in (self.schedule, self.transfer):
            self._shares(schedule)

    def shares(self) -> list[float]:
        """Samples of the learning rate's schedule, then of the transfer's: what they do, whatever objects they are."""
        pairs = zip(self._shares(self.schedule), self._shares(self.transfer), strict=True)
        return [share for pair in pairs for share in pair]

    def _shares(self, schedule: Schedule | None) -> list[float]:
        shares = [1.0 if schedule is None else schedule(i / SAMPLES, self.epochs) for i in range(SAMPLES * self.epochs)]
        for i, share in enumerate(shares):
            if not (math.isfinite(share) and share >= 0):
                expected = "a schedule of finite shares >= 0"
                raise EnsembleKDError("fit", expected, f"{share!r} at epoch {i / SAMPLES}", "Correct the schedule.")
        return [float(share) for share in shares]


def _whole(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise EnsembleKDError("fit", f"{name}, a whole number >= {least}", repr(value), "Pass such a number.")


def _number(name: str, value: object, *, above_zero: bool = False, most: float = 1e300) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not 0 <= value <= most or (above_zero and value == 0):  # type: ignore[operator]
        sign = ">" if above_zero else ">="
        raise EnsembleKDError("fit", f"{name}, a finite number {sign} 0", repr(value), "Pass such a number.")
