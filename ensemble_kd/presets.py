"""Settings by data or by name besides the defaults: an encoder's width and dropout, the paper's settings, strong KD.

``recipe(data, SASRec).ensemble(n=3)`` looks at the data.
``EnsembleKD(encoder_fn, n=3, **presets.paper(item_attributes))`` and ``fit(model, data, **presets.PAPER_FIT)`` go by
name, as do ``**presets.strong_kd(item_attributes)`` and ``fit(model, data, **presets.STRONG_KD_FIT)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import Unpack

from ensemble_kd.data import SequenceData
from ensemble_kd.encoders import BERT4Rec, Caser, GRU4Rec, SASRec
from ensemble_kd.ensemble import Attributes, EnsembleKD, Options
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import shown
from ensemble_kd.losses import AP, CCL, ICL, KD
from ensemble_kd.objectives import MaskedItem
from ensemble_kd.training import Cosine, Ramp, StepDecay

# Sec. 4.1.4; the factor of the decay is not given. The window is Beauty's in the authors' code (Toys 20, ML-1M 40).
PAPER_FIT: Mapping[str, Any] = {
    "epochs": 250,
    "batch_size": 256,
    "lr": 1e-3,
    "schedule": StepDecay(every=100),
    "window": 15,
    "window_step": 1,
}

STRONG_KD_FIT: Mapping[str, Any] = {"transfer": Ramp(2, 5, unit="epochs")}

# For a trained model that learns from what came since: ``fit(model, data.newest(...), **WARM_FIT)``. Half the default's
# rate, falling nearly from the start: the first weights need a warm-up, trained ones do not.
WARM_FIT: Mapping[str, Any] = {"epochs": 5, "lr": 1e-3, "schedule": Cosine(warmup=0.1)}


def paper(item_attributes: Attributes | None = None) -> dict[str, Any]:
    """Return arguments of ``EnsembleKD``: eight views, 15 % of the positions masked, anywhere (Sec. 4.1.4).

    The paper tunes λ, μ and τ and prints only their ranges. Weights and temperature here are those of the authors'
    code.

    Args:
        item_attributes: for AP; None: without AP.

    Examples:
        >>> paper()["objective"]
        MaskedItem(mask_ratio=0.15, views=8, newest=None, negatives=None)
        >>> paper()["losses"]
        0.01 * ICL(temperature=0.3) + 0.01 * CCL(temperature=0.3) + 0.001 * KD(temperature=0.3)
    """
    transfer = 0.01 * (ICL(temperature=0.3) + CCL(temperature=0.3)) + 0.001 * KD(temperature=0.3)
    return {
        "objective": MaskedItem(mask_ratio=0.15, views=8, newest=None),
        "losses": transfer if item_attributes is None else AP() + transfer,
        "item_attributes": item_attributes,
    }


def strong_kd(item_attributes: Attributes | None = None) -> dict[str, Any]:
    """Return arguments of ``EnsembleKD``: KD a thousand times as strong as in the authors' code, at temperature 1.

    For networks that overfit: their best epoch comes early, and without KD longer training makes them worse. Train with
    ``STRONG_KD_FIT``. With a rate that falls, and twice as many epochs as were best without KD, this was the best of
    all settings tried for SASRec on Beauty. With averaged weights, ``fit``'s default, its KD by itself makes members
    better there, of SASRec and of GRU4Rec, and the ensemble of GRU4Rec; not that of SASRec. Networks learn more slowly
    with it: in a number of epochs that was too small without it, they became much worse.

    Args:
        item_attributes: for AP; None: without AP.

    Examples:
        >>> strong_kd()["losses"]
        0.01 * ICL(temperature=0.3) + 0.01 * CCL(temperature=0.3) + KD(temperature=1.0)
    """
    transfer = 0.01 * (ICL(temperature=0.3) + CCL(temperature=0.3)) + KD(temperature=1.0)
    return {
        "losses": transfer if item_attributes is None else 0.2 * AP() + transfer,
        "item_attributes": item_attributes,
    }


# Positions by distance, in the block of RecBole's SASRec.
RELATIVE_BLOCK: Mapping[str, Any] = {
    "num_heads": 2,
    "positions": "relative",
    "activation": "gelu",
    "norm_first": False,
    "scale_embedding": False,
}
_DENSE = 100  # training interactions an item from which on data counts as dense
_ON_DENSE = (64, 0.2)  # width and dropout
_ON_SPARSE = {SASRec: (128, 0.3), GRU4Rec: (128, 0.3), Caser: (128, 0.3), BERT4Rec: (64, 0.2)}
_OWN = ("linear", "a table of its own, as in the paper")
_CLASSIFIERS = {  # and the reason
    SASRec: ("tied", "the items' embeddings, as in its paper; with a table of its own it overfits sparse data"),
    GRU4Rec: _OWN,
    Caser: _OWN,
    BERT4Rec: _OWN,
}
_LENGTHS = (50, 100, 200)  # inputs of an encoder


@dataclass(frozen=True)
class Recipe:
    """An encoder's settings for some data; a setting is the same for all data of such numbers."""

    encoder: Callable[..., nn.Module]
    settings: Mapping[str, Any]  # arguments of the encoder
    options: Options  # of ``EnsembleKD``
    reasons: Mapping[str, str]  # of those that follow from the data

    def encoder_fn(self) -> nn.Module:
        """Return a new encoder: the factory that ``EnsembleKD`` takes."""
        return self.encoder(**self.settings)

    def ensemble(self, n: int = 3, **options: Unpack[Options]) -> EnsembleKD:
        """Return n such encoders as an untrained ensemble.

        Args:
            n: members.
            **options: the keyword arguments of ``EnsembleKD``, in place of the recipe's or besides.
        """
        given: Options = {**self.options, **options}
        return EnsembleKD(self.encoder_fn, n, **given)

    def __str__(self) -> str:
        lines = {name: f"{name} = {value!r}" for name, value in {**self.settings, **self.options}.items()}
        return "\n".join(
            f"{line}  # {self.reasons[name]}" if name in self.reasons else line for name, line in lines.items()
        )


