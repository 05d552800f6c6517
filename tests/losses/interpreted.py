"""Check the row kernel in Triton's interpreter, against the tile as it is. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools
import os

import torch

import ensemble_kd.losses.row_kernel as row_kernel
from ensemble_kd.losses import compile_status, item_losses
from ensemble_kd.losses.items import Peers

CASES = list(itertools.product((1, 2, 3, 8), (1.0, 0.3, 2.5), (True, False), (torch.float32, torch.bfloat16)))


def check_tiles() -> int:
    """Statistics and gradients of padded and strided logits; columns that are no multiple of a block."""
    random = torch.Generator().manual_seed(0)
    for n, temperature, with_kd, product in CASES:
        for v, with_bias, with_grad in ((700, True, True), (1500, False, True), (65, True, False)):
            rows, formula = 2, Peers(temperature, with_kd and n > 1)
            padded = (torch.randn(n, rows, v + 36, generator=random) * 5).to(product)
            bias = torch.randn(n, v, generator=random) if with_bias else None
            arguments = (bias, torch.rand(rows, generator=random), torch.tensor([0.7, 0.3]), with_grad)
            mine, plain = padded.clone(), padded.clone()
            found = row_kernel.row_tile(temperature, formula.with_kd, mine[:, :, :v], *arguments)
            expected = formula.tile(plain[:, :, :v], *arguments)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
            bound = {"rtol": 1e-4, "atol": 1e-6} if product == torch.float32 else {"rtol": 2e-2, "atol": 1e-4}
            torch.testing.assert_close(mine, plain, **bound)
            assert torch.equal(mine[:, :, v:], padded[:, :, v:])  # what lies between the rows
            assert with_grad or torch.equal(mine, padded)
    return len(CASES)


def check_extremes() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]])
    arguments = (None, torch.ones(1), torch.tensor([1.0, 1.0]), True)
    mine, plain = logits.clone(), logits.clone()
    found, expected = row_kernel.row_tile(0.5, True, mine, *arguments), Peers(0.5, True).tile(plain, *arguments)
    for a, b in zip((*found, mine), (*expected, plain), strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a, b)


def check_losses() -> None:
    """The whole call, which takes the kernel by itself where it serves."""
    random = torch.Generator().manual_seed(1)
    tensors = [torch.randn(*shape, generator=random) for shape in ((3, 7, 4), (3, 90, 4), (3, 90))]
    targets, valid = torch.randint(0, 90, (7,), generator=random), torch.arange(7) != 3
    row_kernel._DEVICES.add("cpu")
    results = []
    for compiled in (None, False):
        leaves = [x.clone().requires_grad_() for x in tensors]
        options = {"kd_weight": 0.4, "temperature": 0.5, "tile_rows": 3, "valid": valid, "compiled": compiled}
        losses = item_losses(*leaves, targets, **options)
        losses.total.backward()
        results.append([*losses, *(x.grad for x in leaves)])
        assert compile_status() == "row kernel"
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    print(check_tiles(), "cases")
    check_extremes()
    check_losses()
