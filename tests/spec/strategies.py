"""Hypothesis strategies in the one alphabet of axes.

``tensors("n t v")`` draws one tensor, ``tensors("n b e, n m b e")`` a tuple whose equal letters have equal sizes. Sizes
and the kind of the values are drawn, and shrink; the values come from a seed, since drawing each takes milliseconds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

AXES: dict[str, SearchStrategy[int]] = {
    "n": st.integers(1, 4),  # members
    "m": st.integers(1, 3),  # views
    "b": st.integers(2, 5),  # batch
    "l": st.integers(1, 5),  # positions
    "d": st.integers(1, 4),  # features
    "e": st.integers(1, 6),  # features of a pooled sequence
    "v": st.integers(2, 9),  # items
    "a": st.integers(1, 4),  # attributes
    "t": st.integers(1, 6),  # target positions of a batch
}
temperatures = st.sampled_from([0.1, 0.3, 1.0, 2.5])
weights = st.floats(0, 10, allow_subnormal=False)
seeds = st.integers(0, 2**32 - 1)


def _values(draw: DrawFn, shape: list[int], seed: int) -> Tensor:
    """Normal values at a drawn scale; or the same rounded to halves, so that there are ties and equal rows."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kind = draw(st.sampled_from(["normal", "small", "rounded"]))
    return {"normal": values, "small": values * 0.01, "rounded": (2 * values).round() / 2}[kind]


@st.composite
def tensors(draw: DrawFn, /, patterns: str, **sizes: SearchStrategy[int]) -> Any:
    """float64 tensors of the shapes that ``patterns`` spells; ``sizes`` replaces the usual range of an axis."""
    axes: dict[str, int] = {}
    made = []
    seed = draw(seeds)
    for i, pattern in enumerate(patterns.split(",")):
        for axis in pattern.split():
            if axis not in axes:
                axes[axis] = draw(sizes.get(axis, AXES[axis]))
        made.append(_values(draw, [axes[axis] for axis in pattern.split()], seed + i))
    return made[0] if len(made) == 1 else tuple(made)


@st.composite
def representations(draw: DrawFn, /, **sizes: SearchStrategy[int]) -> tuple[Tensor, Tensor]:
    """Anchors (n, b, e) and views (n, m, b, e), no vector near 0, where a cosine is not defined."""
    anchors, views = draw(tensors("n b e, n m b e", **sizes))
    for x in (anchors, views):
        x[..., 0] += torch.where(x.norm(dim=-1) < 1e-3, 1.0, 0.0)
    return anchors, views


def permutation(size: int, seed: int) -> Tensor:
    """A permutation of ``size`` things."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def integers(high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """int64 in [0, high)."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


class Predictions(NamedTuple):
    """Logits of all members with the true classes."""

    logits: Tensor  # (n, t, v)
    targets: Tensor  # (t,)


@st.composite
def predictions(draw: DrawFn, /, **sizes: SearchStrategy[int]) -> Predictions:
    logits = draw(tensors("n t v", **sizes))
    return Predictions(logits, integers(logits.shape[2], (logits.shape[1],), draw(seeds)))


class Classified(NamedTuple):
    """The arguments of the item losses."""

    hidden: Tensor  # (n, t, d)
    weight: Tensor  # (n, v, d)
    bias: Tensor | None  # (n, v)
    targets: Tensor  # (t,)
    valid: Tensor | None  # (t,), at least one True


@st.composite
def classified(draw: DrawFn, /, **sizes: SearchStrategy[int]) -> Classified:
    hidden, weight, bias = draw(tensors("n t d, n v d, n v", **sizes))
    t, v, seed = hidden.shape[1], weight.shape[1], draw(seeds)
    valid = integers(2, (t,), seed + 1).bool()
    valid[0] = True
    return Classified(
        hidden,
        weight,
        bias if draw(st.booleans()) else None,
        integers(v, (t,), seed),
        valid if draw(st.booleans()) else None,
    )


