"""Rows of different lengths in one flat tensor: slices of them as left-padded rectangles, without a loop over rows."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import tensor, whole

MOST_COLUMNS = 1 << 31
Prefixes: TypeAlias = Literal["none", "one", "all"]


def keep_first(items: Tensor, offsets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the oldest entries of each row, of which it has as many.

    Args:
        items: (total,) int64, row after row.
        offsets: (rows + 1,) int64; row u is ``items[offsets[u]:offsets[u + 1]]``.
        counts: (rows,) int64, how many entries of each row to keep.

    Returns:
        The shorter (items, offsets).

    Examples:
        >>> keep_first(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 2, 5]), torch.tensor([0, 2]))
        (tensor([3, 4]), tensor([0, 0, 2]))
    """
    lengths = offsets.diff()
    ends = torch.repeat_interleave(offsets[:-1] + counts, lengths)
    kept = items[torch.arange(int(offsets[0]), int(offsets[-1])) < ends]
    return kept, torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def keep_last(items: Tensor, offsets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the newest entries of each row, of which it has as many; arguments as of ``keep_first``.

    Examples:
        >>> keep_last(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 2, 5]), torch.tensor([1, 2]))
        (tensor([2, 4, 5]), tensor([0, 1, 3]))
    """
    lengths = offsets.diff()
    starts = torch.repeat_interleave(offsets[1:] - counts, lengths)
    kept = items[torch.arange(int(offsets[0]), int(offsets[-1])) >= starts]
    return kept, torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def left_padded(items: Tensor, ends: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Return the entries ``items[end - length : end]`` of each row, at the right of (rows, width), zeros on the left.

    Args:
        items: (total,) int64.
        ends: (rows,) int64.
        lengths: (rows,) int64, at most ``width``.
        width: number of columns.

    Returns:
        (rows, width) int64.

    Raises:
        EnsembleKDError: an argument that cannot be used.

    Examples:
        >>> left_padded(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 4]), torch.tensor([1, 2]), 3)
        tensor([[0, 0, 1],
                [0, 3, 4]])
    """
    sizes: dict[str, int] = {}
    tensor("left_padded", "items", items, "total", "whole", empty=True)
    for name, given in (("ends", ends), ("lengths", lengths)):
        tensor("left_padded", name, given, "rows", "int64", sizes, empty=True)
    width = whole("left_padded", "width", width, least=1, most=MOST_COLUMNS)
    if len(ends) and not (int(ends.min()) >= 0 and int(ends.max()) <= len(items)):
        got = f"{int(ends.min())}..{int(ends.max())}"
        raise EnsembleKDError("left_padded", f"ends in 0..{len(items)}", got, "A row ends before items[end].")
    if len(lengths) and not (int(lengths.min()) >= 0 and int(lengths.max()) <= width):
        got = f"{int(lengths.min())}..{int(lengths.max())}"
        raise EnsembleKDError("left_padded", f"lengths in 0..{width}", got, "Cut longer rows at their newest entries.")
    # A sliding view of the flat items: entry `end` is the window of `width` items that ends there. No index matrix.
    sliding = torch.nn.functional.pad(items, (width, 0)).unfold(0, width, 1)
    return sliding[ends].masked_fill_(torch.arange(width) < (width - lengths).unsqueeze(1), 0)


