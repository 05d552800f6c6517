"""The machine's own limits, so that other figures can be given as fractions of the possible."""

from __future__ import annotations

import functools

import torch

from benchmarks.common import Row, Step, interleaved, sig

DTYPES = (torch.float32, torch.bfloat16)
ROUNDS = 7


def shapes(quick: bool) -> dict[str, tuple[int, int, int]]:
    """(rows, inner, columns) of products: the best case, and the logits of 870 targets over Beauty's catalogue."""
    if quick:
        return {"square": (64, 64, 64), "inner 64": (16, 64, 200), "inner 256": (16, 256, 200)}
    return {"square": (2048, 2048, 2048), "inner 64": (870, 64, 12101), "inner 256": (870, 256, 12101)}


def matmul(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> Step:
    a, b = torch.randn(rows, inner, device=device).to(dtype), torch.randn(columns, inner, device=device).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    return lambda: torch.mm(a, b.t(), out=out)


@functools.cache
def matmul_gflops(dtype: torch.dtype, quick: bool, device: str = "cpu") -> float:
    """The best of some square products: what ``matmul_share`` of other benchmarks is a share of."""
    r, k, c = shapes(quick)["square"]
    best = interleaved("limits", {"square": matmul(r, k, c, dtype, device)}, ROUNDS)["square"].best
    return 2 * r * k * c / best / 1e6


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows: GFLOP/s of matrix products, GB/s read and written by copies, additions and exponentials."""
    steps: dict[str, Step] = {}
    work: dict[str, tuple[str, float]] = {}  # unit, and billions of it in a step
    for name, (r, k, c) in shapes(quick).items():
        for dtype in DTYPES:
            key = f"product, {name}, {str(dtype).removeprefix('torch.')}"
            steps[key], work[key] = matmul(r, k, c, dtype, device), ("GFLOP/s", 2e-9 * r * k * c)
    # A plane beyond every cache, and one within: the tiles of the loss stay within.
    for place, size in {"memory": 1 << 12 if quick else 1 << 26, "cache": 1 << 10 if quick else 1 << 17}.items():
        x, out = torch.rand(size, device=device), torch.empty(size, device=device)
        kernels: dict[str, Step] = {
            "copy": functools.partial(out.copy_, x),
            "add": functools.partial(torch.add, x, 1.0, out=out),
            "exp": functools.partial(torch.exp, x, out=out),
        }
        for name, step in kernels.items():
            key = f"{name}, {place}, float32"
            steps[key], work[key] = step, ("GB/s", 2 * 4e-9 * size)
    return [
        {
            "limit": key,
            "unit": work[key][0],
            "median": sig(work[key][1] / times.median * 1e3),
            "best": sig(work[key][1] / times.best * 1e3),
        }
        for key, times in interleaved("limits", steps, ROUNDS).items()
    ]
