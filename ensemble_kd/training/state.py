"""The content of last.pt and best.pt: one dataclass each, checked field by field on reading."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import load, save
from ensemble_kd.training.conform import conform, plain

Rows = dict[str, dict[str, float]]  # scorer -> metric -> value


class EpochEntry(TypedDict):
    """The log entry of an epoch, and an element of ``FitResult.history``."""

    kind: str  # "epoch"
    epoch: int  # from 0
    step: int  # steps taken so far
    train_s: float
    valid_s: float
    train: dict[str, float]  # means of the loss terms over the epoch
    valid: Rows
    precision: str  # "float32" or "bfloat16"


@dataclass
class Means:
    """Means of the loss terms over steps, summed where the terms live, so that a device need not report each step.

    A term counts as 0 in a step that did not compute it.

    Examples:
        >>> means = Means()
        >>> means.add({"kd": torch.tensor(1.0)})
        >>> means.add({"kd": torch.tensor(4.0)})
        >>> means.values(), means.steps
        ({'kd': 2.5}, 2)
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def add(self, terms: dict[str, Tensor], steps: int = 1) -> None:
        """Count one step more, or the sums over so many."""
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.detach()
        self.steps += steps

    def values(self) -> dict[str, float]:
        """Return the mean of each term."""
        return {name: float(value) / self.steps for name, value in self.sums.items()}


@dataclass(frozen=True)
class Best:
    """The best epoch so far; -1: none is done."""

    epoch: int = -1
    rows: Rows = field(default_factory=dict)  # empty if nothing is held out
    score: float = 0.0  # the number that was compared


@dataclass
class Progress:
    """The place in a run where the next step begins, and the numbers of the run so far."""

    epoch: int = 0
    batch: int = 0  # of the epoch; if all are done, validation comes next
    step: int = 0  # of the run
    entries: int = 0  # lines of log.jsonl
    train_s: float = 0.0  # of the epoch, without validation
    best: Best = field(default_factory=Best)
    averaged: int = 0  # the step after which the weights were averaged last; 0: they are not
    history: list[EpochEntry] = field(default_factory=list)
    recent: Means = field(default_factory=Means)  # since the last log entry
    earlier: Means = field(default_factory=Means)  # of the epoch, before that entry


@dataclass(frozen=True)
class RunState:
    """Content of last.pt: a run resumes from it bit for bit. Tensors are those of all members and shares."""

    fingerprint: dict[str, str]
    shares: list[float]  # samples of the schedules
    model: dict[str, Tensor]
    optimizer: dict[str, Any]  # its own format
    averages: dict[str, Tensor]  # of the weights, those that are validated; empty without ``WarmupStableAverage``
    teachers: dict[str, Tensor]  # of ``KD(teacher="ema")``; empty without it
    random: list[dict[str, Any]]  # ``random_state`` of each process
    progress: Progress

    def check(self) -> None:
        """Check that the fields fit each other.

        Raises:
            ValueError: they do not.
        """
        p = self.progress
        if min(p.epoch, p.batch, p.entries, p.recent.steps, p.earlier.steps) < 0 or p.step < p.batch:
            raise ValueError(f"epoch {p.epoch}, batch {p.batch}, step {p.step}, {p.entries} entries")
        if len(p.history) != p.epoch:
            raise ValueError(f"history of {len(p.history)} epochs at epoch {p.epoch}")
        if p.best.epoch not in (range(p.epoch) if p.epoch else (-1,)):
            raise ValueError(f"the best epoch is {p.best.epoch} at epoch {p.epoch}")
        if not 0 <= p.averaged <= p.step:
            raise ValueError(f"weights averaged up to step {p.averaged} at step {p.step}")
        if not math.isfinite(p.best.score):
            raise ValueError(f"the best epoch's score is {p.best.score}")
        if not {"state", "param_groups"} <= self.optimizer.keys():
            raise ValueError("no state of an optimizer")


@dataclass(frozen=True)
class BestState:
    """Content of best.pt: the weights of the best epoch so far, for ``model.load_state_dict``."""

    model: dict[str, Tensor]
    epoch: int
    valid: Rows

    def check(self) -> None:
        """Check that the fields fit each other.

        Raises:
            ValueError: they do not.
        """
        if self.epoch < 0:
            raise ValueError(f"the best epoch is {self.epoch}")


S = TypeVar("S", RunState, BestState)


def write_state(path: Path, state: RunState | BestState) -> None:
    """Write a state to ``path``, whole or not at all.

    Raises:
        EnsembleKDError: the file cannot be written.
    """
    save(path, plain(state))


def read_state(kind: type[S], path: Path, *, device: torch.device | str = "cpu") -> S:
    """Read a state that ``write_state`` has written; runs no code that the file may contain.

    Raises:
        EnsembleKDError: no such file, a damaged one, or a field that is missing, of another type or out of range.
    """
    content = load(path, device=device)
    try:
        state = conform(kind, content, path.name)
        state.check()
    except (TypeError, ValueError) as error:
        fix = "Use another checkpoint, or start anew with overwrite=True."
        raise EnsembleKDError("resume", f"a {path.name} written by fit", f"{path} ({error})", fix) from error
    return state
