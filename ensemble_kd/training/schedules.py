"""Learning rates and weights over a run. They depend on the epoch alone, so that a run resumes exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

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
class WarmupStableAverage:
    """Rise, then stay at the full rate; the weights' average over the steps is validated and kept in their place.

    For data of which nobody knows how many epochs they take: ``fit(epochs=...)`` is then an upper bound. Averaging does
    what a falling rate does, and needs no end that is known before. The run ends when the average has not improved
    for ``patience`` epochs and ``patience_steps`` steps, since epochs of small data have few. A step that was taken
    long ago counts little, see ``functional.power_average``.

    Source: Sandler et al., "Training trajectories, mini-batch losses and the curious role of the learning rate", 2023
    (averages stand for a falling rate), and Karras et al., CVPR 2024 (step s counts s^power).

    Args:
        warmup: epochs of the linear rise.
        power: step s of the run counts s^power in the average. 0: all steps alike; 5: half of the weight lies on the
            newest 11 % of the steps.
        patience: epochs without a better validation that end the run, ...
        patience_steps: ... if they have so many steps. With 5 steps an epoch, validation may fall twice at random long
            before the network has learned.

    Raises:
        EnsembleKDError: a number out of its range.

    Examples:
        >>> schedule = WarmupStableAverage(warmup=1)
        >>> [schedule(epoch, 8) for epoch in (0.5, 1.0, 8.0)]
        [0.5, 1.0, 1.0]
    """

    warmup: float = 0.5
    power: float = 5.0
    patience: int = 2
    patience_steps: int = 200

    def __post_init__(self) -> None:
        number("WarmupStableAverage", "warmup", self.warmup, least=0)
        number("WarmupStableAverage", "power", self.power, least=0)
        whole("WarmupStableAverage", "patience", self.patience, least=1)
        whole("WarmupStableAverage", "patience_steps", self.patience_steps, least=0)

    def __call__(self, epoch: float, epochs: int) -> float:  # noqa: D102
        return epoch / self.warmup if epoch < self.warmup else 1.0


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
    they learned stays, and they part again.

    Source: FLAME (SIGIR 2026) anneals its transfer from 1 to 1e-5; the rise is ours, as in ``Ramp``.

    Args:
        start: the weights' first moment above 0.
        full: the moment of their full height.
        end: the moment from which on they stay at ``floor``.
        floor: share of the full height, above 0.
        unit: "run", for shares of the run; or "epochs", for a run that ends by itself.

    Raises:
        EnsembleKDError: not 0 <= start <= full <= end, shares of the run above 1, floor outside (0, 1], or another
            unit.

    Examples:
        >>> [Hump(0.0, 0.25, 0.75, floor=1e-4)(epoch, 8) for epoch in (0.0, 1.0, 2.0, 4.0, 6.0, 8.0)]
        [0.0, 0.5, 1.0, 0.01, 0.0001, 0.0001]
        >>> [Hump(2, 4, 8, floor=1e-4, unit="epochs")(epoch, 100) for epoch in (3.0, 4.0, 6.0, 8.0)]
        [0.5, 1.0, 0.01, 0.0001]
    """

    start: float = 0.0
    full: float = 0.2
    end: float = 1.0
    floor: float = 1e-5
    unit: Unit = "run"

    def __post_init__(self) -> None:
        of_run = choice("Hump", "unit", self.unit, get_args(Unit)) == "run"
        end = number("Hump", "end", self.end, least=0, most=1 if of_run else math.inf)
        full = number("Hump", "full", self.full, least=0, most=end)
        number("Hump", "start", self.start, least=0, most=full)
        ratio("Hump", "floor", self.floor, above_zero=True)

    def __call__(self, epoch: float, epochs: int) -> float:  # noqa: D102
        done = epoch / epochs if self.unit == "run" else epoch
        if done < self.full:
            return round(max(0.0, done - self.start) / max(self.full - self.start, 1e-9), 12)
        return round(float(self.floor ** min((done - self.full) / max(self.end - self.full, 1e-9), 1.0)), 12)
