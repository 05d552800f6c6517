"""The settings of a training run, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from ensemble_kd.data import AnySequences
from ensemble_kd.ensemble import EnsembleKD, ItemLoss, Precision
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.evaluation import Exclude
from ensemble_kd.internal import choice, file_path, number, whole
from ensemble_kd.metrics import metric_named
from ensemble_kd.training.schedules import Ramp, Schedule, WarmupStableAverage

Callback = Callable[[Mapping[str, Any]], None]
Metric = str | Callable[[EnsembleKD, AnySequences], float]
SAMPLES = 4  # of a schedule, per epoch
MOST_EPOCHS = 1_000_000  # a schedule is sampled over all of them
UNSETTLED = 100  # epochs at most if no number is given


@dataclass(frozen=True)
class Settings:
    """The keyword arguments of ``fit``, by the same names; see there.

    Raises:
        EnsembleKDError: a value that cannot be used, before anything is trained or written.
    """

    epochs: int
    batch_size: int | None
    lr: float
    weight_decay: float
    schedule: Schedule
    transfer: Schedule | None
    loss: ItemLoss
    max_grad_norm: float | None
    window: int | None
    window_step: int | None
    by_length: bool
    precision: Precision
    cuda_graphs: bool
    exclude: Exclude
    metric: Metric
    patience: int | None
    output_dir: str | PathLike[str] | None
    resume: bool
    overwrite: bool
    checkpoint_every_s: float
    log_every: int
    callback: Callback | None
    progress: bool
    seed: int

    def __post_init__(self) -> None:
        self._set("epochs", whole("fit", "epochs", self.epochs, least=1, most=MOST_EPOCHS))
        self._set("seed", whole("fit", "seed", self.seed, least=0, most=2**63 - 1))
        for name in ("batch_size", "window_step", "log_every", "window", "patience"):
            value = getattr(self, name)
            if value is not None or name == "log_every":
                self._set(name, whole("fit", name, value, least=1))
        self._set("lr", number("fit", "lr", self.lr, above=0))
        self._set("weight_decay", number("fit", "weight_decay", self.weight_decay, least=0))
        every = number("fit", "checkpoint_every_s", self.checkpoint_every_s, least=0, most=math.inf)
        self._set("checkpoint_every_s", every)
        if self.max_grad_norm is not None:
            self._set("max_grad_norm", number("fit", "max_grad_norm", self.max_grad_norm, above=0, most=math.inf))
        choice("fit", "precision", self.precision, get_args(Precision))
        choice("fit", "exclude", self.exclude, get_args(Exclude))
        for name in ("by_length", "cuda_graphs", "resume", "overwrite", "progress"):
            choice("fit", name, getattr(self, name), (True, False))
        if not callable(self.metric):
            metric_named(self.metric)
        self._check_functions()
        self._check_folder()
        for schedule in (self.schedule, self.transfer):
            self._shares(schedule)

    def shares(self) -> list[float]:
        """Return samples of both schedules in turn, ``schedule`` first: their values, whatever objects they are."""
        pairs = zip(self._shares(self.schedule), self._shares(self.transfer), strict=True)
        return [share for pair in pairs for share in pair]

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_functions(self) -> None:
        for name in ("schedule", "transfer", "callback", "loss"):
            value = getattr(self, name)
            if not callable(value) and not (value is None and name in ("transfer", "callback")):
                kind = "an ItemLoss" if name == "loss" else "a function"
                raise EnsembleKDError("fit", f"{name}, {kind}", repr(value), "Pass one, or leave the argument out.")
        if not (hasattr(self.loss, "fingerprint") and hasattr(self.loss, "further")):
            fix = "Subclass ensemble_kd.ensemble.ItemLoss."
            raise EnsembleKDError("fit", "loss, an ItemLoss", repr(self.loss), fix)

    def _check_folder(self) -> None:
        if self.output_dir is not None and not isinstance(self.output_dir, str | PathLike):
            raise EnsembleKDError("fit", "output_dir, a path", repr(self.output_dir), "Pass a string or a Path.")
        if self.output_dir is not None:
            self._set("output_dir", file_path("fit", "output_dir", self.output_dir))
        if self.output_dir is not None and Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            fix = "Choose another output_dir."
            raise EnsembleKDError("fit", "output_dir, a folder", f"the file {self.output_dir}", fix)
        if self.resume and self.output_dir is None:
            raise EnsembleKDError("fit", "output_dir with resume=True", "None", "Say where the checkpoint is.")
        if self.resume and self.overwrite:
            fix = "resume=True goes on with the run in output_dir, overwrite=True replaces it."
            raise EnsembleKDError("fit", "resume or overwrite", "both", fix)

    def _shares(self, schedule: Schedule | None) -> list[float]:
        return [1.0 if schedule is None else self._share(schedule, i) for i in range(SAMPLES * self.epochs)]

    def _share(self, schedule: Schedule, sample: int) -> float:
        share = schedule(sample / SAMPLES, self.epochs)
        try:
            return number("fit", "a share", share, least=0)
        except EnsembleKDError:
            got, fix = f"{share!r} at epoch {sample / SAMPLES}", "Correct the schedule."
            raise EnsembleKDError("fit", "a schedule of finite shares >= 0", got, fix) from None


def at_most(epochs: int | None, schedule: Schedule, transfer: Schedule | None, data: AnySequences) -> int:
    """Return the number of epochs of ``fit``, or its bound if none is given.

    Raises:
        EnsembleKDError: none is given, and nothing would end the run.
    """
    if epochs is not None:
        return epochs
    if not data.has_targets("valid"):
        fix = "Pass the number that was best where validation items were held out."
        raise EnsembleKDError("fit", "epochs, for data without validation items", "None", fix)
    if callable(schedule) and not isinstance(schedule, WarmupStableAverage):
        fix = "Pass a number, or leave the schedule out: its default ends by itself."
        raise EnsembleKDError("fit", f"epochs, over which {type(schedule).__name__} spreads", "None", fix)
    if callable(transfer) and not (isinstance(transfer, Ramp) and transfer.unit == "epochs"):
        fix = "Pass a number, or transfer=Ramp(2, 5, unit='epochs')."
        raise EnsembleKDError("fit", "epochs, of which transfer takes shares", "None", fix)
    return UNSETTLED
