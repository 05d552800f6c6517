"""The pointwise part of a tile, compiled where that works and pays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor

from ensemble_kd.internal import mark_dynamic
from ensemble_kd.losses.formula import Formula, Tile

_COMPILE_FROM = 1 << 22  # elements of all logits of a call: below, a training run hardly earns the compilation back

_status = "not tried"


def compile_status() -> str:
    """Return how tiles run in this process.

    Returns:
        "not tried"; "row kernel", on CUDA with Triton; "compiled"; or "no row kernel: " or "eager: " and the reason.

    Examples:
        >>> compile_status().startswith(("not tried", "row kernel", "no row kernel", "compiled", "eager"))
        True
    """
    return _status


def record(status: str) -> None:
    """Set what ``compile_status`` returns."""
    global _status
    _status = status


def compiled_tile(formula: Formula, *key: object, size: int, compiled: bool | None) -> Tile | None:
    """Return the compiled form of ``formula.tile``, or None if it should run as it is.

    Args:
        formula: the formula.
        key: everything else that needs a compilation of its own: shapes, precisions, the device.
        size: elements of all logits of the call.
        compiled: True: compile, and raise what goes wrong; False: do not; None: compile if it pays, and run the
            tile as it is if that fails.
    """
    pays = size >= _COMPILE_FROM and not _status.startswith("eager")
    if compiled is False or not formula.compiles or (compiled is None and not pays):
        return None

    def tile(
        logits: Tensor, bias: Tensor | None, picked: Tensor, counts: Tensor, weights: Tensor, with_grad: bool
    ) -> tuple[Tensor, ...]:
        global _status
        mark_dynamic(logits, 1)
        mark_dynamic(picked, 1)
        mark_dynamic(counts, 0)
        try:
            result = _compiled(formula, *key, with_grad)(formula, logits, bias, picked, counts, weights, with_grad)
        except torch.OutOfMemoryError:
            raise  # no fault of the compiler's, and the tile as it is would need more
        except Exception as error:
            if compiled:
                raise
            _status = f"eager: {type(error).__name__}: {error}"
            return formula.tile(logits, bias, picked, counts, weights, with_grad)
        _status = "compiled"
        return result

    return tile


@functools.cache
def _compiled(formula: Formula, *key: object) -> Callable[..., tuple[Tensor, ...]]:
    """One compilation per key: torch gives up on a function that it had to compile more than a few times."""
    eager = type(formula).tile
    code = eager.__code__.replace(co_name=f"_tile_{abs(hash((formula, *key)))}")
    clone = FunctionType(code, eager.__globals__)
    # No intermediate plane: everything is computed within the loops over a row.
    limits = ("realize_reads_threshold", "realize_opcount_threshold", "realize_acc_reads_threshold")
    return torch.compile(clone, dynamic=False, options=dict.fromkeys(limits, 1 << 20))
