"""Schedules: values at the ends and between, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest

from ensemble_kd import EnsembleKDError
from ensemble_kd.training import Cosine, Hump, Ramp, StepDecay, WarmupStableAverage


def test_schedules() -> None:
    assert [StepDecay(2, 0.5)(e, 9) for e in (0, 1.9, 2, 5)] == [1, 1, 0.5, 0.25]
    cosine = [Cosine(warmup=1, floor=0.2)(e / 4, 5) for e in range(24)]
    assert cosine[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert all(a > b for a, b in itertools.pairwise(cosine[4:21]))
    assert cosine[20:] == [0.2] * 4
    assert [Ramp(0.5, 1.0)(e, 4) for e in (0, 2, 3, 4)] == [0, 0, 0.5, 1]
    assert [Ramp(0.5, 0.5)(e, 4) for e in (1.9, 2, 4)] == [0, 1, 1]
    hump = [Hump(0.2, 0.4, 0.8, floor=1e-4)(e, 10) for e in range(11)]
    assert hump == [0, 0, 0, 0.5, 1, 0.1, 0.01, 0.001, 1e-4, 1e-4, 1e-4]
    assert [Hump(0.5, 0.5, 0.5, floor=0.1)(e, 4) for e in (1.9, 2, 2.1)] == [0, 1, 0.1]
    assert [Hump(0.0, 0.0)(e, 10) for e in (0, 2, 10)] == [1, 0.1, 1e-5]
    by_epochs = Hump(2, 4, 8, floor=1e-4, unit="epochs")
    assert [by_epochs(e, 100) for e in range(11)] == [0, 0, 0, 0.5, 1, 0.1, 0.01, 0.001, 1e-4, 1e-4, 1e-4]
    for made, named in (
        (lambda: Hump(full=0.9, end=0.8), r"Hump: expected full, a number in \[0, 0\.8\], got 0\.9"),
        (lambda: Hump(0.5, 0.4), r"Hump: expected start, a number in \[0, 0\.4\], got 0\.5"),
        (lambda: Hump(floor=0.0), r"Hump: expected floor, a number in \(0, 1\], got 0\.0"),
        (lambda: Hump(end=1.5), r"Hump: expected end, a number in \[0, 1\], got 1\.5"),
        (lambda: Hump(5, 4, 9, unit="epochs"), r"Hump: expected start, a number in \[0, 4\], got 5"),
        (lambda: Hump(1, 2, 9, unit="steps"), "Hump: expected unit"),  # type: ignore[arg-type]
        (lambda: StepDecay(0), "StepDecay: expected every, a whole number >= 1, got 0"),
        (lambda: StepDecay(1, 0.0), "factor, a number in"),
        (lambda: Cosine(-1.0), "Cosine: expected warmup, a finite number >= 0"),
        (lambda: Cosine(floor=math.nan), "floor, a number in"),
        (lambda: Ramp(0.5, 0.4), r"Ramp: expected start, a number in \[0, 0\.4\], got 0\.5"),
        (lambda: Ramp(0.5, 1.1), r"Ramp: expected full, a number in \[0, 1\], got 1\.1"),
        (lambda: Ramp(-0.1, 0.4), "Ramp: expected start, a number in"),
    ):
        with pytest.raises(EnsembleKDError, match=named):
            made()


def test_the_least_patience_is_one_epoch() -> None:
    assert WarmupStableAverage(patience=1).patience == 1
    with pytest.raises(EnsembleKDError, match="expected patience, a whole number >= 1, got 0"):
        WarmupStableAverage(patience=0)
