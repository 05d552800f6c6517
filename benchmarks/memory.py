"""Peak memory of the item loss at a small and a large catalogue, and of a step by its parts.

Stored logits of a million items are not run: by Beauty's own figure they would want tens of GiB.
"""

from __future__ import annotations

import torch

from benchmarks import loss, recipes, step
from benchmarks.common import Row, Step, beauty, memory

FUSED = "fused, float32"


def make_part(part: str, d: int, views: int, rows: int, quick: bool, device: str) -> Step:
    """A part of a float32 step: forward of the loss alone, forward and backward, or all with Adam's first update."""
    data = beauty(quick)
    model = recipes.ensemble(data, d, views=views, device=device, backend=step.backend(quick))
    item_ids = recipes.batch(data, rows, device)
    if part == "forward, no gradient":
        return torch.no_grad()(lambda: model.loss(item_ids))
    if part == "forward, backward":
        return lambda: model.loss(item_ids).total.backward()
    return recipes.ensemble_step(model, item_ids)


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows: MiB at the peak, and above what was there before: inputs, weights and, for a step, the data."""
    rows: list[Row] = []
    d = 8 if quick else 64
    problems = [(256, 12101), (870, 12101), (256, 1_000_000)] if not quick else [(16, 500), (16, 5000)]
    for t, v in problems:
        for name in (loss.STORED, FUSED) if v < 100_000 else (FUSED,):
            found = memory(loss.make, (name, 2, d, min(v, 500), device), (name, t, d, v, device), device)
            rows.append({"what": f"loss, {name}", "n": loss.N, "t": t, "d": d, "v": v, **found})
    views, v = 2, beauty(quick).num_items
    for part in ("forward, no gradient", "forward, backward", "forward, backward, Adam"):
        full = (part, d, views, recipes.BATCH, quick, device)
        found = memory(make_part, (part, 8, views, 2, True, device), full, device)
        rows.append({"what": f"step, {part}", "n": recipes.N, "d": d, "v": v, "views": views, **found})
    full = (step.REFERENCE, d, views, recipes.BATCH, quick, device)
    found = memory(step.make, (step.REFERENCE, 8, views, 2, True, device), full, device)
    row = {"what": f"step, {step.REFERENCE}", "n": recipes.N, "d": d, "v": v, "views": views}
    return [*rows, row | found]
