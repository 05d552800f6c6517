"""Next-item prediction (Sec. 4.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ensemble_kd.internal import ratio, whole
from ensemble_kd.objectives.candidates import sampled
from ensemble_kd.objectives.positions import flat_targets, mask_positions, masked, newest_columns
from ensemble_kd.objectives.protocol import MOST_VIEWS, Draw


@dataclass(frozen=True)
class NextItem:
    """Next-item prediction (Sec. 4.5): the target at position t is item t + 1, at every real position.

    Args:
        views: M, the number of passes over each sequence, which differ by dropout or by their masks.
        mask_ratio: share of a view's inputs that is replaced by [mask]; 0 for none.
        negatives: as in ``MaskedItem``.

    Raises:
        EnsembleKDError: an argument out of its range.

    Examples:
        >>> NextItem(negatives=1024)
        NextItem(views=1, mask_ratio=0.0, negatives=1024)
    """

    views: int = 1
    mask_ratio: float = 0.0
    negatives: int | None = None

    name: ClassVar[str] = "nip"
    min_items: ClassVar[int] = 2  # the newest is a target and no input
    needs_states: ClassVar[bool] = False
    needs_causal: ClassVar[bool] = True
    query_columns: ClassVar[int] = 0

    def __post_init__(self) -> None:
        ratio("NextItem", "mask_ratio", self.mask_ratio)
        whole("NextItem", "views", self.views, least=1, most=MOST_VIEWS)
        if self.negatives is not None:
            whole("NextItem", "negatives", self.negatives, least=1)

    @property
    def views_are_unmasked(self) -> bool:
        """True if views and anchor read the same input."""
        return self.mask_ratio == 0

    def draw(
        self,
        item_ids: Tensor,
        *,
        mask_token: int,
        newest_only: bool = False,
        generator: torch.Generator | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Draw:
        """Draw the inputs, all but the newest item, and the item after each (``newest_only``: after the last alone)."""
        inputs, following = item_ids[:, :-1], item_ids[:, 1:]
        following = following.masked_fill(inputs == 0, 0)  # the first item follows padding: nothing to predict it from
        b, length = inputs.shape
        at = torch.arange(1 if newest_only else length, device=inputs.device).expand(self.views, b, -1)
        wanted = following[:, -1:] if newest_only else following
        number = read = attributed = None
        if lengths is not None:
            read = [max(0, items - 1) for items in lengths]  # all but the newest, and each has the next for its target
            attributed = sum(map(bool, read)) if newest_only else sum(read)
            number = self.views * attributed
        counts = (wanted != 0).expand(self.views, -1, -1)
        positions, targets, keep = flat_targets(at, counts, wanted, wanted.shape[1], number)
        if self.mask_ratio > 0:
            hidden, valid = mask_positions(inputs, views=self.views, mask_ratio=self.mask_ratio, generator=generator)
            views = masked(inputs, hidden, valid, mask_token)
        else:
            views = inputs.expand(self.views, -1, -1)
        candidates = sampled(targets, self.negatives, mask_token, generator)
        return Draw(
            views,
            positions,
            targets,
            keep,
            anchor=inputs,
            anchor_items=wanted,
            candidates=candidates,
            lengths=read,
            attributed=attributed,
        )

    def query(self, item_ids: Tensor, *, mask_token: int, max_len: int | None) -> Tensor:
        """Return the newest items of the sequence: its last position predicts the next item."""
        return newest_columns(item_ids, max_len)
