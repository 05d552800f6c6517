"""``Objective``: everything that the library asks of an objective, and ``Draw``: the data of one training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ensemble_kd.objectives.candidates import Candidates

MOST_VIEWS = 1000  # more than fit into memory


@dataclass(frozen=True)
class Draw:
    """The inputs and targets of one step. ``t`` counts the target positions of all views together.

    ``anchor_items`` are the items whose attributes the anchor's positions predict; 0 stands for none. What the host
    knows about lengths spares an accelerator the padding; without it all is computed there.
    """

    inputs: Tensor  # (m, b, l) the views that the encoder reads
    positions: Tensor  # (t,) the position of each target, an index into the flattened (m b l)
    targets: Tensor  # (t,) the item to predict there, 1..v
    valid: Tensor | None  # (t,) bool, False where a target only fills up; None: all count
    anchor: Tensor  # (b, l) the unchanged sequences
    anchor_items: Tensor  # (b, l)
    candidates: Candidates | None = None  # the items that the losses are computed over; None: all
    lengths: Sequence[int] | None = None  # (b,) real positions of each row of ``inputs``, if the host knows them
    attributed: int | None = None  # the number of ``anchor_items`` that are not 0, if the host knows it


@runtime_checkable
class Objective(Protocol):
    """A training objective: it draws inputs and targets for a step, and the query that is read at inference.

    ``MaskedItem`` and ``NextItem`` are two. An object of your own with these members is as good.
    """

    @property
    def name(self) -> str:
        """The objective's key in ``step.terms``."""
        ...

    @property
    def views(self) -> int:
        """M, the number of views of each sequence that a step reads."""
        ...

    @property
    def views_are_unmasked(self) -> bool:
        """True if a view reads what the anchor reads, so that one pass can serve as both."""
        ...

    @property
    def min_items(self) -> int:
        """The fewest items of a training row: one that is read, and those after it that are targets only."""
        ...

    @property
    def negatives(self) -> int | None:
        """The number of items that a step samples besides its targets; None: the full softmax."""
        ...

    @property
    def needs_states(self) -> bool:
        """True if the encoder must return a hidden state per position, (b, l, d), not one per sequence."""
        ...

    @property
    def needs_causal(self) -> bool:
        """True if a later item is a target at an earlier position, so that no state may depend on later items."""
        ...

    @property
    def query_columns(self) -> int:
        """The number of columns that ``query`` adds to a sequence."""
        ...

    def draw(
        self,
        item_ids: Tensor,
        *,
        mask_token: int,
        newest_only: bool = False,
        generator: torch.Generator | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Draw:
        """Draw the inputs and targets of one step.

        Args:
            item_ids: (b, l) int64 sequences, left-padded with 0.
            mask_token: the id of [mask], v + 1.
            newest_only: the encoder returns (b, d), so that only the newest position can have a target.
            generator: source of randomness, on the device of ``item_ids``; None: torch's global one.
            lengths: (b,) the number of items of each row, if the host knows them.
        """
        ...

    def query(self, item_ids: Tensor, *, mask_token: int, max_len: int | None) -> Tensor:
        """Return what the encoder reads at inference, at most ``max_len`` columns; its last position predicts."""
        ...
