"""Settings by name besides the defaults: the paper's, as far as it prints them, and strong KD for what overfits.

``EnsembleKD(encoder_fn, n=3, **presets.paper(item_attributes))`` and ``fit(model, data, **presets.PAPER_FIT)``, or
``**presets.strong_kd(item_attributes)`` and ``**presets.STRONG_KD_FIT``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ensemble_kd.ensemble import Attributes
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

STRONG_KD_FIT: Mapping[str, Any] = {"transfer": Ramp(0.2, 0.5)}

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
    ``STRONG_KD_FIT``, for twice as many epochs as were best without KD. For SASRec on Beauty this was the best of all
    settings that were tried. Networks that do not overfit learn more slowly with it and became much worse.

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