def window_spans(starts: Tensor, totals: Tensor, width: int, step: int) -> tuple[Tensor, Tensor]:
    """Return the ends and lengths, (w,) and (w,), of windows from the newest back by ``step``, and of the oldest one.

    A row of at most ``width`` entries is one window; an empty row gives none.

    Args:
        starts: (rows,) int64, the place of each row's first entry.
        totals: (rows,) int64, the number of its entries.
        width: length of a window.
        step: distance between the starts of neighbouring windows.

    Examples:
        >>> window_spans(torch.tensor([0, 1]), torch.tensor([1, 5]), 3, 2)
        (tensor([1, 4, 6]), tensor([1, 3, 3]))
    """
    starts, totals = starts[totals > 0], totals[totals > 0]
    spare = (totals - width).clamp(min=0)
    counts = -(-spare // step) + 1
    row = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    back = counts.cumsum(0)[row] - 1 - torch.arange(row.numel())  # 0 for the newest window of its row
    first = (spare[row] - back * step).clamp(min=0)
    lengths = totals.clamp(max=width)[row]
    return starts[row] + first + lengths, lengths


def drawn_spans(
    starts: Tensor, totals: Tensor, width: int, shared: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return the ends and lengths, (w,) and (w,), of windows that cut each row at places drawn at random.

    Neighbours share ``shared`` entries, so that every later entry follows another one in exactly one window. A row of
    at most ``width`` entries is one window; of a longer one, all windows but the first and the last are full.

    Args:
        starts: (rows,) int64, the place of each row's first entry.
        totals: (rows,) int64, the number of its entries.
        width: the longest window.
        shared: entries that neighbours share, fewer than ``width``. A row of no more entries has no window.
        rng: the source of the places.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> drawn_spans(torch.tensor([0, 3]), torch.tensor([3, 7]), 4, 1, rng)
        (tensor([ 3,  5,  8, 10]), tensor([3, 2, 4, 3]))
    """
    kept = totals > shared
    starts, units, stride = starts[kept], totals[kept] - shared, width - shared
    border = torch.from_numpy(rng.integers(stride, size=len(starts)))
    border = torch.where(units > stride, border, units)  # the end of a row's first window
    border = torch.where(border == 0, stride, border)
    counts = -(-(units - border) // stride) + 1
    row = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    number = torch.arange(row.numel()) - (counts.cumsum(0) - counts)[row]  # 0 for the oldest window of its row
    end = torch.minimum(border[row] + number * stride, units[row])
    begin = torch.where(number == 0, 0, border[row] + (number - 1) * stride)
    return starts[row] + end + shared, end - begin + shared


def prefix_spans(starts: Tensor, totals: Tensor, width: int, least: int) -> tuple[Tensor, Tensor]:
    """Return the ends and lengths, (w,) and (w,), of windows that end at every entry of a row but its first ones.

    Args:
        starts: (rows,) int64, the place of each row's first entry.
        totals: (rows,) int64, the number of its entries.
        width: the longest window; it holds the newest entries up to its end.
        least: entries of the shortest window.

    Examples:
        >>> prefix_spans(torch.tensor([0, 4]), torch.tensor([4, 1]), 3, 2)
        (tensor([2, 3, 4]), tensor([2, 3, 3]))
    """
    counts = (totals - least + 1).clamp(min=0)
    row = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    upto = torch.arange(row.numel()) - (counts.cumsum(0) - counts)[row] + least
    return starts[row] + upto, upto.clamp(max=width)


def shortened_spans(ends: Tensor, lengths: Tensor, least: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return the ends and lengths of spans without some of their newest entries, whose number is drawn at random.

    A span of no more than ``least`` entries has no shorter one.

    Examples:
        >>> shortened_spans(torch.tensor([4, 6]), torch.tensor([4, 1]), 1, np.random.default_rng(0))
        (tensor([3]), tensor([3]))
    """
    ends, lengths = ends[lengths > least], lengths[lengths > least]
    kept = torch.from_numpy(rng.integers(least, lengths.numpy()))
    return ends - lengths + kept, kept


def training_spans(
    starts: Tensor,
    totals: Tensor,
    *,
    width: int,
    step: int | None,
    least: int,
    prefixes: Prefixes,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Return the ends and lengths, (w,) and (w,), of the windows of ``SequenceData.train_windows``."""
    if prefixes == "all":
        return prefix_spans(starts, totals, width, least)
    if step is None:
        ends, lengths = drawn_spans(starts, totals, width, least - 1, rng)
    else:
        ends, lengths = window_spans(starts, totals, width, step)
    if prefixes == "one":
        more = shortened_spans(ends, lengths, least, rng)
        ends, lengths = torch.cat([ends, more[0]]), torch.cat([lengths, more[1]])
    return ends, lengths
