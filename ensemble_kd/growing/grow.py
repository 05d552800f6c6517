"""``grow``: the model with rows for new items."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import nn

from ensemble_kd.data import AnySequences, ItemAttributes, MappedSequences, SequenceData, Vocabulary
from ensemble_kd.ensemble import Attributes, EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.growing.encoders import extend, fill_larger
from ensemble_kd.growing.rows import Initial, initial_rows
from ensemble_kd.internal import instance, is_whole, shown, whole
from ensemble_kd.stacking import Factories, Heads, build_members, factories_of

MOST_NEW = 2**30  # items


def grow(
    model: EnsembleKD,
    new: AnySequences | Iterable[Hashable] | int,
    *,
    encoder_fn: Factories | None = None,
    item_attributes: Attributes | None = None,
) -> EnsembleKD:
    """Return the model with rows for new items, which come after the old ones.

    Embedding, classifier row and bias of a new item are the mean of the old items'. With attributes, they are the mean
    over the item's attributes of the mean of the old items that have the attribute. All other weights are copies, bit
    for bit, and so are the scores of sequences of old items. Ensembles and students grow alike, with a linear or a tied
    classifier. ``fit(grown, data.newest(...), **presets.WARM_FIT)`` goes on from there.

    Args:
        model: trained; it stays as it is.
        new: data of old and new items, numbered with ``vocabulary=model.vocabulary``; or the names of the new items;
            or their number, if the model has no vocabulary.
        encoder_fn: the factory for the larger catalogue; or factories, as of ``EnsembleKD``. None: the encoders' own
            embeddings of v + 2 rows are extended, which is refused if an encoder holds other sizes of the catalogue.
        item_attributes: of old and new items; default: those of ``new``, if it is data. Those of old items must be as
            before. A model that was trained with attributes needs them.

    Returns:
        A new model, in the mode of the old one.

    Raises:
        EnsembleKDError: items that are numbered in another way or fewer than before, attributes that have changed, an
            encoder that cannot be extended, or weights in other processes.

    Examples:
        >>> from ensemble_kd.encoders import SASRec
        >>> model = EnsembleKD(lambda: SASRec(9, d_model=4, max_len=5), n=2).eval()
        >>> grown, ids = grow(model, 3), torch.tensor([[1, 2, 3]])
        >>> grown.num_items, torch.allclose(grown(ids)[:, :10], model(ids))
        (12, True)
    """
    instance("grow", "model", model, EnsembleKD, "Pass a trained ensemble.")
    model.place.require_whole("grow")
    num_items, vocabulary = _catalogue(model, new)
    if item_attributes is not None:
        fix = "Build them with ItemAttributes.from_dict(..., num_items)."
        instance("grow", "item_attributes", item_attributes, ItemAttributes, fix)
    if item_attributes is None and isinstance(new, SequenceData | MappedSequences):
        item_attributes = new.item_attributes
    attributes = item_attributes if model.item_attributes is not None else None
    _check_attributes(model, attributes, num_items)
    # A model that does not predict attributes may still place its new items by them.
    initial = initial_rows(item_attributes, old=model.num_items, new=num_items)
    n = len(model)
    factories = [None] * n if encoder_fn is None else factories_of(encoder_fn, n)
    members = [_grown_member(model, i, num_items, factories[i], initial) for i in range(n)]
    grown = EnsembleKD.from_members(
        members,
        num_items=num_items,
        objective=model.objective,
        losses=model.losses,
        item_attributes=attributes,
        classifier=model.classifier,
        max_len=model.max_len,
        seed=model.seed,
        backend=model.encoder.requested_backend,
        vocabulary=vocabulary,
    )
    _fill_heads(grown.item_classifier, model.item_classifier, initial)
    if attributes is not None:
        _fill_heads(grown.attribute_classifier, model.attribute_classifier, None)
    if model.is_weighted:
        grown.weigh(model.weights, model.temperatures)
    return grown.to(model.device).train(model.training)


def _catalogue(model: EnsembleKD, new: object) -> tuple[int, Vocabulary | None]:
    """Return the number of items and their names after growing."""
    where, known = "grow", model.vocabulary
    if isinstance(new, SequenceData | MappedSequences):
        names: Vocabulary | None = new.vocabulary
        if known is not None and names is not None and not names.begins_with(known):
            fix = "Read the table with vocabulary=model.vocabulary: known items keep their numbers, new ones follow."
            raise EnsembleKDError(where, "data that numbers the model's items as it does", repr(names), fix)
        num_items = new.num_items
        names = known if names is None else names
    elif is_whole(new):
        num_items, names = model.num_items + whole("grow", "new", new, most=MOST_NEW), known
    else:
        if known is None or isinstance(new, str | bytes) or not isinstance(new, Iterable):
            fix = "Pass their number, or train on data with names."
            expected = "data, names of new items for a model with a vocabulary, or a number"
            raise EnsembleKDError(where, expected, shown(new), fix)
        names = known.extended(new)
        num_items = len(names)
    if num_items < model.num_items:
        fix = "Keep the old items, also those that no one wants any more."
        raise EnsembleKDError(where, f"at least the {model.num_items} items of the model", num_items, fix)
    if names is not None and len(names) != num_items:
        fix = "Pass their names, or data with names."
        raise EnsembleKDError(where, "the names of the new items, as the model has a vocabulary", shown(new), fix)
    return num_items, names


def _check_attributes(model: EnsembleKD, attributes: Attributes | None, num_items: int) -> None:
    where, before = "grow", model.item_attributes
    if before is None:
        return
    if attributes is None:
        fix = "Pass item_attributes of old and new items, or data that has them."
        raise EnsembleKDError(where, "item_attributes, which the model learns from", "none", fix)
    table, old = attributes.table.cpu(), before.table.cpu()
    if len(table) != num_items + 2:
        fix = "Build them with ItemAttributes.from_dict(..., num_items)."
        raise EnsembleKDError(where, f"attributes of {num_items} items", len(table) - 2, fix)
    width = max(table.shape[1], old.shape[1])
    both = [nn.functional.pad(t, (0, width - t.shape[1]), value=-1).sort(dim=1).values for t in (table, old)]
    differing = (both[0][: model.num_items + 1] != both[1][:-1]).any(dim=1).nonzero()
    if len(differing):
        fix = "Number the attributes as before, new ones after the old."
        raise EnsembleKDError(where, "old items with the attributes that they had", f"item {int(differing[0])}", fix)


def _grown_member(
    model: EnsembleKD, i: int, num_items: int, encoder_fn: Callable[[], nn.Module] | None, initial: Initial
) -> nn.Module:
    member = model.encoder.member(i)
    if encoder_fn is None:
        extend(member, model.num_items, num_items, initial)
        return member
    larger = build_members(encoder_fn, i + 1, seed=model.seed, own=lambda _: [i])[0].to(model.device)
    fill_larger(larger, member, old=model.num_items, new=num_items, initial=initial)
    return larger


def _fill_heads(grown: Heads, before: Heads, initial: Initial | None) -> None:
    """Copy the old classes' rows. New ones are ``initial``; without it they stay as they were drawn."""
    with torch.no_grad():
        parts: list[tuple[Any, Any]] = [(grown.weight, before.weight), (grown.bias, before.bias)]
        for after, own in parts:
            if own is None:
                continue
            old = own.shape[1]
            for i in range(len(own)):
                after[i, :old] = own[i]
                if initial is not None:
                    after[i, old:] = initial(own[i])
            after.requires_grad_(own.requires_grad)