def recipe(data: SequenceData, encoder: type[SASRec | GRU4Rec | Caser | BERT4Rec]) -> Recipe:
    """Return an encoder's settings for data, by how often an item occurs and how long histories are.

    ``recipe(data, SASRec).ensemble(n=3)`` is the model; rate, batch and epochs are left to ``fit``. The settings are a
    start, from two sets of data. Dense: SASRec and GRU4Rec were trained so on ML-1M (267 training interactions an
    item); Caser and BERT4Rec were not tried. Sparse: on validation of Beauty (13), GRU4Rec, Caser and BERT4Rec were
    best so among a few settings (benchmarks/paper/recipes.py). What one network reaches so, beside the best that is
    known on the same data, is in docs/results/defaults.md, written by ``python -m benchmarks.defaults``.

    Args:
        data: the sequences; their training part alone is looked at.
        encoder: ``SASRec``, ``GRU4Rec``, ``Caser`` or ``BERT4Rec``.

    Raises:
        EnsembleKDError: another encoder.

    Examples:
        >>> from ensemble_kd.data import synthetic
        >>> found = recipe(synthetic(num_users=300, num_items=200), SASRec)
        >>> found.settings["d_model"], found.settings["dropout"], found.settings["max_len"]
        (128, 0.3, 50)
        >>> found.options["classifier"], len(found.ensemble(n=2))
        ('tied', 2)
        >>> found.reasons["max_len"]
        '95 of 100 histories have at most 29 items'
    """
    if not isinstance(encoder, type) or encoder not in _ON_SPARSE:
        names = ", ".join(each.__name__ for each in _ON_SPARSE)
        raise EnsembleKDError("recipe", f"one of {names}", shown(encoder), "Set the encoder's arguments yourself.")
    if not isinstance(data, SequenceData):
        raise EnsembleKDError("recipe", "data, a SequenceData", shown(data), "Pass SequenceData.from_sequences(...).")
    items, offsets = data.history("train")
    per_item = len(items) / data.num_items
    usual = int(offsets.diff().double().quantile(0.95).ceil())
    dense = per_item >= _DENSE
    d_model, dropout = _ON_DENSE if dense else _ON_SPARSE[encoder]
    settings: dict[str, Any] = {
        "num_items": data.num_items,
        "d_model": d_model,
        "dropout": dropout,
        "max_len": next((length for length in _LENGTHS if usual <= length), _LENGTHS[-1]),
    }
    if encoder is SASRec:
        settings |= {"d_ff": 4 * settings["d_model"], **RELATIVE_BLOCK}
    often = f"an item has {per_item:.0f} training interactions, {'' if dense else 'not '}{_DENSE} or more"
    length = f"95 of 100 histories have at most {usual} items"
    reasons = {"d_model": often, "dropout": often, "max_len": length, "classifier": _CLASSIFIERS[encoder][1]}
    return Recipe(encoder, settings, {"classifier": _CLASSIFIERS[encoder][0]}, reasons)
