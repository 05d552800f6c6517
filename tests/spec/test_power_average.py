"""The average of a run's weights, of which step s counts s^power: definition, consequences, and wrong versions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ensemble_kd import functional as F
from ensemble_kd.errors import EnsembleKDError
from tests.spec.strategies import seeds
from tests.spec.test_identities import Identity, close
from tests.spec.zoo import checked_by

RUN: dict[str, Any] = {
    "steps": st.lists(st.integers(1, 60), min_size=1, max_size=6, unique=True).map(sorted),
    "power": st.sampled_from([0.0, 0.5, 1.0, 3.0, 7.0]),
    "seed": seeds,
}


def power_average(average: Tensor, value: Tensor, *, power: float, step: int, since: int, fault: str = "") -> Tensor:
    """The product of the sums' shares, or a wrong version."""
    exponent = power if fault == "power for power + 1" else power + 1
    if fault == "exponential":
        kept = 0.9 ** (step - since) if since else 0.0
    elif fault == "one step at a time":
        kept = (1 - 1 / step) ** exponent
    elif fault == "since of the next step":
        kept = (since / (step + 1)) ** exponent
    else:
        kept = (since / step) ** exponent
    if fault == "first value forgotten" and since == 0:
        kept = 0.5
    if fault == "swapped":
        kept = 1 - kept
    return kept * average + (1 - kept) * value


def averaged(f: Callable[..., Tensor], values: Tensor, steps: list[int], power: float) -> Tensor:
    average = torch.full_like(values[0], 9.0)  # counts nothing
    for value, (since, step) in zip(values, pairwise([0, *steps]), strict=True):
        average = f(average, value, power=power, step=step, since=since)
    return average


def of_steps(steps: list[int], seed: int) -> Tensor:
    return torch.randn(len(steps), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counts_each_step_by_its_power(f: Callable[..., Tensor], steps: list[int], power: float, seed: int) -> None:
    """The weight of a value is what (s / last)^(power + 1) grows by over the steps that it stands for."""
    values, total = of_steps(steps, seed), torch.zeros(3, dtype=torch.float64)
    for value, (since, step) in zip(values, pairwise([0, *steps]), strict=True):
        total = total + (step ** (power + 1) - since ** (power + 1)) * value
    close(averaged(f, values, steps, power), total / steps[-1] ** (power + 1))


def does_not_mind_how_steps_are_grouped(f: Callable[..., Tensor], steps: list[int], power: float, seed: int) -> None:
    """A value that stands for several steps is the same as if it were added after each of them."""
    values, singles = of_steps(steps, seed), list(range(1, steps[-1] + 1))
    repeated = [next(v for v, step in zip(values, steps, strict=True) if single <= step) for single in singles]
    close(averaged(f, values, steps, power), averaged(f, torch.stack(repeated), singles, power))


def is_the_mean_at_power_zero(f: Callable[..., Tensor], steps: list[int], power: float, seed: int) -> None:
    singles = list(range(1, len(steps) + 1))
    values = of_steps(singles, seed)
    close(averaged(f, values, singles, 0.0), values.mean(0))


FAULTS = ["power for power + 1", "exponential", "one step at a time", "since of the next step", "swapped"]
KINDS = [
    (Identity(counts_each_step_by_its_power, F.power_average, RUN), power_average, [*FAULTS, "first value forgotten"]),
    (
        Identity(does_not_mind_how_steps_are_grouped, F.power_average, RUN),
        power_average,
        ["one step at a time", "since of the next step", "swapped", "first value forgotten"],
    ),
    (Identity(is_the_mean_at_power_zero, F.power_average, RUN), power_average, ["power for power + 1", "exponential"]),
]
test_power_average, test_power_average_without_a_fault_passes, test_power_average_mutant = checked_by(KINDS)


def test_half_of_the_weight_lies_on_the_newest_sixth_at_power_three() -> None:
    steps = list(range(1, 1001))
    newest = torch.tensor([[float(step > 841)] for step in steps], dtype=torch.float64)
    assert averaged(F.power_average, newest, steps, 3.0).item() == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": -1.0}, "power, a finite number >= 0"),
        ({"step": 0}, "step, a whole number >= 1"),
        ({"since": 2}, "since"),
        ({"since": -1}, "since"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    every = {"power": 3.0, "step": 2, "since": 1} | options
    with pytest.raises(EnsembleKDError, match=f"power_average: expected {message}"):
        F.power_average(torch.zeros(2), torch.ones(2), **every)
