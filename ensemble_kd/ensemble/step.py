"""One training step: from a batch of sequences to the weighted sum of all losses, Eq. 19."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ensemble_kd import functional
from ensemble_kd.distributed import (
    Place,
    gather_members,
    gather_rows,
    reduced,
    same_draws,
    shares,
    sum_members_,
)
from ensemble_kd.ensemble.classifier import step_classifier
from ensemble_kd.ensemble.item_loss import ItemLoss, Weighting
from ensemble_kd.ensemble.packing import Packed
from ensemble_kd.losses import (
    CCL,
    ICL,
    KD,
    ItemLosses,
    Loss,
    LossName,
    Spread,
    Term,
    Weight,
    attribute_losses,
    scale_transfer,
    terms_by_name,
    weighted,
)
from ensemble_kd.objectives import Draw, places, selects, splice

if TYPE_CHECKING:
    from ensemble_kd.ensemble.model import EnsembleKD

Terms = dict[LossName, tuple[Weight, Term]]


class Step(NamedTuple):
    """The losses of one training step."""

    total: Tensor  # () what to call backward() on
    terms: dict[str, Tensor]  # each term by its key, () detached and unweighted, for reports


def training_step(
    model: EnsembleKD,
    item_ids: Tensor,
    *,
    generator: torch.Generator | None,
    by_length: bool,
    place: Place,
    item_loss: ItemLoss,
    share: Weight,
    lengths: Sequence[int] | None,
) -> Step:
    """Return the losses of a checked batch; arguments as of ``EnsembleKD.loss``."""
    generator = same_draws(generator, place, item_ids.device)
    named = _scaled_terms(model.losses, share)
    kd = named.get("kd")
    spliced = kd is not None and isinstance(kd[1], KD) and kd[1].on == "spliced"
    run = partial(
        _losses_of_batch,
        model,
        named={name: term for name, term in named.items() if not (spliced and name == "kd")},
        generator=generator,
        by_length=by_length,
        place=place,
        item_loss=item_loss,
    )
    real = run(item_ids, with_targets=True, lengths=lengths)
    if spliced:
        made = run(splice(item_ids, generator=generator), named={"kd": named["kd"]}, with_targets=False, lengths=None)
        real = Step(real.total + made.total, {**real.terms, "kd": made.terms["kd"]})
    more = item_loss.further(item_ids, generator=generator)
    if more is None:
        return real
    made = run(more, with_targets=False, lengths=None)
    return Step((real.total + made.total) / 2, real.terms)


def _scaled_terms(losses: Loss | int, share: Weight) -> Terms:
    """Return the terms by name, with a share of the weights of those that ``scale_transfer`` scales."""
    if isinstance(share, Tensor):
        named = terms_by_name(losses)
        return {name: (weight if name == "ap" else share * weight, term) for name, (weight, term) in named.items()}
    return {**terms_by_name(scale_transfer(losses, share) if isinstance(losses, Loss) and share != 1 else losses)}


def _losses_of_batch(
    model: EnsembleKD,
    item_ids: Tensor,
    *,
    named: Terms,
    generator: torch.Generator | None,
    by_length: bool,
    place: Place,
    item_loss: ItemLoss,
    with_targets: bool,
    lengths: Sequence[int] | None,
) -> Step:
    """Draw, encode, and add up the terms."""
    draw = model.objective.draw(
        item_ids,
        mask_token=model.mask_token,
        newest_only=model.newest_only,
        generator=generator,
        lengths=lengths,
    )
    m = model.objective.views
    anchored = any("anchor" in term.needs for _, term in named.values())
    # Where views are unmasked and nothing contrasts them with the anchor, view 0 is the anchor.
    separate = anchored and not (model.objective.views_are_unmasked and not {"icl", "ccl"} & named.keys())
    with step_classifier(model, draw, place) as classifier:
        copies = torch.cat([draw.inputs, draw.anchor[None]]) if separate else draw.inputs
        hidden = model.states(copies, by_length=by_length, lengths=draw.lengths)
    views, anchor = hidden.copies(slice(m)), hidden.copies(slice(m, None) if separate else slice(1))
    product_dtype = _product_dtype(hidden.flat)
    with torch.autocast(item_ids.device.type, enabled=False):
        kd_weight, kd = named.get("kd", (0.0, KD()))
        assert isinstance(kd, KD)
        # Every view has equally many targets, so a sum over views of means is m times the mean over all.
        weighting = Weighting(
            targets=float(m) if with_targets else 0.0,
            kd_weight=kd_weight * m,
            kd=kd,
            ambiguity_weight=named["ambiguity"][0] * m if "ambiguity" in named else 0.0,
            product_dtype=product_dtype,
            kinds=model.encoder.kinds,
            spread=None if place.member is None else Spread(len(model), partial(sum_members_, place=place)),
        )
        main = item_loss(draw, views.at(draw.positions), classifier, weighting)
        own = _shares(draw, place, main.total.dtype)
        if own is not None:
            main = ItemLosses(*(own[0] * part for part in main))
        total, terms = main.total, {model.objective.name: m * main.cross_entropy.sum()}
        if "kd" in named:
            terms["kd"] = m * main.kd
        if "ambiguity" in named:
            terms["ambiguity"] = m * main.ambiguity
        if "ap" in named:
            value = _attribute_loss(model, draw, anchor, product_dtype)
            value = value if own is None else own[1] * value
            total, terms["ap"] = total + weighted(named["ap"][0], value), value.detach()
        for name, value in _contrastive_losses(named, views, anchor, place).items():
            # All processes have computed it, with the members of all: their sum must contain it once.
            total, terms[name] = total + weighted(named[name][0], value), value.detach() / place.member_size
        return Step(total, reduced(terms, place))


def _shares(draw: Draw, place: Place, dtype: torch.dtype) -> Tensor | None:
    """Return the weights of this process's means over targets and over attributed positions; None: it has all rows."""
    if place.data is None:
        return None
    targets = len(draw.targets) if draw.valid is None else draw.valid.sum()
    return shares(place, targets, (draw.anchor_items != 0).sum()).to(dtype)


