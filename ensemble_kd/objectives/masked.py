"""Training objectives: how a batch of sequences becomes inputs, target positions and targets.

Everything is drawn on the device of the batch in a fixed number of vectorised operations, from a generator where one is
given, so that a run can be repeated.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses.sampled import Candidates, draw_candidates


@dataclass(frozen=True)
class Draw:
    """What one step trains on. ``t`` counts the target positions of all views together."""

    inputs: Tensor  # (m, b, l) the views that the encoder reads
    positions: Tensor  # (t,) where a target stands, an index into the flattened (m b l)
    targets: Tensor  # (t,) the item to predict there, 1..v
    valid: Tensor | None  # (t,) bool, False where a target only fills up; None: all count
    anchor: Tensor  # (b, l) the unchanged sequences
    anchor_items: Tensor  # (b, l) the item whose attributes each anchor position predicts, 0 = none
    candidates: Candidates | None = None  # the items that the losses are computed over; None: all


class Objective(Protocol):
    """What ``EnsembleKD`` asks of an objective."""

    @property
    def views(self) -> int:
        """M, how many views of each sequence a step reads."""
        ...

    @property
    def name(self) -> str:
        """The objective's key in ``step.terms``."""
        ...

    @property
    def views_are_unmasked(self) -> bool:
        """Whether a view reads what the anchor reads, so that one pass can serve as both."""
        ...

    def draw(
        self, item_ids: Tensor, *, mask_token: int, newest_only: bool = False, generator: torch.Generator | None = None
    ) -> Draw:
        """Inputs and targets of one step."""
        ...

    def query(self, item_ids: Tensor, *, mask_token: int, max_len: int | None) -> Tensor:
        """What the encoder reads at inference; its last position predicts the next item."""
        ...


def _check_ratio(where: str, value: object, *, above_zero: bool) -> None:
    ratio = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    if not (0 < ratio <= 1 or (ratio == 0 and not above_zero)):
        interval = "(0, 1]" if above_zero else "[0, 1]"
        raise EnsembleKDError(where, f"a number in {interval}", repr(value), "Pass such a number.")


def _check_views(where: str, views: int) -> None:
    if not isinstance(views, int) or isinstance(views, bool) or views < 1:
        raise EnsembleKDError(where, "a whole number of views >= 1", repr(views), "Pass views=1 or more.")


def _check_negatives(where: str, negatives: int | None) -> None:
    if negatives is not None and (not isinstance(negatives, int) or isinstance(negatives, bool) or negatives < 1):
        expected, fix = (
            "a whole number of negatives >= 1, or None",
            "Pass None for the full softmax, or negatives=1024.",
        )
        raise EnsembleKDError(where, expected, repr(negatives), fix)


def _sample(
    targets: Tensor, negatives: int | None, mask_token: int, generator: torch.Generator | None
) -> Candidates | None:
    if negatives is None:
        return None
    return draw_candidates(targets, num_items=mask_token - 1, negatives=negatives, generator=generator)


