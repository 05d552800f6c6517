"""The pointwise part of a tile as one Triton kernel, for CUDA: both softmaxes, KD, and the gradients in place.

A program has one row of all members. It reads the row twice, the second time from the cache, and writes it once; the
compiled tile is three kernels. Triton is imported only if a tile is on CUDA.
"""

# mypy: disable-error-code="valid-type, name-defined, untyped-decorator"

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ensemble_kd.losses.compiled import record
from ensemble_kd.losses.formula import Tile

ELEMENTS = 4096  # of a block, members times columns: 16 per thread
WARPS = 8
_DEVICES = {"cuda"}
_PRODUCTS = {torch.bfloat16, torch.float16, torch.float32}
_failed = False
tl: Any = None  # triton.language, once the kernel is made


def row_kernel(
    temperature: float, with_kd: bool, *, product: torch.dtype, dtype: torch.dtype, device: torch.device
) -> Tile | None:
    """Return the kernel in the form of ``Formula.tile`` of members that teach each other; None if it does not serve.

    Args:
        temperature: τ of KD.
        with_kd: compute KD.
        product: of the logits.
        dtype: of the statistics.
        device: where the logits are.

    Examples:
        >>> row_kernel(1.0, True, product=torch.bfloat16, dtype=torch.float32, device=torch.device("cpu")) is None
        True
    """
    serves = device.type in _DEVICES and product in _PRODUCTS and dtype == torch.float32
    if not serves or _failed or find_spec("triton") is None:
        return None
    return functools.partial(row_tile, temperature, with_kd)


def or_else(kernel: Tile, plain: Tile) -> Tile:
    """Return a kernel that is replaced if Triton cannot build it: for this call by ``plain``, and then for good."""

    def tile(*args: Any) -> tuple[Tensor, ...]:
        global _failed
        try:
            found = kernel(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # before its launch, so that the logits are as they were
            _failed = True
            record(f"no row kernel: {type(error).__name__}: {error}")
            return plain(*args)
        record("row kernel")
        return found

    return tile


def row_tile(
    temperature: float,
    with_kd: bool,
    logits: Tensor,
    bias: Tensor | None,
    picked: Tensor,
    counts: Tensor,
    weights: Tensor,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    """Return what ``Peers.tile`` does, from one launch of the kernel."""
    n, rows, v = logits.shape
    statistics = torch.empty(3, n, rows, dtype=torch.float32, device=logits.device)
    kd = torch.zeros_like(counts)
    tempered = with_kd and temperature != 1
    kernel()[(rows,)](
        logits,
        logits if bias is None else bias,
        counts,
        weights,
        statistics,
        kd,
        rows,
        v,
        logits.stride(0),
        logits.stride(1),
        1 / temperature,
        N=n,
        with_bias=bias is not None,
        with_kd=with_kd,
        tempered=tempered,
        with_grad=with_grad,
        **block(n),
    )
    maxima, normalisers = statistics[0], statistics[1]
    return maxima, normalisers, statistics[2] if tempered else normalisers, kd


def block(n: int) -> dict[str, int]:
    """Return the sizes of a block for n members.

    Examples:
        >>> block(3)
        {'members': 4, 'columns': 1024, 'num_warps': 8}
    """
    members = 1 << (n - 1).bit_length()
    return {"members": members, "columns": max(64, ELEMENTS // members), "num_warps": WARPS}


@functools.cache
def kernel() -> Any:
    """Return the kernel; Triton finds the names in it among this module's globals."""
    global tl
    import triton
    from triton import language

    tl = language

    @triton.jit
    def tile_of_peers(  # type: ignore[no-untyped-def]
        logits,
        bias,
        counts,
        weights,
        statistics,
        kd,
        rows,
        v,
        plane,
        stride,
        inverse,
        N: tl.constexpr,
        with_bias: tl.constexpr,
        with_kd: tl.constexpr,
        tempered: tl.constexpr,
        with_grad: tl.constexpr,
        members: tl.constexpr,
        columns: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        member = tl.arange(0, members)
        is_member = member < N
        start = logits + member.to(tl.int64)[:, None] * plane + row * stride
        top = tl.full((members,), float("-inf"), tl.float32)
        total = tl.full((members,), 0.0, tl.float32)
        total_tempered = tl.full((members,), 0.0, tl.float32)
        first = 0
        while first < v:
            column = first + tl.arange(0, columns)
            inside = column < v
            here = is_member[:, None] & inside[None, :]
            x = tl.load(start + column[None, :], mask=here, other=0.0).to(tl.float32)
            if with_bias:
                x += tl.load(bias + member[:, None] * v + column[None, :], mask=here, other=0.0)
            x = tl.where(inside[None, :], x, float("-inf"))
            higher = tl.maximum(top, tl.max(x, 1))
            shifted = x - higher[:, None]
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(shifted), 1)
            if tempered:
                shrunk = tl.exp((top - higher) * inverse)
                total_tempered = total_tempered * shrunk + tl.sum(tl.exp(shifted * inverse), 1)
            top = higher
            first += columns
        normaliser = tl.log(total)
        normaliser_tempered = normaliser
        if tempered:
            normaliser_tempered = tl.log(total_tempered)
        into = statistics + member * rows + row
        tl.store(into, top, mask=is_member)
        tl.store(into + N * rows, normaliser, mask=is_member)
        if tempered:
            tl.store(into + 2 * N * rows, normaliser_tempered, mask=is_member)
        if with_kd or with_grad:
            share = tl.load(counts + row)
            ce_slope = tl.load(weights) * share
            kd_slope = tl.load(weights + 1) * share * N
            transfer = tl.full((columns,), 0.0, tl.float32)
            first = 0
            while first < v:
                column = first + tl.arange(0, columns)
                here = is_member[:, None] & (column < v)[None, :]
                x = tl.load(start + column[None, :], mask=here, other=0.0).to(tl.float32)
                if with_bias:
                    x += tl.load(bias + member[:, None] * v + column[None, :], mask=here, other=0.0)
                shifted = x - top[:, None]
                grad = tl.exp(shifted - normaliser[:, None]) * ce_slope
                if with_kd:
                    scaled = shifted * inverse
                    z = tl.where(here, tl.exp(scaled - normaliser_tempered[:, None]), 0.0)
                    pull = z - tl.sum(z, 0)[None, :] / N
                    transfer += tl.sum(tl.where(here, pull * scaled, 0.0), 0)
                    grad += pull * kd_slope
                if with_grad:
                    tl.store(start + column[None, :], grad.to(logits.dtype.element_ty), mask=here)
                first += columns
            if with_kd:
                tl.store(kd + row, tl.sum(transfer, 0) * N)

    return tile_of_peers
