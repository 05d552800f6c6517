"""A whole training step on Beauty: forward, backward, optimizer, against the paper's way on the same batch.

All see the same windows, padded to 15. "by length" is what ``fit`` does beyond that on a CPU: rows of similar length
are encoded together, so that little padding is computed. The terms of the loss are switched on one by one as well.
"""

from __future__ import annotations

import torch

from benchmarks import recipes
from benchmarks.baseline import Weights
from benchmarks.common import Row, Step, beauty, gflop, interleaved, memory, sig
from benchmarks.limits import matmul_gflops
from ensemble_kd.stacking import Backend

REFERENCE, FLOAT, BFLOAT = "as the paper writes it, float32", "EnsembleKD, float32", "EnsembleKD, bfloat16"
BY_LENGTH = f"{BFLOAT}, by length"
VARIANTS = (REFERENCE, FLOAT, BFLOAT, BY_LENGTH)
TERMS = {
    "mip": Weights(0, 0, 0, 0),
    "mip ap": Weights(1, 0, 0, 0),
    "mip ap icl": Weights(1, 0.01, 0, 0),
    "mip ap icl ccl": Weights(1, 0.01, 0.01, 0),
    "mip ap icl ccl kd": Weights(),
}


def dtype_of(variant: str) -> torch.dtype:
    return torch.bfloat16 if "bfloat16" in variant else torch.float32


def backend(quick: bool) -> Backend:
    """What ``fit`` takes; with ``quick`` no trial, which takes longer than all else."""
    return "loop" if quick else "auto"


def make(variant: str, d: int, views: int, rows: int, quick: bool, device: str) -> Step:
    """One variant's step, with its model and optimizer; the variants of one size have the same weights and batch."""
    data = beauty(quick)
    item_ids = recipes.batch(data, rows, device)
    model = recipes.ensemble(data, d, views=views, device=device, backend=backend(quick))
    if variant == REFERENCE:
        return recipes.reference_step(model, item_ids)
    return recipes.ensemble_step(model, item_ids, dtype_of(variant), by_length=variant == BY_LENGTH)


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows: ms of a step, times faster than the reference, memory, share of the matrix speed in the products."""
    return width(8 if quick else 64, quick, device) + terms(quick, device)


def width(d: int, quick: bool, device: str) -> list[Row]:
    """The rows of one width."""
    views, b = (2, 4) if quick else (8, recipes.BATCH)
    rows: list[Row] = []
    # Before anything is held here: the reference alone needs most of a machine of 24 GiB.
    held = {v: memory(make, (v, 8, 2, 2, True, device), (v, d, views, b, quick, device), device) for v in VARIANTS}
    steps = {v: make(v, d, views, b, quick, device) for v in VARIANTS}
    found = interleaved(f"step, d={d}", steps, rounds=5, quick=quick)
    for variant in VARIANTS:
        row: Row = {"d": d, "views": views, "variant": variant, **found[variant].row()}
        row |= found[variant].faster_than(found[REFERENCE])
        row |= held[variant]
        if (
            variant != REFERENCE and not found[variant].error
        ):  # whose products are the same, and whose step takes too long for one more
            speed = gflop(steps[variant]) / found[variant].best * 1e3
            row["matmul_share"] = sig(speed / matmul_gflops(dtype_of(variant), quick, device), 3)
        rows.append(row)
    return rows


def terms(quick: bool, device: str) -> list[Row]:
    """The step at d=64 with one term more each time."""
    data, d, views = beauty(quick), 8 if quick else 64, 2 if quick else 8
    item_ids = recipes.batch(data, 4 if quick else recipes.BATCH, device)
    steps: dict[str, Step] = {}
    for name, weights in TERMS.items():
        model = recipes.ensemble(data, d, views=views, device=device, losses=weights.losses(), backend=backend(quick))
        steps[name] = recipes.ensemble_step(model, item_ids)
    found = interleaved("step, terms", steps, rounds=5, quick=quick)
    return [{"d": d, "views": views, "variant": f"{FLOAT}, {name}", **t.row()} for name, t in found.items()]
