"""The one walk over tiles: losses of logits that are never stored, with gradients computed on the way forward.

A tile is some target rows × the whole catalogue × all networks. So its softmaxes are complete, its losses are final and
its gradients are known at once. A ``Formula`` computes them; the walk knows nothing else about the losses.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ensemble_kd.internal import CACHE_BYTES, add_in_float32_, adds_in_float32
from ensemble_kd.losses.compiled import compiled_tile
from ensemble_kd.losses.formula import Formula, Networks, Plan, Weight, weighted
from ensemble_kd.losses.row_kernel import or_else

_ACCELERATOR_BYTES = 512 << 20  # of one buffer (n, rows, v), at least; on a CPU it fits the cache
_ROWS, _ROWS_BYTES = 32, 384 << 20  # a tile has this many rows even beyond the cache, but no more than these bytes
_FLOAT16_ROWS = 512  # rows of gradient 1 whose sum, times hidden states of about 100, float16 has room for
_ALIGNED = 64  # elements; a row of logits in an accelerator's memory begins at a multiple of them
_CHUNK_BYTES = 1 << 20  # of one float32 scratch plane in eager mode: small enough to stay in cache between two kernels


def walk(
    plan: Plan,
    learners: Networks,
    teachers: Networks | None,
    targets: Tensor,
    valid: Tensor | None,
    further: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Return the total, the mean of each loss, and the gradients of the total in the learners."""
    networks = [learners] if teachers is None else [learners, teachers]
    (n, t, _), v, device = learners.hidden.shape, learners.weight.shape[1], learners.hidden.device
    dtype = torch.float64 if torch.float64 in (learners.hidden.dtype, learners.weight.dtype) else torch.float32
    product, formula = plan.product_dtype, plan.formula
    number: Tensor | float = t
    if valid is None:
        counts = torch.full((t,), 1 / t, dtype=dtype, device=device)
    else:
        number = valid.sum().clamp(min=1)
        counts = valid.to(dtype) / number
        # A padded row may hold anything, NaN included: 0 · NaN would reach the weights.
        networks = [network._replace(hidden=network.hidden.masked_fill(~valid[:, None], 0)) for network in networks]
        targets = targets.masked_fill(~valid, 0)
    inputs = [x for network in networks for x in network.hidden.detach().to(product)]
    classifiers = [x for network in networks for x in network.weight.detach().to(product)]
    biases = [network.bias.detach() for network in networks if network.bias is not None]
    if further is not None and not biases:
        biases = [further.new_zeros(len(inputs), v)]
    offsets = (
        torch.cat([x.to(dtype) for x in (*biases, *([] if further is None else [further[None]]))]) if biases else None
    )

    # In a cache of one size, fewer networks have larger tiles, whose products are faster. So those that do not meet are
    # walked apart. On an accelerator tiles are large anyway, and launches cost more.
    parts = formula.parts(n) if device.type == "cpu" else [(range(n), formula)]
    planes = [[*own, *range(n, len(inputs))] for own, _ in parts]
    large = 0 if device.type == "cpu" else learners.weight.numel() * dtype.itemsize
    heights = [rows_per_tile(plan.tile_rows, t, len(p) * v * product.itemsize, device, large) for p in planes]
    gain = gain_for(product, max(heights), number)
    shares = counts * gain
    # Products on an accelerator's fast path need rows that begin at a multiple of 16 bytes. What fills up is 0, since
    # kernels may read it: oneDNN's product of bfloat16 does, and multiplies it by 0.
    stride = v if device.type == "cpu" else -(-v // _ALIGNED) * _ALIGNED
    make = torch.empty if stride == v else torch.zeros
    size = max(len(p) * rows for p, rows in zip(planes, heights, strict=True)) * stride
    buffer = make(size, dtype=product, device=device)
    # Filled on the device: copying them there would wait for it.
    slopes = formula.slopes(plan.weights)
    weights = torch.stack([_on_device(slope, dtype, device) for slope in slopes])
    grads = _Gradients(learners, needs, dtype, product)
    call = _Call(plan, targets, shares, weights, buffer, stride, grads)
    found: list[list[Tensor]] = []
    for (own, its_formula), p, rows in zip(parts, planes, heights, strict=True):
        bias = offsets if offsets is None or len(p) == len(inputs) else offsets[[*p, *range(len(inputs), len(offsets))]]
        part = _Part(its_formula, own, [inputs[i] for i in p], [classifiers[i] for i in p], bias, rows)
        found.append([torch.cat(each, dim=-1) @ counts for each in zip(*_tiles(call, part), strict=True)])

    joined = [i for own, _ in parts for i in own]
    places = [joined.index(i) for i in range(n)]
    means = []
    for each in zip(*found, strict=True):
        if len(each) == 1:
            means.append(each[0])
        elif each[0].ndim == 0:  # between networks
            means.append(torch.stack(each).sum())
        else:  # one per network
            means.append(torch.cat(each)[places])
    parts_of_total = [weighted(weight, mean.sum()) for weight, mean in zip(plan.weights, means, strict=True)]
    return functools.reduce(torch.add, parts_of_total), means, grads.finished(learners, gain)


class _Call(NamedTuple):
    """All parts of a call have this in common."""

    plan: Plan
    targets: Tensor  # (t,)
    shares: Tensor  # (t,)
    weights: Tensor  # a slope per loss
    buffer: Tensor  # for the logits of a tile
    stride: int  # between their rows
    grads: _Gradients


class _Part(NamedTuple):
    """Networks that share their tiles: learners, and all teachers behind them."""

    formula: Formula
    own: Sequence[int]  # the learners' numbers among all
    inputs: list[Tensor]  # (t, d) of each
    classifiers: list[Tensor]  # (v, d) of each
    offsets: Tensor | None  # (networks, v), or (networks + 1, v) for a formula that takes a further row
    rows: int  # of a tile


def _tiles(call: _Call, part: _Part) -> list[tuple[Tensor, ...]]:
    """Return the losses per row, tile by tile, and add up the gradients."""
    plan, targets, shares, weights, buffer, stride, grads = call
    formula, own, inputs, classifiers, offsets, rows = part
    p, t, v = len(inputs), len(targets), len(classifiers[0])
    device, product, dtype = buffer.device, buffer.dtype, shares.dtype
    key = (p, v, dtype, product, offsets is None, device.type)
    kernel = formula.kernel(product=product, dtype=dtype, device=device) if plan.compiled is None else None
    compiled = None if kernel else compiled_tile(formula, *key, size=p * t * v, compiled=plan.compiled)
    function = or_else(kernel, formula.tile) if kernel else compiled or formula.tile
    chunk = rows_per_chunk(rows, v, device, eager=compiled is None)
    everyone = torch.arange(p, device=device)[:, None]
    n, losses = len(own), []
    for start in range(0, t, rows):
        stop = min(start + rows, t)
        logits = buffer[: p * (stop - start) * stride].view(p, stop - start, stride)[:, :, :v]
        for i in range(p):
            torch.mm(inputs[i][start:stop], classifiers[i].t(), out=logits[i])
        for low in range(start, stop, chunk):
            high = min(low + chunk, stop)
            some, at, share = logits[:, low - start : high - start], targets[low:high], shares[low:high]
            row = torch.arange(high - low, device=device)
            picked = some[everyone, row, at].to(dtype)
            if offsets is not None:
                picked = _plus(picked, offsets[:, at])
            statistics = function(some, offsets, picked, share, weights, plan.with_grad)
            found, grad = formula.at_target(picked, statistics, share, weights, plan.with_grad)
            losses.append(found)
            if grad is not None:
                some[everyone[:n], row, at] = grad.to(product)
        for i, number in enumerate(own):
            grads.add(number, slice(start, stop), logits[i], inputs[i][start:stop], classifiers[i])
    return losses


def _on_device(slope: Weight, dtype: torch.dtype, device: torch.device) -> Tensor:
    return slope.to(dtype) if isinstance(slope, Tensor) else torch.full((), slope, dtype=dtype, device=device)


def _plus(picked: Tensor, offsets: Tensor) -> Tensor:
    """Add the networks' rows; a further one follows."""
    own = len(picked)
    return picked.add_(offsets) if len(offsets) == own else torch.cat([picked.add_(offsets[:own]), offsets[own:]])


class _Gradients:
    """The learners' gradients, added up over tiles."""

    def __init__(
        self, learners: Networks, needs: tuple[bool, bool, bool], dtype: torch.dtype, product: torch.dtype
    ) -> None:
        (n, t, d), v, device = learners.hidden.shape, learners.weight.shape[1], learners.hidden.device
        self.hidden = torch.empty(n, t, d, dtype=product, device=device) if needs[0] else None
        self.weight = torch.zeros(n, v, d, dtype=dtype, device=device) if needs[1] else None
        self.bias = torch.zeros(n, v, dtype=dtype, device=device) if needs[2] else None
        rounds = needs[1] and product != dtype  # a product is rounded before it is added, unless one kernel does both
        self.in_one = rounds and dtype == torch.float32 and device.type != "cpu" and adds_in_float32(device, product)
        by_parts = rounds and not self.in_one
        self.part = torch.empty(n, v, d, dtype=product, device=device) if by_parts else None

    def add(self, i: int, rows: slice, grad: Tensor, inputs: Tensor, classifier: Tensor) -> None:
        """Add the gradients of learner i's factors, given ``grad`` (rows, v), the one of its logits."""
        if self.hidden is not None:
            torch.mm(grad, classifier, out=self.hidden[i, rows])
        if self.weight is not None and self.part is not None:
            torch.mm(grad.t(), inputs, out=self.part[i])
            self.weight[i] += self.part[i]
        elif self.weight is not None and self.in_one:
            add_in_float32_(self.weight[i], grad.t(), inputs)
        elif self.weight is not None:
            self.weight[i].addmm_(grad.t(), inputs)
        if self.bias is not None:
            self.bias[i] += grad.sum(0)  # added up in float32, rounded once a tile like the weights' part

    def finished(self, learners: Networks, gain: Tensor | float) -> list[Tensor | None]:
        """Return the gradients in the precision of their tensors, without the gain."""
        sums = (self.hidden, self.weight, self.bias)
        cast = [None if x is None or y is None else x.to(y.dtype) for x, y in zip(sums, learners, strict=True)]
        if not (isinstance(gain, float) and gain == 1):
            for grad in cast:
                if grad is not None:
                    grad.div_(gain)
        return cast


def gain_for(product: torch.dtype, rows: int, number: Tensor | float) -> Tensor | float:
    """Return the factor by which a tile's gradients are larger than those of the mean over ``number`` targets.

    It is 1, except for float16. There a probability over thousands of targets would be rounded to 0, so the gradients
    are those of the sum over targets; but in a tile of many rows they are smaller, since their sum must not overflow.
    """
    return number * min(1.0, _FLOAT16_ROWS / rows) if product == torch.float16 else 1.0


def rows_per_tile(wanted: int | None, t: int, row_bytes: int, device: torch.device, large: int = 0) -> int:
    """Return the number of target rows per tile, all of about one height.

    Args:
        wanted: by the user, or None.
        t: rows in all.
        row_bytes: of a row of all networks.
        device: where the tile lies.
        large: bytes that a tile may have in any case. On an accelerator a large catalogue's classifiers and their
            gradient pass through memory once a tile, so a tile may be as large as that gradient.
    """
    # The weights' gradient passes through memory once a tile: that has to pay, even where the cache takes fewer rows.
    enough = min(_ROWS, _ROWS_BYTES // row_bytes)
    size = CACHE_BYTES if device.type == "cpu" else max(large, _ACCELERATOR_BYTES)
    rows = min(t, wanted or max(1, enough, size // row_bytes))
    return -(-t // -(-t // rows))


def rows_per_chunk(rows: int, v: int, device: torch.device, *, eager: bool) -> int:
    """Return the rows per call of the pointwise part. Eager planes are read many times, so they fit in the cache."""
    return max(1, min(rows, _CHUNK_BYTES // (v * 4))) if eager and device.type == "cpu" else rows
