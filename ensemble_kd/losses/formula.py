"""The formula of a loss without stored logits: the losses of a tile of logits, and their gradients in these logits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Networks(NamedTuple):
    """Networks, given by the factors of their logits hidden · weightᵀ + bias."""

    hidden: Tensor  # (n, t, d)
    weight: Tensor  # (n, v, d)
    bias: Tensor | None  # (n, v)


Weight = float | Tensor  # of a loss; a tensor () on an accelerator is not read, and may change when a graph is repeated
Tile = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, bool], tuple[Tensor, ...]]


class Formula(Hashable, Protocol):
    """Losses of a tile's logits, and the gradients of these losses in the logits.

    A formula is frozen and hashable, since compiled tiles are kept per formula. A tile's first n planes belong to the
    networks that learn; planes of fixed teachers follow. A new loss is a new formula, and costs one pass over the tile.
    """

    @property
    def compiles(self) -> bool:
        """False if ``tile`` does what a compiler cannot see, such as a sum over processes."""

    def kernel(self, *, product: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tile | None:
        """Return ``tile`` as one kernel for a device, or None if there is none."""

    def parts(self, n: int) -> Sequence[tuple[Sequence[int], Formula]]:
        """Return the learners that have to share a tile, part by part, with the formula of each part."""

    def slopes(self, weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
        """Return the factor of each loss's gradient in the logits. At temperature τ it is weight / τ."""

    def tile(
        self,
        logits: Tensor,
        bias: Tensor | None,
        picked: Tensor,
        counts: Tensor,
        weights: Tensor,
        with_grad: bool,
    ) -> tuple[Tensor, ...]:
        """Return statistics per row for ``at_target``, and turn the learners' logits into their gradients in place.

        The gradients lack the part that only the target's logit has. This part of the formula may be compiled.

        Args:
            logits: (networks, rows, v) in the precision of the products, without bias.
            bias: (networks, v), or None; for a formula with a further row (networks + 1, v).
            picked: (networks, rows) the targets' logits, bias included; likewise with a further row.
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
            picked: as in ``tile``.
            statistics: from ``tile``.
            counts: as in ``tile``.
            weights: as in ``tile``.
            with_grad: False: the gradient may be None.
        """


@dataclass(frozen=True)
class FixedTeachers:
    """What formulas of cross-entropy and KD have in common whose teachers do not learn: one call, without a kernel.

    Args:
        temperature: τ of KD.
    """

    temperature: float

    @property
    def compiles(self) -> bool:
        """True: a tile is elementwise loops and sums over rows."""
        return True

    def kernel(self, *, product: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
        """There is none."""

    def slopes(self, weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
        """Return the factors of both losses' gradients."""
        ce_weight, kd_weight = weights
        return ce_weight, kd_weight / self.temperature


class Plan(NamedTuple):
    """The settings of one call, which are all that is not a tensor."""

    where: str
    formula: Formula
    weights: tuple[Weight, ...]
    with_grad: bool
    product_dtype: torch.dtype
    tile_rows: int | None
    compiled: bool | None


def weighted(weight: Weight, value: Tensor) -> Tensor:
    """Return the product in the value's precision. A weight that is a tensor may have more digits.

    Examples:
        >>> weighted(torch.tensor(0.5, dtype=torch.float64), torch.tensor(3.0))
        tensor(1.5000)
    """
    return (weight.to(value.dtype) if isinstance(weight, Tensor) else weight) * value


def add_softmax(shifted: Tensor, softmaxes: list[Tensor], normalisers: list[Tensor]) -> None:
    """Append the softmax and log Σ exp of rows whose maximum is 0."""
    if torch.compiler.is_compiling():  # loops over a row, where an exponential costs less than a plane of memory
        normalisers.append(shifted.exp().sum(1, keepdim=True).log())
        softmaxes.append((shifted - normalisers[-1]).exp())
    else:  # torch's softmax is one pass, and its largest value 1 / Σ exp
        softmaxes.append(shifted.softmax(1))
        normalisers.append(-softmaxes[-1].amax(1, keepdim=True).log())
