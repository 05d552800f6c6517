"""The walk over tiles on a device: sums in float32, and tiles of a catalogue's size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ensemble_kd.losses.tiles as tiles
from ensemble_kd.internal import adds_in_float32
from ensemble_kd.losses import item_losses
from tests.device import simulated

pytestmark = pytest.mark.device

N, T, V, D = 2, 64, 37, 8


def problem(device: str) -> tuple[list[Tensor], Tensor]:
    random = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=random) for shape in ((N, T, D), (N, V, D), (N, V))]
    targets = torch.randint(0, V, (T,), generator=random)
    return [x.bfloat16().float().to(device).requires_grad_() for x in leaves], targets.to(device)


def weight_gradient(device: str, product: torch.dtype, dtype: torch.dtype = torch.float32) -> Tensor:
    leaves, targets = problem(device)
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    options: dict[str, Any] = {"kd_weight": 0.5, "temperature": 0.5, "tile_rows": 4, "product_dtype": product}
    item_losses(*leaves, targets, **options).total.backward()
    assert leaves[1].grad is not None
    return leaves[1].grad.cpu().double()


@pytest.mark.parametrize("in_one", [True, False])
def test_products_are_added_in_float32(in_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_one:
        monkeypatch.setattr(tiles, "adds_in_float32", lambda *_: False)
    exact = weight_gradient("cpu", torch.float64, torch.float64)
    with simulated.device() as log:
        assert adds_in_float32(torch.device(simulated.NAME, 0), torch.bfloat16)
        log.clear()
        found = weight_gradient(simulated.NAME, torch.bfloat16)
        per_tile = N * T // 4
        assert log.operations["addmm"] == (per_tile if in_one else 0)
        assert log.operations["mm"] == (2 if in_one else 3) * per_tile
    error = float((found - exact).abs().max() / exact.abs().max())
    assert error < 1e-2


def test_a_tile_of_a_large_catalogue_may_be_as_large_as_the_classifiers_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "_ROWS", 1)
    monkeypatch.setattr(tiles, "_ROWS_BYTES", 1 << 30)
    monkeypatch.setattr(tiles, "_ACCELERATOR_BYTES", 1)
    with simulated.device() as log:
        leaves, targets = problem(simulated.NAME)
        log.clear()
        item_losses(*leaves, targets, product_dtype=torch.bfloat16)
        rows = {rows for rows, columns in log.products if columns == V}
    assert rows == {2 * D}  # float32 gradients (v, d), bfloat16 logits (rows, v)
