"""A formula: the losses of a tile of logits and their gradients, which is all that one loss differs in from another."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Networks(NamedTuple):
    """Networks as the factors of their logits, which are hidden · weightᵀ + bias."""

    hidden: Tensor  # (n, t, d)
    weight: Tensor  # (n, v, d)
    bias: Tensor | None  # (n, v)


class Formula(Hashable, Protocol):
    """Losses of a tile's logits, and the gradients of these losses in the logits.

    A formula is frozen and hashable, since compiled tiles are kept per formula. A tile's first planes are those of the
    n networks that learn; planes of fixed teachers follow. A new loss is a new formula, at the cost of one pass.
    """

    @property
    def compiles(self) -> bool:
        """False if `tile` does what a compiler cannot see, such as a sum over processes."""

    def slopes(self, weights: tuple[float, ...]) -> tuple[float, ...]:
        """Return each loss's factor in the gradient of the logits: at temperature τ it is 1 / τ of the weight."""

    def tile(
        self, logits: Tensor, bias: Tensor | None, counts: Tensor, weights: Tensor, with_grad: bool
    ) -> tuple[Tensor, ...]:
        """Return statistics per row for `at_target`, and turn the learners' logits into their gradients in place.

        The gradients lack the part that only the target's logit has. This part of the formula may be compiled.

        Args:
            logits: (networks, rows, v) in the precision of the products, without bias.
            bias: (networks, v), or None.
            counts: (rows,) each row's share of the mean over targets, as the gradients take it.
            weights: one slope per loss.
            with_grad: False: leave the logits alone.
        """

    def at_target(
        self, picked: Tensor, statistics: tuple[Tensor, ...], counts: Tensor, weights: Tensor, with_grad: bool
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return the losses per row, (n, rows) or (rows,) each, and the gradient in the target's logit (n, rows).

        It replaces the one in the tile: computed from a float32 value, it is rounded only once.

        Args:
            picked: (networks, rows) the targets' logits, bias included.
            statistics: from `tile`.
            counts: as in `tile`.
            weights: as in `tile`.
            with_grad: False: the gradient may be None.
        """


class Plan(NamedTuple):
    """Everything about one call that is not a tensor."""

    where: str
    formula: Formula
    weights: tuple[float, ...]
    with_grad: bool
    product_dtype: torch.dtype
    tile_rows: int | None
    compiled: bool | None


def add_softmax(shifted: Tensor, softmaxes: list[Tensor], normalisers: list[Tensor]) -> None:
    """Append the softmax and log Σ exp of rows whose maximum is 0."""
    if torch.compiler.is_compiling():  # loops over a row, where an exponential costs less than a plane of memory
        normalisers.append(shifted.exp().sum(1, keepdim=True).log())
        softmaxes.append((shifted - normalisers[-1]).exp())
    else:  # torch's softmax is one pass, and its largest value 1 / Σ exp
        softmaxes.append(shifted.softmax(1))
        normalisers.append(-softmaxes[-1].amax(1, keepdim=True).log())