def _attribute_loss(model: EnsembleKD, draw: Draw, anchor: Packed, product_dtype: torch.dtype) -> Tensor:
    assert model.attribute_table is not None
    items = draw.anchor_items.flatten()
    real = items != 0
    if selects(items) or draw.attributed is not None:
        kept = real.nonzero()[:, 0] if draw.attributed is None else places(real, draw.attributed)
        states, items, real = anchor.at(kept), items[kept], real[kept]
    else:
        states = anchor.flat
    weight, bias = model.attribute_classifier.weight, model.attribute_classifier.bias
    assert weight is not None
    attributes = model.attribute_table[items]
    return attribute_losses(states, weight, bias, attributes, real, product_dtype=product_dtype).sum()


def _contrastive_losses(named: Terms, views: Packed, anchor: Packed, place: Place) -> dict[LossName, Tensor]:
    values: dict[LossName, Tensor] = {}
    icl, ccl = named.get("icl"), named.get("ccl")
    one_matrix = bool(icl and ccl) and vars(icl[1]) == vars(ccl[1])  # type: ignore[index]
    for name, (_, term) in named.items():
        if name in values or not isinstance(term, ICL | CCL):
            continue
        if place.size > 1:
            both = torch.cat([anchor.pooled(term.pool), views.pooled(term.pool)], dim=1)
            both = gather_members(gather_rows(_at_least_float(both), place, dim=2), place)
            anchors, others = [both[:, 0]], [both[:, 1:]]
        else:
            anchors = [_at_least_float(group[:, 0]) for group in anchor.by_group(term.pool)]
            others = [_at_least_float(group) for group in views.by_group(term.pool)]
        found = functional.contrast(anchors, others, temperature=term.temperature, variant=term.variant)
        values[name] = found.icl if name == "icl" else found.ccl
        if one_matrix:
            values["icl"], values["ccl"] = found
    return values


def _at_least_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Return autocast's dtype where it is on (a final LayerNorm returns float32 under it), else the hidden states'.

    Never float16, which has too little range for the gradients of logits.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return torch.float32 if dtype == torch.float16 else dtype
