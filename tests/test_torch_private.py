"""The library on builds of torch that this machine may not have."""

from __future__ import annotations

import pytest
import torch

from ensemble_kd.internal import accelerator_devices, seeded


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
