"""A whole training step on Beauty: forward, backward, optimizer, against the paper's way on the same batch.

Both see the same windows, padded to 15. "bucketed" is what ``fit`` does beyond that: the mean over batches of similar
length, so that padding is not computed. The terms of the loss are switched on one by one as well.
"""

from __future__ import annotations

import torch

from benchmarks import recipes
from benchmarks.baseline import Weights
from benchmarks.common import Row, Step, beauty, gflop, interleaved, memory, sig
from benchmarks.limits import matmul_gflops
from ensemble_kd.data import BatchPlan

REFERENCE, FLOAT, BFLOAT = "as the paper writes it, float32", "EnsembleKD, float32", "EnsembleKD, bfloat16"
BUCKETED = 4  # batches of an epoch, from the shortest to the longest
TERMS = {
    "mip": Weights(0, 0, 0, 0),
    "mip ap": Weights(1, 0, 0, 0),
    "mip ap icl": Weights(1, 0.01, 0, 0),
    "mip ap icl ccl": Weights(1, 0.01, 0.01, 0),
    "mip ap icl ccl kd": Weights(),
}


def dtype_of(variant: str) -> torch.dtype:
    return torch.bfloat16 if "bfloat16" in variant else torch.float32


def make(variant: str, d: int, views: int, rows: int, quick: bool, device: str) -> Step:
    """One variant's step, with its model and optimizer; the variants of one size have the same weights and batch."""
    data = beauty(quick)
    item_ids = recipes.batch(data, rows, device)
    model = recipes.ensemble(data, d, views=views, device=device)
    if variant == REFERENCE:
        return recipes.reference_step(model, item_ids)
    return recipes.ensemble_step(model, item_ids, dtype_of(variant))


def bucketed(d: int, views: int, quick: bool, device: str) -> tuple[Step, int]:
    """A step on each of some batches of similar length, spread evenly over an epoch's lengths; and how many."""
    data = beauty(quick)
    plan = BatchPlan(data.train_windows(recipes.WINDOW).to(device), recipes.BATCH, seed=0, epoch=0, bucket=True)
    by_length = sorted(range(len(plan)), key=lambda i: plan[i].shape[1])
    chosen = [by_length[(2 * i + 1) * len(plan) // (2 * BUCKETED)] for i in range(BUCKETED)]
    model = recipes.ensemble(data, d, views=views, device=device)
    steps = [recipes.ensemble_step(model, plan[i], torch.bfloat16) for i in chosen]
    return lambda: [step() for step in steps], len(steps)


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows: ms of a step, times faster than the reference, memory, share of the matrix speed in the products."""
    return width(8 if quick else 64, quick, device) + terms(quick, device)


def width(d: int, quick: bool, device: str) -> list[Row]:
    """The rows of one width."""
    views, b = (2, 16) if quick else (8, recipes.BATCH)
    rows: list[Row] = []
    variants = (REFERENCE, FLOAT, BFLOAT)
    # Before anything is held here: the reference alone needs most of a machine of 24 GiB.
    held = {v: memory(make, (v, 8, 2, 2, True, device), (v, d, views, b, quick, device), device) for v in variants}
    steps = {v: make(v, d, views, b, quick, device) for v in variants}
    several, count = bucketed(d, views, quick, device)
    found = interleaved(f"step, d={d}", {**steps, "bucketed": several}, rounds=2 if quick else 5)
    for variant in variants:
        row: Row = {"d": d, "views": views, "variant": variant, **found[variant].row()}
        row |= found[variant].faster_than(found[REFERENCE])
        row |= held[variant]
        if variant != REFERENCE:  # whose products are the same, and whose step takes too long for one more
            speed = gflop(steps[variant]) / found[variant].best * 1e3
            row["matmul_share"] = sig(speed / matmul_gflops(dtype_of(variant), quick, device), 3)
        rows.append(row)
    mean = type(found["bucketed"])(tuple(ms / count for ms in found["bucketed"].ms))
    row = {"d": d, "views": views, "variant": f"{BFLOAT}, bucketed", **mean.row()}
    return [*rows, row | mean.faster_than(found[REFERENCE])]


def terms(quick: bool, device: str) -> list[Row]:
    """The step at d=64 with one term more each time."""
    data, d, views = beauty(quick), 8 if quick else 64, 2 if quick else 8
    item_ids = recipes.batch(data, 16 if quick else recipes.BATCH, device)
    steps: dict[str, Step] = {}
    for name, weights in TERMS.items():
        model = recipes.ensemble(data, d, views=views, device=device, losses=weights.losses())
        steps[name] = recipes.ensemble_step(model, item_ids)
    found = interleaved("step, terms", steps, rounds=2 if quick else 5)
    return [{"d": d, "views": views, "variant": f"{FLOAT}, {name}", **t.row()} for name, t in found.items()]
