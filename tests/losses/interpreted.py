"""Check the row kernel in Triton's interpreter, against the tile as it is; then wrong kernels, which have to fail.

Run with TRITON_INTERPRET=1. Prints JSON: the number of cases, and the cases that each wrong kernel passed before one
refused it; null if none did.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ensemble_kd.losses.row_kernel as row_kernel
from ensemble_kd.losses import compile_status, item_losses
from ensemble_kd.losses.peers import Peers

RowTile = Callable[..., tuple[Tensor, ...]]
Case = tuple[int, float, bool, torch.dtype, int, bool, bool]
BEYOND = 8192  # elements behind the logits, which a kernel without masks would overwrite
# members, τ, KD, precision; then columns (no multiple of a block, several of them), bias, gradients
LAYERS = itertools.product((3, 8, 2, 1), (0.3, 1.0, 2.5), (True, False), (torch.float32, torch.bfloat16))
COLUMNS = ((1500, True, True), (700, False, True), (65, True, False))
CASES: list[Case] = [(*layer, *COLUMNS[(i + i // 6) % 3]) for i, layer in enumerate(LAYERS)]

# A wrong kernel by what is wrong: a text of the kernel, once in its source, and what stands there instead.
WRONG = {
    "nothing": ("total = total *", "total = total *"),
    "largest logit not subtracted": ("shifted = x - higher[:, None]", "shifted = x"),
    "sum not rescaled to a new maximum": ("total = total * tl.exp(top - higher) +", "total = total +"),
    "sum at τ not rescaled": ("total_tempered * shrunk +", "total_tempered +"),
    "temperature forgotten in the gradient": ("scaled = shifted * inverse", "scaled = shifted"),
    "normaliser at 1 for that at τ": ("tl.log(total_tempered)", "normaliser"),
    "last columns not masked": ("x = tl.where(inside[None, :], x, float('-inf'))", "x = x"),
    "written beyond the row": (
        "logits.dtype.element_ty), mask=here)",
        "logits.dtype.element_ty), mask=is_member[:, None] & (column < v + columns)[None, :])",
    ),
    "members that fill up counted": ("z = tl.where(here, tl.exp(", "z = tl.where(True, tl.exp("),
    "mean of the softmaxes is their sum": ("tl.sum(z, 0)[None, :] / N", "tl.sum(z, 0)[None, :]"),
    "KD without its factor n": ("tl.sum(transfer, 0) * N", "tl.sum(transfer, 0)"),
    "KD's gradient without its factor n": ("tl.load(weights + 1) * share * N", "tl.load(weights + 1) * share"),
    "KD of the last block alone": ("transfer += ", "transfer = "),
    "KD's weight for cross-entropy's": ("ce_slope = tl.load(weights) *", "ce_slope = tl.load(weights + 1) *"),
    "gradient without the row's share": ("ce_slope = tl.load(weights) * share", "ce_slope = tl.load(weights)"),
    "the first member's bias for all": ("bias + member[:, None] * v", "bias + member[:, None] * 0"),
    "gradient that ignores the bias": ("if with_bias:", "if False:"),
    "statistics in each other's place": ("tl.store(into, top,", "tl.store(into, normaliser,"),
}  # fmt: skip


def check_case(row_tile: RowTile, case: Case) -> None:
    """Statistics and gradients of padded and strided logits, and what lies between the rows."""
    n, temperature, with_kd, product, v, with_bias, with_grad = case
    random = torch.Generator().manual_seed(CASES.index(case))
    rows, stride, formula = 2, v + 36, Peers(temperature, with_kd and n > 1)
    memory = (torch.randn(n * rows * stride + BEYOND, generator=random) * 5).to(product)
    bias = torch.randn(n, v, generator=random) if with_bias else None
    arguments = (bias, torch.zeros(n, rows), torch.rand(rows, generator=random), torch.tensor([0.7, 0.3]), with_grad)
    mine, plain = memory.clone(), memory.clone()
    mine_logits, logits = (x[: n * rows * stride].view(n, rows, stride)[:, :, :v] for x in (mine, plain))
    found = row_tile(temperature, formula.with_kd, mine_logits, *arguments)
    expected = formula.tile(logits, *arguments)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    bound = {"rtol": 1e-4, "atol": 1e-6} if product == torch.float32 else {"rtol": 2e-2, "atol": 1e-4}
    torch.testing.assert_close(mine_logits, logits, **bound)
    mine_logits.copy_(logits)
    assert torch.equal(mine, plain), "what lies between the rows"
    assert with_grad or torch.equal(mine, memory), "the logits"


def check_extremes(row_tile: RowTile) -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]])
    arguments = (None, torch.zeros(2, 1), torch.ones(1), torch.tensor([1.0, 1.0]), True)
    mine, plain = logits.clone(), logits.clone()
    found, expected = row_tile(0.5, True, mine, *arguments), Peers(0.5, True).tile(plain, *arguments)
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
        options: dict[str, Any] = {"kd_weight": 0.4, "temperature": 0.5, "tile_rows": 3}
        losses = item_losses(*leaves, targets, valid=valid, compiled=compiled, **options)
        losses.total.backward()
        results.append([*losses, *(x.grad for x in leaves)])
        assert compile_status() == "row kernel"
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def with_fault(old: str, new: str, folder: Path) -> RowTile:
    """Return the ``row_tile`` of a copy of the module with a fault; Triton reads a kernel's source from its file."""
    source = Path(str(row_kernel.__file__)).read_text(encoding="utf-8")
    old = old.replace("'", '"')
    at = source.rindex(old)  # what both passes do is wrong in the second
    path = folder / f"wrong_{len(list(folder.iterdir()))}.py"
    path.write_text(source[:at] + new + source[at + len(old) :], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: RowTile = module.row_tile
    return found


def passed(row_tile: RowTile, cases: Iterable[Case]) -> int | None:
    """Return the number of cases that a kernel passes before one refuses it; None if none does."""
    for i, case in enumerate(cases):
        try:
            check_case(row_tile, case)
        except AssertionError:
            return i
    return None


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    for case in CASES:
        check_case(row_kernel.row_tile, case)
    check_extremes(row_kernel.row_tile)
    check_losses()
    with tempfile.TemporaryDirectory() as folder:
        refused = {what: passed(with_fault(*change, Path(folder)), CASES) for what, change in WRONG.items()}
    print(json.dumps({"cases": len(CASES), "wrong": refused}))
