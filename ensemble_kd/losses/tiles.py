"""What the losses over tiles share: how large tiles are, in which precision, and how their pointwise part is compiled.

A tile is some target rows × the whole catalogue × all members, so its softmaxes are complete, its losses final and its
gradients known at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor

_TILE_BYTES = {"cpu": 12 << 20, "cuda": 512 << 20}  # of one buffer (n, rows, v): about the last-level cache's share
_ROWS, _ROWS_BYTES = 32, 384 << 20  # a tile has this many rows even beyond the cache, but no more than these bytes
_COMPILE_FROM = 1 << 22  # elements of all logits of a call: below, a training run hardly earns the compilation back
_CHUNK_BYTES = 1 << 20  # of one float32 scratch plane in eager mode: small enough to stay in cache between two kernels


class Spread(NamedTuple):
    """Members of an ensemble of which other processes hold some: KD needs no more of those than a sum."""

    n: int  # members in all
    sum_: Callable[[Tensor], Tensor]  # adds up a tensor over the processes, in place


class Plan(NamedTuple):
    """Everything about one call that is not a tensor."""

    ce_weight: float
    kd_weight: float
    temperature: float
    with_kd: bool
    with_grad: bool
    product_dtype: torch.dtype
    tile_rows: int | None
    compiled: bool | None
    spread: Spread | None = None


TileFunction = Callable[..., tuple[Tensor, ...]]
_status = "not tried"


def compile_status() -> str:
    """Say whether the compiled tiles are in use: "not tried", "compiled", or "eager: " and the reason.

    Examples:
        >>> compile_status().startswith(("not tried", "compiled", "eager"))
        True
    """
    return _status


def tile_function(plan: Plan, size: int, key: tuple[object, ...], eager: TileFunction) -> TileFunction:
    """A tile's pointwise part as it is, or its compiled form where that is wanted and works.

    It takes logits (members, rows, v), bias (members, v) or None and counts (rows,) first.
    """
    if plan.compiled is False or (plan.compiled is None and (size < _COMPILE_FROM or _status.startswith("eager"))):
        return eager
    compiled = _compiled_tile(eager, *key, plan.temperature, plan.with_kd, plan.with_grad)

    def tile(*args: Any) -> tuple[Tensor, ...]:
        global _status
        torch._dynamo.maybe_mark_dynamic(args[0], 1)
        for by_row in args[2:]:
            if isinstance(by_row, Tensor) and by_row.shape == args[2].shape:
                torch._dynamo.maybe_mark_dynamic(by_row, 0)
        try:
            result = compiled(*args)
        except Exception as error:
            if plan.compiled:
                raise
            _status = f"eager: {type(error).__name__}: {error}"
            return eager(*args)
        _status = "compiled"
        return result

    return tile


@functools.cache
def _compiled_tile(eager: FunctionType, *key: object) -> TileFunction:
    """One compilation for each key: torch gives up on a function that it had to compile more than a few times."""
    code = eager.__code__.replace(co_name=f"_tile_{abs(hash(key))}")
    clone = FunctionType(code, eager.__globals__, argdefs=eager.__defaults__)
    # No intermediate plane: everything is computed within the loops over a row.
    limits = ("realize_reads_threshold", "realize_opcount_threshold", "realize_acc_reads_threshold")
    return torch.compile(clone, dynamic=False, options=dict.fromkeys(limits, 1 << 20))


def rows_per_tile(plan: Plan, t: int, row_bytes: int, device: torch.device) -> int:
    """Target rows of a tile, where one takes so many bytes for all members; tiles are of even height."""
    # The weights' gradient passes through memory once a tile: that has to pay, even where the cache takes fewer rows.
    enough = min(_ROWS, _ROWS_BYTES // row_bytes)
    rows = min(t, plan.tile_rows or max(1, enough, _TILE_BYTES.get(device.type, _ROWS_BYTES) // row_bytes))
    return -(-t // -(-t // rows))


def rows_per_chunk(rows: int, v: int, device: torch.device, *, eager: bool) -> int:
    """Rows that the pointwise part takes at a time: eager planes, passed over many times, are to stay in the cache."""
    return max(1, min(rows, _CHUNK_BYTES // (v * 4))) if eager and device.type == "cpu" else rows


def add_softmax(shifted: Tensor, softmaxes: list[Tensor], normalisers: list[Tensor]) -> None:
    """Softmax and log Σ exp of rows whose maximum is 0."""
    if torch.compiler.is_compiling():  # loops over a row, where an exponential costs less than a plane of memory
        normalisers.append(shifted.exp().sum(1, keepdim=True).log())
        softmaxes.append((shifted - normalisers[-1]).exp())
    else:  # torch's softmax is one pass, and its largest value 1 / Σ exp
        softmaxes.append(shifted.softmax(1))
        normalisers.append(-softmaxes[-1].amax(1, keepdim=True).log())