def mask_positions(
    item_ids: Tensor,
    *,
    views: int,
    mask_ratio: float,
    newest: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Draw exactly ``L = ceil(mask_ratio * T)`` of the T real positions of each sequence and view, Eq. 3.

    Args:
        item_ids: (b, l) int64, 0 = padding on the left.
        views: m independent draws.
        mask_ratio: rho, in (0, 1].
        newest: probability that the newest item is among the drawn; None leaves it to chance.
        generator: source of randomness, on the device of ``item_ids``.

    Returns:
        positions (m, b, k) int64 and valid (m, b, k) bool, k = ceil(mask_ratio * l); a row's first L entries are valid.

    Examples:
        >>> ids = torch.tensor([[0, 0, 7, 8, 9]])
        >>> positions, valid = mask_positions(ids, views=2, mask_ratio=0.5, newest=1.0)
        >>> valid.sum(-1).tolist(), positions[..., 0].tolist()
        ([[2], [2]], [[4], [4]])
    """
    b, length = item_ids.shape
    real = item_ids != 0
    # Two roundings, so that 0.07 * 100 = 7.000000000000001 asks for 7 positions and not for 8.
    # At least one, however small the ratio; none in a row without items.
    items = real.sum(dim=1)
    count = torch.ceil(items.double() * mask_ratio - 1e-9).long().clamp(min=1).minimum(items)
    k = min(length, max(1, math.ceil(length * mask_ratio - 1e-9)))
    score = torch.rand(views, b, length, generator=generator, device=item_ids.device)
    if newest is not None:
        drawn = torch.rand(views, b, generator=generator, device=item_ids.device) < newest
        score[..., -1] = torch.where(drawn, 2.0, -1.0)  # before, or after, every other real position
    score = score.masked_fill(~real, -2.0)
    positions = score.topk(k, dim=-1).indices
    valid = torch.arange(k, device=item_ids.device) < count[:, None]
    return positions, valid.expand(views, b, k)


def _mask(item_ids: Tensor, positions: Tensor, valid: Tensor, mask_token: int) -> Tensor:
    """(m, b, l) copies of the sequences with the valid positions replaced by the mask token."""
    views = item_ids.expand(positions.shape[0], -1, -1)
    new = torch.where(valid, mask_token, views.gather(2, positions))
    return views.scatter(2, positions, new)


def selects(batch: Tensor) -> bool:
    """Whether to select the rows that count. An accelerator would report their number to the host and wait."""
    return batch.device.type == "cpu"


def _flatten(positions: Tensor, valid: Tensor, items: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positions (m, b, k) as indices into the flattened (m b l), with the items that stand there."""
    m, b, _ = positions.shape
    row = torch.arange(m * b, device=positions.device).view(m, b, 1)
    targets = items.expand(m, -1, -1).gather(2, positions)
    flat, keep, targets = (row * length + positions).flatten(), valid.flatten(), targets.flatten()
    if selects(flat):
        return flat[keep], targets[keep], None
    return flat, targets.clamp(min=1), keep


def _newest_columns(ids: Tensor, max_len: int | None) -> Tensor:
    return ids if max_len is None or ids.shape[1] <= max_len else ids[:, -max_len:]


@dataclass(frozen=True)
class MaskedItem:
    r"""Masked item prediction, Eqs. 3-7: predict the items behind [mask] in ``views`` masked copies of a sequence.

    Exactly ``ceil(mask_ratio * T)`` of the T real positions are masked, never padding. The authors' code draws each
    position by itself with that probability and replaces 80/10/10, as BERT does.

    Args:
        mask_ratio: rho, in (0, 1].
        views: M masked copies of each sequence.
        newest: probability that the newest item is among the masked, since that is where the model is evaluated;
            None leaves it to chance, as in the paper.
        negatives: how many items a step samples beside its targets, so that its cost does not grow with the catalogue
            (1024, say); None: the full softmax. The gradients of item tables are then sparse: a training loop of
            your own needs an optimizer for such, ``ensemble_kd.training.RowAdamW`` as in ``fit``, say.

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

    def __post_init__(self) -> None:
        _check_ratio("MaskedItem: mask_ratio", self.mask_ratio, above_zero=True)
        _check_views("MaskedItem: views", self.views)
        _check_negatives("MaskedItem: negatives", self.negatives)
        if self.newest is not None:
            _check_ratio("MaskedItem: newest", self.newest, above_zero=False)

    def draw(
        self, item_ids: Tensor, *, mask_token: int, newest_only: bool = False, generator: torch.Generator | None = None
    ) -> Draw:
        """Masked views of (b, l) sequences, Eq. 3.

        Raises:
            EnsembleKDError: the encoder gives one vector a sequence, so that masked positions have no state.
        """
        if newest_only:
            raise EnsembleKDError(
                "MaskedItem",
                "an encoder that returns (b, l, d)",
                "one that returns (b, d)",
                "Masked positions need a hidden state each: train this encoder with objective=NextItem().",
            )
        positions, valid = mask_positions(
            item_ids, views=self.views, mask_ratio=self.mask_ratio, newest=self.newest, generator=generator
        )
        inputs = _mask(item_ids, positions, valid, mask_token)
        flat, targets, keep = _flatten(positions, valid, item_ids, item_ids.shape[1])
        candidates = _sample(targets, self.negatives, mask_token, generator)
        return Draw(inputs, flat, targets, keep, anchor=item_ids, anchor_items=item_ids, candidates=candidates)

    def query(self, item_ids: Tensor, *, mask_token: int, max_len: int | None) -> Tensor:
        """Append [mask], Eq. 20; the oldest items go where the encoder's length would be exceeded."""
        mask = item_ids.new_full((item_ids.shape[0], 1), mask_token)  # len() would be a constant for torch.export
        return _newest_columns(torch.cat([item_ids, mask], dim=1), max_len)


@dataclass(frozen=True)
class NextItem:
    """Next-item prediction (Sec. 4.5): the target at position t is item t + 1, at every real position.

    Args:
        views: M passes over each sequence, which differ by dropout, or by their masks.
        mask_ratio: share of a view's inputs that is replaced by [mask]; 0 for none.
        negatives: as in ``MaskedItem``.

    Examples:
        >>> NextItem(negatives=1024)
        NextItem(views=1, mask_ratio=0.0, negatives=1024)
    """

    views: int = 1
    mask_ratio: float = 0.0
    negatives: int | None = None

    name: ClassVar[str] = "nip"

    def __post_init__(self) -> None:
        _check_ratio("NextItem: mask_ratio", self.mask_ratio, above_zero=False)
        _check_views("NextItem: views", self.views)
        _check_negatives("NextItem: negatives", self.negatives)

    @property
    def views_are_unmasked(self) -> bool:
        """Whether views and anchor read the same input."""
        return self.mask_ratio == 0

    def draw(
        self, item_ids: Tensor, *, mask_token: int, newest_only: bool = False, generator: torch.Generator | None = None
    ) -> Draw:
        """Inputs (all but the newest item) and the item that follows each; ``newest_only``: the last position alone."""
        inputs, following = item_ids[:, :-1], item_ids[:, 1:]
        following = following.masked_fill(inputs == 0, 0)  # the first item follows padding: nothing to predict it from
        b, length = inputs.shape
        at = torch.arange(1 if newest_only else length, device=inputs.device).expand(self.views, b, -1)
        wanted = following[:, -1:] if newest_only else following
        positions, targets, keep = _flatten(at, (wanted != 0).expand(self.views, -1, -1), wanted, wanted.shape[1])
        if self.mask_ratio > 0:
            masked, valid = mask_positions(inputs, views=self.views, mask_ratio=self.mask_ratio, generator=generator)
            views = _mask(inputs, masked, valid, mask_token)
        else:
            views = inputs.expand(self.views, -1, -1)
        candidates = _sample(targets, self.negatives, mask_token, generator)
        return Draw(views, positions, targets, keep, anchor=inputs, anchor_items=wanted, candidates=candidates)

    def query(self, item_ids: Tensor, *, mask_token: int, max_len: int | None) -> Tensor:
        """The sequence itself: its newest position predicts what follows."""
        return _newest_columns(item_ids, max_len)
