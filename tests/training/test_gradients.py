"""Losses and gradients that are not finite are named, and clipping goes member by member."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble_kd import EnsembleKD, EnsembleKDError
from ensemble_kd.encoders import SASRec
from ensemble_kd.internal import files
from ensemble_kd.training import FitResult, clip_members_
from tests.training.runs import (
    STEPS,
    V,
    assert_ends_as,
    global_random_state,
    sasrec,
    train,
)


def poison(model: EnsembleKD, step: int) -> Callable[[Mapping[str, Any]], None]:
    """Spoil a weight after a step, as an exploding update would."""

    def callback(entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "step" and entry["step"] == step:
            with torch.no_grad():
                model.item_classifier.bias[1, 5] = math.nan

    return callback


def test_a_loss_that_is_not_finite_names_step_and_term(
    unbroken: tuple[EnsembleKD, FitResult, Path], tmp_path: Path
) -> None:
    model, before = sasrec(), global_random_state()
    with pytest.raises(EnsembleKDError, match=r"^fit: step 7, term 'nip': expected a finite value, got nan\. Lower lr"):
        train(model, output_dir=tmp_path, checkpoint_every_s=1e9, callback=poison(model, 6))
    assert global_random_state() == before
    assert files.load(tmp_path / "last.pt")["progress"]["step"] == STEPS
    model = sasrec()
    assert_ends_as(unbroken, tmp_path, model, train(model, output_dir=tmp_path, resume=True))


def test_weights_that_are_not_finite_reach_no_checkpoint(
    unbroken: tuple[EnsembleKD, FitResult, Path], tmp_path: Path
) -> None:
    model = sasrec()
    with pytest.raises(EnsembleKDError, match=r"^fit: step 6, weights 'item_classifier\.bias': expected finite weigh"):
        train(model, output_dir=tmp_path, callback=poison(model, 6))
    assert files.load(tmp_path / "last.pt")["progress"]["step"] == 5
    model = sasrec()
    assert_ends_as(unbroken, tmp_path, model, train(model, output_dir=tmp_path, resume=True))


@pytest.mark.parametrize(
    ("max_grad_norm", "named"),
    [(5.0, r"step 3, term 'gradient of member 1'"), (None, r"step 3, weights 'item_classifier\.bias'")],
)
def test_a_gradient_that_is_not_finite_is_found(max_grad_norm: float | None, named: str, tmp_path: Path) -> None:
    model, calls = sasrec(), itertools.count(1)

    def explode(gradient: Tensor) -> Tensor | None:
        if next(calls) != 3:
            return None
        gradient = gradient.clone()
        gradient[1] = math.inf
        return gradient

    model.item_classifier.bias.register_hook(explode)
    with pytest.raises(EnsembleKDError, match=f"^fit: {named}"):
        train(model, output_dir=tmp_path, max_grad_norm=max_grad_norm)
    last = files.load(tmp_path / "last.pt")
    assert last["progress"]["step"] == 2
    assert all(bool(torch.isfinite(weights).all()) for weights in last["model"].values())


def test_gradients_are_clipped_member_by_member() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.zeros(3, *shape, requires_grad=True) for shape in ((4, 5), (2,), ())]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * torch.tensor([0.01, 1.0, 100.0]).view(
            3, *[1] * (p.ndim - 1)
        )
    frozen = torch.zeros(3, 2)
    before = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    norms = clip_members_([*parameters, frozen], 2.0)
    for i in range(3):
        plain = [g[i].clone() for g in before]
        twins = [torch.zeros_like(g, requires_grad=True) for g in plain]
        for twin, gradient in zip(twins, plain, strict=True):
            twin.grad = gradient
        expected = nn.utils.clip_grad_norm_(twins, 2.0)
        torch.testing.assert_close(norms[i], expected)
        for p, twin in zip(parameters, twins, strict=True):
            torch.testing.assert_close(p.grad[i], twin.grad, rtol=1e-5, atol=1e-7)  # type: ignore[index]
    assert torch.equal(parameters[0].grad[0], before[0][0])  # type: ignore[index]


def test_what_cannot_be_clipped() -> None:
    with pytest.raises(EnsembleKDError, match=r"^clip_members_: expected parameters with gradients, got none\. Call"):
        clip_members_([torch.zeros(2, 3, requires_grad=True)], 1.0)
    with pytest.raises(EnsembleKDError, match=r"^clip_members_: expected max_norm, a number > 0, got 0\.0\."):
        clip_members_([], 0.0)
    with pytest.raises(EnsembleKDError, match=r"^fit: expected a model with parameters to train, got frozen"):
        train(sasrec().requires_grad_(False), epochs=1)


def test_the_gradient_norm_limits_the_run() -> None:
    def gradient(limit: float | None) -> float:
        model = sasrec()
        train(model, epochs=1, max_grad_norm=limit)
        return max(float(p.grad[i].norm()) for p in model.parameters() for i in range(2))  # type: ignore[index]

    assert gradient(1e-3) <= 1.001e-3 < gradient(None)


def test_a_member_parameter_that_is_a_number_trains() -> None:
    class Scaled(nn.Module):
        causal = True

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = SASRec(V, d_model=8, num_layers=1, max_len=8), nn.Parameter(torch.tensor(1.0))

        def forward(self, item_ids: Tensor) -> Tensor:
            return self.scale * self.inner(item_ids)  # type: ignore[no-any-return]

    model = EnsembleKD(Scaled, n=2, num_items=V, max_len=8)
    train(model, epochs=1)
    assert (model.encoder.scale != 1).all()  # type: ignore[union-attr]
