"""The library on builds of torch that this machine may not have."""

from __future__ import annotations

import pytest
import torch

from ensemble_kd.internal import accelerator_devices, random_state, seeded, set_random_state
from ensemble_kd.training import best_device


def no_driver() -> None:
    raise RuntimeError("Found no NVIDIA driver on your system.")


@pytest.mark.parametrize("function", ["current_accelerator", "device_count"])
def test_a_cuda_build_without_a_driver(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, function, no_driver)
    assert accelerator_devices() == ("cuda", range(0))


def test_seeded_on_a_machine_without_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemble_kd.internal.seeding.accelerator_devices", lambda: ("cuda", range(0)))
    before = torch.get_rng_state()
    with seeded(1):
        first = torch.rand(3)
    with seeded(1):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)


class Accelerator:
    """A module such as ``torch.mps``: two devices, each with a generator."""

    def __init__(self) -> None:
        self.states = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)]

    def get_rng_state(self, device: int) -> torch.Tensor:
        return self.states[device].clone()

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        self.states[device] = state


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_random_states_of_every_kind_of_accelerator(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Accelerator()
    monkeypatch.setattr(torch, "get_device_module", lambda asked: {kind: there}[asked])
    monkeypatch.setattr("ensemble_kd.internal.seeding.accelerator_devices", lambda: (kind, range(2)))
    state = random_state()
    there.states = [torch.zeros(1, dtype=torch.uint8)] * 2
    set_random_state(state)
    assert [int(one) for one in there.states] == [1, 2]
    monkeypatch.setattr("ensemble_kd.internal.seeding.accelerator_devices", lambda: (kind, range(1)))
    there.states = [torch.zeros(1, dtype=torch.uint8)]
    set_random_state(state)  # on a machine with fewer
    assert [int(one) for one in there.states] == [1]


@pytest.mark.parametrize(("kind", "count", "expected"), [("mps", 1, "mps"), ("xpu", 2, "xpu"), ("cuda", 0, "cpu")])
def test_the_best_device(kind: str, count: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemble_kd.training.device.accelerator_devices", lambda: (kind, range(count)))
    assert best_device() == torch.device(expected)
