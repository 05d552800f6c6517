"""Learning rates and weights over a run. They depend on the epoch alone, so that a run resumes exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args

from ensemble_kd.internal import choice, number, ratio, whole

Unit: TypeAlias = Literal["run", "epochs"]


class Schedule(Protocol):
    """A share of the learning rate, or of the weights of ICL, CCL and KD, over a run."""

    def __call__(self, epoch: float, epochs: int) -> float:
        """Return the share at ``epoch`` (fractional, from 0) of ``epochs``."""
        ...


@dataclass(frozen=True)
class StepDecay:
    """Multiply by ``factor`` after every ``every`` epochs; every=100 is the paper's (Sec. 4.1.4, factor not given).

    Raises:
        EnsembleKDError: every < 1, or factor outside (0, 1].

    Examples:
        >>> StepDecay()(99.5, 250), StepDecay()(100.0, 250)
        (1.0, 0.1)
    """

    every: int = 100
    factor: float = 0.1

    def __post_init__(self) -> None:
        whole("StepDecay", "every", self.every, least=1)
        ratio("StepDecay", "factor", self.factor, above_zero=True)

    def __call__(self, epoch: float, epochs: int) -> float:  # noqa: D102
        return float(self.factor ** (epoch // self.every))


@dataclass(frozen=True)
class Cosine:
    """Rise linearly over ``warmup`` epochs, then fall along a cosine to ``floor`` at the end.

    Raises:
        EnsembleKDError: warmup that is negative or not finite, or floor outside [0, 1].

    Examples:
        >>> [Cosine(warmup=1)(epoch, 11) for epoch in (0.5, 1.0, 6.0, 11.0)]
        [0.5, 1.0, 0.505, 0.01]
    """

    warmup: float = 0.0
    floor: float = 0.01

    def __post_init__(self) -> None:
        number("Cosine", "warmup", self.warmup, least=0)
        ratio("Cosine", "floor", self.floor)

    def __call__(self, epoch: float, epochs: int) -> float:  # noqa: D102
        if epoch < self.warmup:
            return epoch / self.warmup
        done = (epoch - self.warmup) / max(epochs - self.warmup, 1e-9)
        return round(self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))), 12)


@dataclass(frozen=True)
class WarmupStableDecay:
    """Rise, stay at the full rate until validation stops improving, then go back to the best epoch and fall to the end.

    For data of which nobody knows how many epochs they take: ``fit(epochs=...)`` is then an upper bound. The schedule
    follows from the number of epochs and the best of them alone, so that a run resumes exactly.

    Source: Hu et al., "MiniCPM", 2024 (warm-up, stable, decay). There the stable stretch is given; here validation ends
    it.

    Args:
        warmup: epochs of the linear rise.
        patience: epochs without a better validation that end the stable stretch. At a constant rate validation is
            noisy, so that a single one says little.
        decay: share of the run that the fall takes, at least one epoch.
        floor: share of the rate at the end.

    Raises:
        EnsembleKDError: a number out of its range.

    Examples:
        >>> schedule = WarmupStableDecay(warmup=1, patience=2, decay=0.25)
        >>> [schedule(epoch, 8) for epoch in (0.5, 3.0, 6.0, 7.0, 8.0)]  # validation improves to the end
        [0.5, 1.0, 1.0, 0.505, 0.01]
        >>> schedule.stretch(done=8, best=5, epochs=100)  # after 8 epochs, of which number 5 (from 0) was best
        Stretch(start=8, end=10)
        >>> schedule.stretch(done=7, best=5, epochs=100) is None
        True
    """

    warmup: float = 0.5
    patience: int = 2
    decay: float = 0.25
    floor: float = 0.01

    def __post_init__(self) -> None:
        number("WarmupStableDecay", "warmup", self.warmup, least=0)
        whole("WarmupStableDecay", "patience", self.patience, least=1)
        number("WarmupStableDecay", "decay", self.decay, above=0, below=1)
        ratio("WarmupStableDecay", "floor", self.floor)

    def __call__(self, epoch: float, epochs: int) -> float:  # noqa: D102
        return self.share(epoch, Stretch(epochs - max(1, round(self.decay * epochs)), epochs))

    def stretch(self, *, done: int, best: int, epochs: int) -> Stretch | None:
        """Return the last stretch, if it is to begin now, because validation has stopped improving.

        Args:
            done: number of epochs that are done.
            best: number of the best of them, from 0.
            epochs: the upper bound.
        """
        if done - 1 - best < self.patience or done >= epochs - max(1, round(self.decay * epochs)):
            return None
        length = max(1, math.ceil((best + 1) * self.decay / (1 - self.decay) - 1e-9))
        return Stretch(done, min(epochs, done + length))

    def share(self, epoch: float, stretch: Stretch) -> float:
        """Return the share of the rate at ``epoch`` (fractional, from 0), where the last stretch is known."""
        if epoch < self.warmup:
            return epoch / self.warmup
        left = (stretch.end - epoch) / (stretch.end - stretch.start)
        return round(max(self.floor, self.floor + (1 - self.floor) * min(left, 1.0)), 12)


class Stretch(NamedTuple):
    """The epochs in which the rate falls: from the end of epoch ``start`` to the end of the run."""

    start: int
    end: int


@dataclass(frozen=True)
class Ramp:
    """Rise from 0 at ``start`` to 1 at ``full`` along a straight line; both are shares of the run, or epochs.

    For ``fit(transfer=...)``. A network that has learned nothing yet has nothing to teach. With strong KD from the
    start, members became more alike and the ensemble worse (benchmarks/paper/REPORT.md, "What was tried"). Terms of
    weight 0 are not computed.

    Args:
        start: the weights' first moment above 0.
        full: the moment of their full height.
        unit: "run", for shares of the run; or "epochs", for a run that ends by itself.

    Raises:
        EnsembleKDError: not 0 <= start <= full, shares of the run above 1, or another unit.

    Examples:
        >>> [Ramp(0.25, 0.75)(epoch, 8) for epoch in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)]
        [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
        >>> [Ramp(2, 4, unit="epochs")(epoch, 100) for epoch in (2.0, 3.0, 4.0)]
        [0.0, 0.5, 1.0]
    """

    start: float
    full: float
    unit: Unit = "run"

    def __post_init__(self) -> None:
        of_run = choice("Ramp", "unit", self.unit, get_args(Unit)) == "run"
        number("Ramp", "full", self.full, least=0, most=1 if of_run else math.inf)
        number("Ramp", "start", self.start, least=0, most=self.full)

    def __call__(self, epoch: float, epochs: int) -> float:  # noqa: D102
        done = epoch / epochs if self.unit == "run" else epoch
        if done >= self.full:
            return 1.0
        return max(0.0, done - self.start) / max(self.full - self.start, 1e-9)


@dataclass(frozen=True)
class Hump:
    """Rise from 0 at ``start`` to 1 at ``full``, then fall by a constant factor per step to ``floor`` at ``end``.

    For ``fit(transfer=...)``. The members learn from each other once they know something, and end on their own: what
    they learned stays, and they part again. The three places are shares of the run.

    Source: FLAME (SIGIR 2026) anneals its transfer from 1 to 1e-5; the rise is ours, as in ``Ramp``.

    Raises:
        EnsembleKDError: not 0 <= start <= full <= end <= 1, or floor outside (0, 1].

    Examples:
        >>> [Hump(0.0, 0.25, 0.75, floor=1e-4)(epoch, 8) for epoch in (0.0, 1.0, 2.0, 4.0, 6.0, 8.0)]
        [0.0, 0.5, 1.0, 0.01, 0.0001, 0.0001]
    """

    start: float = 0.0
    full: float = 0.2
    end: float = 1.0
    floor: float = 1e-5

    def __post_init__(self) -> None:
        full = number("Hump", "full", self.full, least=0, most=ratio("Hump", "end", self.end))
        number("Hump", "start", self.start, least=0, most=full)
        ratio("Hump", "floor", self.floor, above_zero=True)

    def __call__(self, epoch: float, epochs: int) -> float:  # noqa: D102
        done = epoch / epochs
        if done < self.full:
            return round(max(0.0, done - self.start) / max(self.full - self.start, 1e-9), 12)
        return round(float(self.floor ** min((done - self.full) / max(self.end - self.full, 1e-9), 1.0)), 12)