class Lesson(NamedTuple):
    """The arguments of the losses of students of a fixed teacher."""

    hidden: Tensor  # (n, t, d)
    weight: Tensor  # (n, v, d)
    bias: Tensor  # (n, v)
    queries: Tensor  # (t, e)
    keys: Tensor  # (v, e)
    key_bias: Tensor  # (v,)
    targets: Tensor  # (t,)
    valid: Tensor | None  # (t,), at least one True


@st.composite
def lessons(draw: DrawFn) -> Lesson:
    case = draw(classified())
    (t, v), n = (case.hidden.shape[1], case.weight.shape[1]), len(case.hidden)
    bias, *teacher = draw(tensors("n v, t e, v e, v", n=st.just(n), v=st.just(v), t=st.just(t)))
    return Lesson(case.hidden, case.weight, bias, *teacher, case.targets, case.valid)


class Tagged(NamedTuple):
    """Attribute logits with the attributes that each position's item has."""

    logits: Tensor  # (n, t, a)
    attributes: Tensor  # (t, k), filled up with -1
    real: Tensor  # (t,), at least one True


@st.composite
def tagged(draw: DrawFn) -> Tagged:
    logits = draw(tensors("n t a"))
    (_, t, a), seed = logits.shape, draw(seeds)
    has = integers(2, (t, a), seed).bool()
    attributes = torch.where(has, torch.arange(a), -1)  # fillers stand anywhere in a row, not only at its end
    real = integers(2, (t,), seed + 1).bool()
    real[-1] = True
    return Tagged(logits, attributes, real)


class Encoded(NamedTuple):
    """Hidden states of left-padded sequences; at padding they hold garbage, as encoders leave it there."""

    hidden: Tensor  # (n, b, l, d)
    real: Tensor  # (b, l)


@st.composite
def encoded(draw: DrawFn) -> Encoded:
    hidden = draw(tensors("n b l d"))
    hidden[..., 0] += torch.where(hidden.norm(dim=-1) < 1e-3, 1.0, 0.0)
    b, length = hidden.shape[1:3]
    lengths = 1 + integers(length, (b, 1), draw(seeds))
    return Encoded(hidden, torch.arange(length) >= length - lengths)


class Ranking(NamedTuple):
    """Scores with the item to be found and the items left out."""

    scores: Tensor  # (n, b, v + 1)
    target: Tensor  # (b,) in 1..v
    exclude: Tensor | None  # (b, k), 0 fills up


@st.composite
def rankings(draw: DrawFn) -> Ranking:
    scores = draw(tensors("n b v", v=st.integers(3, 9)))
    (_, b, columns), seed = scores.shape, draw(seeds)
    target = 1 + integers(columns - 1, (b,), seed)
    exclude = integers(columns, (b, draw(st.integers(0, 4))), seed + 1)  # repeats, fillers and targets among them
    return Ranking(scores, target, exclude if draw(st.booleans()) else None)


class Masking(NamedTuple):
    """Sequences with the settings of MaskedItem."""

    item_ids: Tensor  # (b, l)
    mask_ratio: float
    views: int
    seed: int


@st.composite
def maskings(draw: DrawFn) -> Masking:
    # 0.28 * 25 and 0.55 * 20 are whole numbers that floating point misses from above.
    b, length, seed = draw(AXES["b"]), draw(st.integers(1, 40) | st.sampled_from([20, 25])), draw(seeds)
    lengths = 1 + integers(length, (b, 1), seed)
    lengths[0] = length
    items = 1 + integers(50, (b, length), seed + 1)
    ratio = draw(st.sampled_from([0.01, 0.07, 0.1, 0.15, 0.2, 0.28, 0.3, 0.5, 0.55, 0.7, 0.95, 1.0]))
    return Masking(items.where(torch.arange(length) >= length - lengths, 0), ratio, draw(AXES["m"]), seed)


@st.composite
def sequences(draw: DrawFn, /, v: int) -> Tensor:
    """Left-padded sequences (b, l) of at least two items each; the first row has no padding."""
    b, length, seed = draw(AXES["b"]), draw(st.integers(2, 6)), draw(seeds)
    lengths = 2 + integers(length - 1, (b, 1), seed)
    lengths[0] = length
    return (1 + integers(v, (b, length), seed + 1)).where(torch.arange(length) >= length - lengths, 0)
