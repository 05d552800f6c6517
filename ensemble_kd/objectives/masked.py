"""Masked item prediction, Eqs. 3-7."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ensemble_kd.internal import ratio, whole
from ensemble_kd.objectives.candidates import sampled
from ensemble_kd.objectives.positions import (
    flat_targets,
    mask_counts,
    mask_positions,
    masked,
    newest_columns,
)
from ensemble_kd.objectives.protocol import MOST_VIEWS, Draw


@dataclass(frozen=True)
class MaskedItem:
    r"""Masked item prediction, Eqs. 3-7: predict the items behind [mask] in ``views`` masked copies of a sequence.

    Exactly ``ceil(mask_ratio * T)`` of the T real positions are masked, never padding.

    Where we differ: the authors' code draws each position by itself with that probability, and replaces 80/10/10 as
    BERT does.

    Args:
        mask_ratio: rho, in (0, 1].
        views: M, the number of masked copies of each sequence.
        newest: probability that the newest item is among the masked ones, since the model is evaluated there; None
            leaves it to chance, as in the paper.
        negatives: number of items that a step samples besides its targets, such as 1024, so that the cost of a step
            does not grow with the catalogue; None: the full softmax. With it the gradients of item tables are sparse. A
            training loop of your own then needs an optimizer for them, such as ``ensemble_kd.training.RowAdamW``.

    Raises:
        EnsembleKDError: an argument out of its range.

    Examples:
        >>> MaskedItem(mask_ratio=0.15, views=8)
        MaskedItem(mask_ratio=0.15, views=8, newest=0.5, negatives=None)
    """

    mask_ratio: float = 0.2
    views: int = 2
    newest: float | None = 0.5
    negatives: int | None = None

    name: ClassVar[str] = "mip"
    views_are_unmasked: ClassVar[bool] = False
    min_items: ClassVar[int] = 1
    needs_states: ClassVar[bool] = True
    needs_causal: ClassVar[bool] = False
    query_columns: ClassVar[int] = 1  # the [mask]

    def __post_init__(self) -> None:
        ratio("MaskedItem", "mask_ratio", self.mask_ratio, above_zero=True)
        whole("MaskedItem", "views", self.views, least=1, most=MOST_VIEWS)
        if self.newest is not None:
            ratio("MaskedItem", "newest", self.newest)
        if self.negatives is not None:
            whole("MaskedItem", "negatives", self.negatives, least=1)

    def draw(
        self,
        item_ids: Tensor,
        *,
        mask_token: int,
        newest_only: bool = False,
        generator: torch.Generator | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Draw:
        """Draw masked views of (b, l) sequences, Eq. 3."""
        positions, valid = mask_positions(
            item_ids, views=self.views, mask_ratio=self.mask_ratio, newest=self.newest, generator=generator
        )
        inputs = masked(item_ids, positions, valid, mask_token)
        number = attributed = None
        if lengths is not None:
            number = self.views * int(mask_counts(torch.tensor(lengths), self.mask_ratio).sum())
            attributed = sum(lengths)
        flat, targets, keep = flat_targets(positions, valid, item_ids, item_ids.shape[1], number)
        candidates = sampled(targets, self.negatives, mask_token, generator)
        return Draw(
            inputs,
            flat,
            targets,
            keep,
            anchor=item_ids,
            anchor_items=item_ids,
            candidates=candidates,
            lengths=lengths,
            attributed=attributed,
        )

    def query(self, item_ids: Tensor, *, mask_token: int, max_len: int | None) -> Tensor:
        """Append [mask], Eq. 20; the oldest items are cut off where the encoder's length would be exceeded."""
        mask = item_ids.new_full((item_ids.shape[0], 1), mask_token)  # len() would be a constant for torch.export
        return newest_columns(torch.cat([item_ids, mask], dim=1), max_len)
