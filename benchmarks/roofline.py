"""An estimate of the item loss on an H100, where there is none: the code runs on shapes, and a roofline times it.

Every operation of a forward and a backward pass counts as one kernel. It takes the longer of two times: that of its
bytes at the memory's rate, and that of its products at the tensor cores' rate, as the data sheet has both. So an
estimate is a lower bound that leaves out launches, caches, and products that fall short of the peak, as those of odd
width do. What it shows is the part of the time that the products have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import Row, sig
from ensemble_kd.losses import item_losses

H100_BYTES = 3.35e12  # a second, SXM
H100_FLOPS = {torch.bfloat16: 989e12, torch.float32: 67e12}  # a second; TF32 is off, as torch has it
N = 3
TILE_BYTES = 512 << 20  # of the tiles before they grew with the catalogue
SIZES = ((870, 12101, 256), (20_000, 12101, 64), (20_000, 12101, 256), (20_000, 1_000_000, 256))  # targets, items, d
FREE = ("empty", "detach", "alias", "is_", "lift", "_local_scalar")  # beginnings of names that launch nothing
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "mv"}
PICKS = {"index", "gather", "index_select", "index_put_"}  # read as much as they write, not all of their input


@dataclass
class Cost:
    """Kernels, bytes, operations of products, and the seconds of the roofline."""

    kernels: int = 0
    moved: int = 0
    flops: int = 0
    products_s: float = 0.0
    seconds: float = 0.0

    def add(self, moved: int, flops: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        products_s = flops / H100_FLOPS[dtype]
        self.kernels, self.moved, self.flops = self.kernels + 1, self.moved + moved, self.flops + flops
        self.products_s += products_s
        self.seconds += max(moved / H100_BYTES, products_s)


class Meter(TorchDispatchMode):
    """Adds up the cost of every operation within the block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = Cost()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith(FREE) or func.is_view:
            return out
        read = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        written = sum(x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor))
        if name in PICKS:
            self.cost.add(2 * (read[-1].nbytes if name == "index_put_" else written))
        elif name in PRODUCTS:
            rows, columns = read[-2:]
            flops = 2 * rows.numel() * (columns.shape[-1] if columns.ndim > 1 else 1)
            self.cost.add(sum(x.nbytes for x in read) + written, flops, rows.dtype)
        else:
            read = read[1:] if name == "copy_" else read
            self.cost.add(sum(x.nbytes for x in read) + written)
        return out


def one_kernel(meter: Meter, *args: Any) -> tuple[Tensor, ...]:
    """Stand for the row kernel, which reads a row from memory once (then from the cache) and writes it once."""
    _, _, logits, *_, counts, _, with_grad = args
    meter.cost.add(logits.nbytes * (2 if with_grad else 1))
    rows = torch.empty(logits.shape[:2], dtype=torch.float32, device=logits.device)
    return rows, rows, rows, torch.empty_like(counts)


def one_sum(meter: Meter, total: Tensor, left: Tensor, right: Tensor) -> None:
    """Stand for a product that is added to a float32 sum in one kernel."""
    meter.cost.add(2 * total.nbytes + left.nbytes + right.nbytes, 2 * left.numel() * right.shape[1], left.dtype)


@contextmanager
def with_kernels(meter: Meter, kernel: bool, in_one: bool) -> Iterator[None]:
    """Have the device of shapes alone take, or not take, what is on CUDA."""
    with ExitStack() as stack:
        # Autocast knows no such device, and users may not pass shapes alone.
        stack.enter_context(patch("torch.autocast", lambda *_, **__: nullcontext()))
        for module in ("items", "autograd"):
            stack.enter_context(patch(f"ensemble_kd.losses.{module}.tensor", lambda *_: None))
        tiles: dict[str, Any] = {
            "adds_in_float32": lambda *_: in_one,
            "add_in_float32_": lambda *args: one_sum(meter, *args),
        }
        stack.enter_context(patch.multiple("ensemble_kd.losses.tiles", **tiles))
        if kernel:
            standing: dict[str, Any] = {"row_tile": lambda *args: one_kernel(meter, *args), "find_spec": lambda _: True}
            stack.enter_context(patch.multiple("ensemble_kd.losses.row_kernel", _DEVICES={"meta"}, **standing))
        yield


def estimate(t: int, v: int, d: int, *, kernel: bool, in_one: bool, tile_rows: int | None) -> Row:
    """A forward and a backward pass in bfloat16 with KD."""
    shapes = ((N, t, d), (N, v, d), (N, v))
    hidden, weight, bias = (torch.empty(*shape, device="meta", requires_grad=True) for shape in shapes)
    targets, meter = torch.empty(t, dtype=torch.int64, device="meta"), Meter()
    options: dict[str, Any] = {"kd_weight": 0.01, "temperature": 0.3, "product_dtype": torch.bfloat16}
    with with_kernels(meter, kernel, in_one), meter:
        compiled = None if kernel else False
        total = item_losses(hidden, weight, bias, targets, tile_rows=tile_rows, compiled=compiled, **options).total
        total.backward()
    cost = meter.cost
    return {
        "kernels": cost.kernels,
        "gb": sig(cost.moved / 1e9, 3),
        "tflop": sig(cost.flops / 1e12, 3),
        "products_ms": sig(cost.products_s * 1e3, 3),
        "estimated_ms": sig(cost.seconds * 1e3, 3),
        "products_share": sig(cost.products_s / cost.seconds, 2),
    }


def run(quick: bool) -> list[Row]:
    """Rows: four sizes before and after what serves an accelerator, all of them estimated."""
    rows: list[Row] = []
    for t, v, d in ((40, 300, 8),) if quick else SIZES:
        before = math.ceil(t / math.ceil(t / max(1, min(t, TILE_BYTES // (N * v * 2)))))
        variants: dict[str, dict[str, Any]] = {
            "eager tiles": {"kernel": False, "in_one": False, "tile_rows": before},
            "row kernel": {"kernel": True, "in_one": False, "tile_rows": before},
            "row kernel, float32 sums": {"kernel": True, "in_one": True, "tile_rows": before},
            "as it is now": {"kernel": True, "in_one": True, "tile_rows": None},
        }
        for name, options in variants.items():
            found = estimate(t, v, d, **options)
            rows.append({"n": N, "targets": t, "v": v, "d": d, "variant": name, **found})
    return rows
