"""The item loss of a step: stored logits and pairwise KD against the fused tiles.

Run `python -m benchmarks.loss [--quick]`.

Every round runs each variant once, forward and backward, so that a busy machine slows all alike; medians and
bests are both shown. Extra memory is the peak of the resident set during a step over that before, in a process of
its own for each variant. On a shared machine `OMP_WAIT_POLICY=passive` keeps the threads from spinning at barriers.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ensemble_kd.fused import compile_status, item_losses

N, TEMPERATURE, KD_WEIGHT = 3, 0.3, 0.01
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def stored(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """What one writes first: all logits in float32, one term per member and per ordered pair."""
    logits = torch.baddbmm(bias[:, None], hidden, weight.mT)
    total = torch.stack([F.cross_entropy(member, targets) for member in logits]).sum()
    for x in range(N):
        for y in range(N):
            if x != y:
                teacher = F.log_softmax(logits[x].detach() / TEMPERATURE, -1)
                student = F.log_softmax(logits[y] / TEMPERATURE, -1)
                total = total + KD_WEIGHT * F.kl_div(student, teacher, log_target=True, reduction="sum") / len(targets)
    return total


def fused(compiled: bool, product_dtype: torch.dtype) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        options: dict[str, Any] = {"kd_weight": KD_WEIGHT, "temperature": TEMPERATURE}
        return item_losses(
            hidden, weight, bias, targets, compiled=compiled, product_dtype=product_dtype, **options
        ).total

    return loss


VARIANTS: dict[str, Loss] = {
    "stored, float32": stored,
    "fused, float32": fused(False, torch.float32),
    "fused, float32, compiled": fused(True, torch.float32),
    "fused, bfloat16": fused(False, torch.bfloat16),
    "fused, bfloat16, compiled": fused(True, torch.bfloat16),
}


def inputs(t: int, d: int, v: int) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, t, d, generator=rng), torch.randn(N, v, d, generator=rng) * 0.2
    leaves = [x.requires_grad_() for x in (hidden, weight, torch.zeros(N, v))]
    return *leaves, torch.randint(0, v, (t,), generator=rng)


def timed_ms(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def train(name: str, tensors: tuple[Tensor, ...]) -> None:
    for x in tensors[:3]:
        x.grad = None
    VARIANTS[name](*tensors).backward()


def resident_mib(field: str) -> float:
    """A field of the kernel's own account of this process: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def extra_mib(name: str, sizes: tuple[int, int, int]) -> float:
    """MiB that a first step of this size adds at its peak; a small step before it has compiled and loaded all code."""
    _, d, v = sizes
    train(name, inputs(2, d, v))
    tensors = inputs(*sizes)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far: a child inherits its parent's
    train(name, tensors)
    return resident_mib("VmHWM") - before


def matmul_gflops(dtype: torch.dtype, side: int) -> float:
    """The machine's own limit: the best of some square products."""
    a = torch.randn(side, side).to(dtype)
    return 2 * side**3 / min(timed_ms(lambda: a @ a) for _ in range(7)) / 1e6


def run(quick: bool) -> list[dict[str, object]]:
    """Time the variants and print a table; rows of sizes, milliseconds (median), ratio, MiB, share of the limit."""
    problems = [(64, 16, 500)] if quick else [(870, 64, 12101), (870, 256, 12101)]
    rounds = 2 if quick else 5
    rows: list[dict[str, object]] = []
    for sizes in problems:
        t, d, v = sizes
        tensors = inputs(*sizes)
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        limits: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
        for i in range(rounds + 1):
            for dtype, found in limits.items():
                found.append(matmul_gflops(dtype, 256 if quick else 2048))
            for name, kept in times.items():
                step_ms = timed_ms(functools.partial(train, name, tensors))
                if i:  # the first round compiles and warms up
                    kept.append(step_ms)
        for name, kept in times.items():
            memory = float("nan")  # where the kernel keeps no such account
            if Path("/proc/self/clear_refs").exists():
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    memory = pool.submit(extra_mib, name, sizes).result()
            median = statistics.median(kept)
            limit = max(limits[torch.bfloat16 if "bfloat16" in name else torch.float32])
            row: dict[str, object] = {"n": N, "t": t, "d": d, "v": v, "variant": name}
            row |= {"step_ms": round(median, 1), "best_ms": round(min(kept), 1), "worst_ms": round(max(kept), 1)}
            plain = times["stored, float32"]
            row |= {"times_faster": round(statistics.median(plain) / median, 1)}
            row |= {"times_faster_best": round(min(plain) / min(kept), 1)}
            row |= {
                "extra_mib": round(memory, 1),
                "matmul_share": round(6 * N * t * d * v / min(kept) / 1e6 / limit, 3),
            }
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    print(f"tiles: {compile_status()}; {torch.get_num_threads()} threads; torch {torch.__version__}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    run(parser.parse_args().quick)
