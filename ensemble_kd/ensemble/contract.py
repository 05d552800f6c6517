"""The contract of encoders and of batches, checked once, at the public boundary.

A batch is item_ids (b, l) int64, 0 = padding on the left, 1..v items, v + 1 the mask token. An encoder maps it to
hidden states (b, l, d), or (b, d) for the newest position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import get_protocol_members

from ensemble_kd.data import Vocabulary
from ensemble_kd.errors import EnsembleKDError, first_line
from ensemble_kd.internal import is_whole, shown
from ensemble_kd.objectives import Objective
from ensemble_kd.stacking import StackedModule

if TYPE_CHECKING:
    from ensemble_kd.data import AnySequences
    from ensemble_kd.ensemble.model import EnsembleKD

MOST = 2**31 - 3  # items or positions
LEAK = 1e-3  # relative change of earlier states by a later item; rounding is far below, a leak far above


class Attributes(Protocol):
    """The attributes of each item; ``ensemble_kd.data.ItemAttributes`` is one."""

    @property
    def num_attributes(self) -> int:
        """a, the number of attributes."""
        ...

    @property
    def table(self) -> Tensor:
        """(v + 2, k) int64: row i has the attributes of item i as classes from 0, filled up with -1."""
        ...


def size_of(member: nn.Module, name: str, given: int | None) -> int:
    """Return a size that the caller gave, or else the encoder's attribute of that name.

    Raises:
        EnsembleKDError: neither is a whole number >= 1.
    """
    value: Any = given if given is not None else getattr(member, name, None)
    if not is_whole(value) or not 1 <= value <= MOST:
        fix = f"Pass {name}=..., or give the encoder an attribute of that name."
        raise EnsembleKDError("EnsembleKD", f"a whole number {name} >= 1", repr(value), fix)
    return int(value)


def check_objective(objective: object, *, num_items: int, newest_only: bool) -> None:
    """Refuse an objective that lacks a part, samples more negatives than there are items, or does not fit the encoder.

    Raises:
        EnsembleKDError: names the part.
    """
    where, fix = "objective", "Pass one, such as objective=NextItem()."
    if isinstance(objective, type) or not callable(getattr(objective, "draw", None)):
        raise EnsembleKDError(where, "MaskedItem(...) or NextItem(...)", repr(objective), fix)
    if not isinstance(objective, Objective):
        lacking = [name for name in sorted(get_protocol_members(Objective)) if not hasattr(objective, name)]
        fix = "ensemble_kd.objectives.Objective lists all that an objective of your own needs."
        raise EnsembleKDError(where, "all members of an Objective", f"none of {', '.join(lacking)}", fix)
    if objective.negatives is not None and objective.negatives > num_items:
        expected, fix = f"1 <= negatives <= {num_items} (num_items)", "Pass None for the full softmax."
        raise EnsembleKDError(where, expected, objective.negatives, fix)
    if newest_only and objective.needs_states:
        fix = "Masked positions need a hidden state each: train this encoder with objective=NextItem()."
        got = "one that returns (b, d)"
        raise EnsembleKDError(type(objective).__name__, "an encoder that returns (b, l, d)", got, fix)


def check_lengths(where: str, item_ids: Tensor, lengths: Sequence[int] | None) -> None:
    """Refuse lengths that are not those of a batch of ids.

    Examples:
        >>> check_lengths("loss", torch.tensor([[0, 3]]), [2])
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: loss: expected lengths [1], the items of each row, got [2]. \
Count them, or leave lengths out.
    """
    if lengths is None:
        return
    real = (item_ids != 0).sum(dim=1).tolist()
    if list(lengths) != real:
        fix = "Count them, or leave lengths out."
        raise EnsembleKDError(where, f"lengths {real}, the items of each row", shown(list(lengths)), fix)


def check_ids(where: str, item_ids: Tensor, *, highest: int, at_least: int = 1) -> None:
    """Refuse what is not a left-padded batch of ids.

    Args:
        where: the name of the public call, for the message.
        item_ids: what the caller passed.
        highest: the largest id that makes sense there.
        at_least: items that every row must have.

    Raises:
        EnsembleKDError: wrong type, shape or range; rows without items or with padding on the right.

    Examples:
        >>> check_ids("loss", torch.tensor([[3, 0]]), highest=5)
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: loss: expected an item in the last column of every row, got a row that \
ends in padding. Pad on the left with 0 (ensemble_kd.encoders turns right padding), and leave empty rows out.
    """
    if isinstance(item_ids, Tensor) and (item_ids.is_meta or item_ids.layout != torch.strided):
        got, fix = f"{item_ids.layout} on {item_ids.device}", "Pass an ordinary tensor: item_ids.to_dense()."
        raise EnsembleKDError(where, "item_ids as a dense tensor", got, fix)
    if not isinstance(item_ids, Tensor) or item_ids.dtype != torch.int64:
        got = str(item_ids.dtype) if isinstance(item_ids, Tensor) else type(item_ids).__name__
        how = "item_ids.long()" if isinstance(item_ids, Tensor) else "torch.as_tensor(item_ids)"
        raise EnsembleKDError(where, "item_ids as an int64 tensor", got, f"Convert them: {how}.")
    if item_ids.ndim != 2 or 0 in item_ids.shape:
        got = f"{tuple(item_ids.shape)}"
        raise EnsembleKDError(
            where, "item_ids of shape (b, l)", got, "Pass a row for each sequence, item_ids[None] for one."
        )
    low, high = (int(x) for x in item_ids.aminmax())
    if low < 0 or high > highest:
        fix = "Renumber the items from 1 without gaps, or raise num_items."
        raise EnsembleKDError(where, f"item_ids in 0..{highest}", f"{low if low < 0 else high}", fix)
    left = "Pad on the left with 0 (ensemble_kd.encoders turns right padding), and leave empty rows out."
    real = item_ids != 0
    if not bool(real[:, -1].all()):
        raise EnsembleKDError(where, "an item in the last column of every row", "a row that ends in padding", left)
    if bool((real[:, :-1] > real[:, 1:]).any()):
        raise EnsembleKDError(where, "padding on the left only", "a row with 0 after an item", left)
    if at_least > 1 and (item_ids.shape[1] < at_least or not bool(real[:, -at_least].all())):
        fix = "Leave shorter rows out: one item has no next item to learn from."
        raise EnsembleKDError(where, f"rows of at least {at_least} items", "a shorter row", fix)


def probe(encoder: StackedModule, *, max_len: int | None, highest: int) -> Tensor:
    """Return member 0's output on a tiny batch, (2, l, d) or (2, d), before any training time is lost.

    Args:
        encoder: the members.
        max_len: longest input that they read; None: any.
        highest: the largest id that they must know.

    Raises:
        EnsembleKDError: the encoder returns something else, or fails.
    """
    ids = torch.ones(2, min(max_len or 4, 4), dtype=torch.long)
    ids[1, -1] = highest
    ids = ids.to(next(encoder.parameters(), ids).device)
    out = _evaluated(encoder, ids, highest)
    fix = "Return hidden states (b, l, d), or (b, d) for the newest position alone."
    if not isinstance(out, Tensor):
        raise EnsembleKDError("encoder output", "a tensor", type(out).__name__, fix)
    if not (out.ndim == 3 and out.shape[:2] == ids.shape) and not (out.ndim == 2 and len(out) == len(ids)):
        got = f"{tuple(out.shape)} for item_ids of shape {tuple(ids.shape)}"
        raise EnsembleKDError("encoder output", "hidden states (b, l, d) or (b, d)", got, fix)
    if not out.is_floating_point():
        raise EnsembleKDError("encoder output", "floating-point hidden states", str(out.dtype), fix)
    if out.is_meta:
        fix = "Look parameters up by their names in forward; a reference kept elsewhere is never trained."
        raise EnsembleKDError("encoder output", "hidden states made of registered parameters", "others", fix)
    if not bool(out[..., -1, :].isfinite().all()):  # the newest position is no padding
        fix = "Return hidden states, before any classifier: scores with -inf are not. Call the encoder by itself first."
        raise EnsembleKDError("encoder output", "finite hidden states", "inf or nan", fix)
    if out.ndim == 3 and encoder.gives_newest:
        _check_newest(_evaluated(encoder, ids, highest, newest=True), out[:, -1])
    return out


def _check_newest(found: Any, expected: Tensor) -> None:
    """Refuse another state of the newest position, where it is computed alone."""
    shape = tuple(expected.shape)
    if not isinstance(found, Tensor) or found.shape != shape:
        got = f"{shown(found)}"
    else:
        size = float(expected.abs().max().clamp(min=1e-6))
        error = float((found - expected).abs().max()) / size
        if error <= LEAK:
            return
        got = f"one that differs by {error:.1%}"
    fix = "With newest=True, return forward's last position, (b, d), or give that keyword another name."
    raise EnsembleKDError("forward(item_ids, newest=True)", f"the last of the hidden states, {shape}", got, fix)


def check_not_scores(encoder: StackedModule, *, d: int, num_items: int) -> None:
    """Refuse an encoder whose output has a column per item, but whose item tables have not: it returns logits.

    Raises:
        EnsembleKDError: d is v + 1 or v + 2, and no table of so many rows is d wide.
    """
    widths = {p.shape[2] for p in encoder.parameters() if p.ndim == 3 and p.shape[1] > num_items}
    if d in (num_items + 1, num_items + 2) and widths and d not in widths:
        fix = "Return the states before the item classifier: EnsembleKD has one of its own."
        got = f"d = {d}, a column per item: logits, it seems"
        raise EnsembleKDError("encoder output", "hidden states (b, l, d)", got, fix)


def check_causal(encoder: StackedModule, *, max_len: int | None, num_items: int) -> None:
    """Refuse an encoder whose earlier hidden states depend on a later item, since next-item targets would leak.

    Raises:
        EnsembleKDError: with the size of the change.
    """
    if num_items < 2 or (max_len is not None and max_len < 2):
        return
    length = min(max_len or 4, 4)
    ids = (torch.arange(2 * length).view(2, length) % num_items) + 1
    ids = ids.to(next(encoder.parameters(), ids).device)
    changed = ids.clone()
    changed[:, -1] = changed[:, -1] % num_items + 1
    before, after = (_evaluated(encoder, each, num_items)[:, :-1].detach().cpu().double() for each in (ids, changed))
    change = float((after - before).abs().max() / before.abs().max().clamp(min=1e-6))
    if change > LEAK:
        expected, got = "an encoder whose states depend on no later item", f"a change of earlier ones by {change:.1%}"
        fix = "The target of a position is the item after it. Mask later items, or train with objective=MaskedItem()."
        raise EnsembleKDError("NextItem", expected, got, fix)


def _evaluated(encoder: StackedModule, ids: Tensor, highest: int, **options: bool) -> Any:
    """Return member 0's output in evaluation mode, under a seed of its own.

    Raises:
        EnsembleKDError: the encoder fails.
    """
    with torch.no_grad(), encoder.undisturbed():
        try:
            return encoder.call_member(0, ids, training=False, **options)
        except EnsembleKDError:
            raise
        except Exception as error:
            expected = f"a module that reads item_ids {tuple(ids.shape)} with ids up to {highest}"
            fix = "Its embedding needs V + 2 rows: padding, the items 1..V, the mask token. Call it by itself first."
            raise EnsembleKDError("encoder", expected, first_line(error), fix) from error


def check_output(out: Tensor, item_ids: Tensor, *, newest_only: bool) -> None:
    """Refuse hidden states (n, b, l, d) or (n, b, d) whose shape does not follow the input's.

    Raises:
        EnsembleKDError: with both shapes.
    """
    if newest_only:
        fits = out.ndim == 3 and out.shape[1] == len(item_ids)
    else:
        fits = out.ndim == 4 and out.shape[1:3] == item_ids.shape
    if not fits:
        got = f"{tuple(out.shape[1:])} for item_ids of shape {tuple(item_ids.shape)}"
        fix = "Return one hidden state per input position, whatever the length."
        raise EnsembleKDError("encoder output", "hidden states (b, d)" if newest_only else "(b, l, d)", got, fix)


def check_attributes(attributes: Attributes | None, num_items: int) -> None:
    """Refuse a table of attributes of another catalogue.

    Raises:
        EnsembleKDError: with the rows that it has and should have.
    """
    table, classes = getattr(attributes, "table", None), getattr(attributes, "num_attributes", 0)
    if attributes is not None and (not isinstance(table, Tensor) or classes < 1 or len(table) != num_items + 2):
        rows = f"{len(table)} rows and {classes} attributes" if isinstance(table, Tensor) else None
        got = rows or type(attributes).__name__
        fix = "Build them with ItemAttributes.from_dict(..., num_items)."
        raise EnsembleKDError("item_attributes", f"a table of {num_items + 2} rows and >= 1 attributes", got, fix)


def check_vocabulary(vocabulary: Vocabulary | None, num_items: int) -> None:
    """Refuse names of another number of items.

    Raises:
        EnsembleKDError: with both numbers.
    """
    if vocabulary is not None and not (isinstance(vocabulary, Vocabulary) and len(vocabulary) == num_items):
        fix = "Pass data.vocabulary, of the data that the model is for."
        raise EnsembleKDError("EnsembleKD", f"a vocabulary of {num_items} items", repr(vocabulary), fix)


def check_catalogue(where: str, model: EnsembleKD, data: AnySequences) -> None:
    """Refuse data of other items than the model's, or of the same items under other numbers.

    Raises:
        EnsembleKDError: with the numbers of items, or with the first name that differs.
    """
    if data.num_items != model.num_items:
        fix = "Build the model with num_items=data.num_items, or let it grow by ensemble_kd.growing."
        raise EnsembleKDError(where, f"data of {model.num_items} items, as the model", data.num_items, fix)
    here, there = model.vocabulary, data.vocabulary
    if here is not None and there is not None and here != there:
        pairs = zip(here.names, there.names, strict=True)
        number, own, other = next((i, a, b) for i, (a, b) in enumerate(pairs, start=1) if a != b)
        fix = "Read the table with vocabulary=model.vocabulary."
        raise EnsembleKDError(where, f"item {number} to be {own!r}, as in the model", f"{other!r}", fix)
