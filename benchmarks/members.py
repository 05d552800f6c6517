"""What n members cost: the encoders of a training step, forward and backward, backend by backend.

"alone" is one plain module, "separate" n of them in turn: what an ensemble costs without this library. The inputs are
those of a step on Beauty with two views and the anchor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import recipes
from benchmarks.common import Row, Step, beauty, interleaved, sig
from ensemble_kd.stacking import Backend, StackedModule

VIEWS = 3  # two masked ones and the anchor, in one call


def backward_of(run: list[nn.Module], item_ids: Tensor, d_hidden: Tensor) -> Step:
    """Forward and backward of plain modules in turn, with a given gradient of the hidden states (b, l, d)."""

    def step() -> None:
        for module in run:
            module.zero_grad(set_to_none=True)
            module(item_ids).backward(d_hidden)

    return step


def stacked_step(stack: StackedModule, item_ids: Tensor, d_hidden: Tensor) -> Step:
    gradient = d_hidden.expand(len(stack), *d_hidden.shape)

    def step() -> None:
        stack.zero_grad(set_to_none=True)
        stack(item_ids).backward(gradient)

    return step


def compiled_encoder(num_items: int, d: int) -> nn.Module:
    module = recipes.encoder(num_items, d)
    module.compile(dynamic=True)
    return module


def variants(n: int, d: int, num_items: int, item_ids: Tensor, *, compiled: bool) -> dict[str, Step]:
    device = str(item_ids.device.type)
    d_hidden = torch.randn(*item_ids.shape, d, device=device)

    def stack(backend: Backend, *, compile_members: bool = False) -> StackedModule:
        build = compiled_encoder if compile_members else recipes.encoder
        return StackedModule([build(num_items, d) for _ in range(n)], backend=backend).to(device)

    plain: list[nn.Module] = [recipes.encoder(num_items, d).to(device) for _ in range(n)]
    steps = {
        "alone": backward_of(plain[:1], item_ids, d_hidden),
        "separate": backward_of(plain, item_ids, d_hidden),
        "loop": stacked_step(stack("loop"), item_ids, d_hidden),
        "vmap": stacked_step(stack("vmap"), item_ids, d_hidden),
    }
    if compiled:
        steps["loop, compiled"] = stacked_step(stack("loop", compile_members=True), item_ids, d_hidden)
    return steps


def run(quick: bool, device: str = "cpu", compiled: bool = False) -> list[Row]:
    """Rows: ms, in units of one member alone, over n separate modules; ``auto`` is what the library would choose."""
    data = beauty(quick)
    item_ids = recipes.batch(data, 8 if quick else recipes.BATCH, device).repeat(VIEWS, 1)
    rows: list[Row] = []
    for d, n in [(8, 2)] if quick else [(64, 1), (64, 2), (64, 3), (64, 8), (256, 3)]:
        auto = StackedModule([recipes.encoder(data.num_items, 8) for _ in range(n)]).to(device)
        auto(item_ids[:2])
        chosen = next(name for name, _ in auto.decisions.values())
        steps = variants(n, d, data.num_items, item_ids, compiled=compiled)
        found = interleaved(f"members, d={d}, n={n}", steps, rounds=2 if quick else 9)
        for name, times in found.items():
            row: Row = {"d": d, "n": n, "variant": name, **times.row()}
            row["times_alone"] = sig(times.median / found["alone"].median, 3)
            row["times_separate"] = sig(times.median / found["separate"].median, 3)
            rows.append(row | {"auto": "chosen" if name == chosen else None})
    return rows
