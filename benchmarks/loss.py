"""The item loss of a step: stored logits and pairwise KD against the fused tiles, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baseline import pairwise_kd
from benchmarks.common import Row, Step, interleaved, memory, sig
from benchmarks.limits import matmul_gflops
from ensemble_kd.losses import compile_status, item_losses

N, TEMPERATURE, KD_WEIGHT = 3, 0.3, 0.01
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
STORED = "stored, float32"
CHOSEN = "fused, bfloat16, as the library chooses"  # on CUDA the row kernel, if Triton is there


def stored(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The version that one writes first: all logits in float32, one term per member and per ordered pair."""
    logits = torch.baddbmm(bias[:, None], hidden, weight.mT)
    total = torch.stack([F.cross_entropy(member, targets) for member in logits]).sum()
    return total + KD_WEIGHT * pairwise_kd(list(logits), TEMPERATURE)


def fused(compiled: bool | None, product_dtype: torch.dtype) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        options: dict[str, Any] = {"kd_weight": KD_WEIGHT, "temperature": TEMPERATURE}
        return item_losses(
            hidden, weight, bias, targets, compiled=compiled, product_dtype=product_dtype, **options
        ).total

    return loss


VARIANTS: dict[str, Loss] = {
    STORED: stored,
    "fused, float32": fused(False, torch.float32),
    "fused, float32, compiled": fused(True, torch.float32),
    "fused, bfloat16": fused(False, torch.bfloat16),
    "fused, bfloat16, compiled": fused(True, torch.bfloat16),
    CHOSEN: fused(None, torch.bfloat16),
}


def inputs(t: int, d: int, v: int, device: str = "cpu") -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, t, d, generator=rng), torch.randn(N, v, d, generator=rng) * 0.2
    leaves = [x.to(device).requires_grad_() for x in (hidden, weight, torch.zeros(N, v))]
    return *leaves, torch.randint(0, v, (t,), generator=rng).to(device)


def train(name: str, tensors: tuple[Tensor, ...]) -> None:
    for x in tensors[:3]:
        x.grad = None
    VARIANTS[name](*tensors).backward()


def make(name: str, t: int, d: int, v: int, device: str) -> Step:
    return functools.partial(train, name, inputs(t, d, v, device))


def run(quick: bool, device: str = "cpu", compiled: bool = True) -> list[Row]:
    """Rows: sizes, ms, times faster than stored logits, MiB, share of the matrix speed in the products."""
    problems = [(64, 16, 500)] if quick else [(870, 64, 12101), (870, 256, 12101)]
    rows: list[Row] = []
    for t, d, v in problems:
        steps = {name: make(name, t, d, v, device) for name in VARIANTS if compiled or "compiled" not in name}
        found = interleaved(f"loss, d={d}", steps, rounds=5, quick=quick)
        for name, times in found.items():
            row: Row = {"n": N, "t": t, "d": d, "v": v, "variant": name, **times.row()}
            row |= times.faster_than(found[STORED])
            row |= memory(make, (name, 2, d, v, device), (name, t, d, v, device), device)
            if not times.error:
                limit = matmul_gflops(torch.bfloat16 if "bfloat16" in name else torch.float32, quick, device)
                row["matmul_share"] = sig(6 * N * t * d * v / times.best / 1e6 / limit, 3)
            if name.endswith("compiled") or name == CHOSEN:
                row["tiles"] = compile_status()
            rows.append(row)
    return rows
