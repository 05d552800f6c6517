"""Any PyTorch sequence-recommendation encoder as an ensemble whose members teach each other."""

from ensemble_kd.ensemble import EnsembleKD, Step
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import AP, CCL, ICL, KD
from ensemble_kd.objectives import MaskedItem, NextItem
from ensemble_kd.serving import Recommendations
from ensemble_kd.training import fit

__all__ = [
    "AP",
    "CCL",
    "ICL",
    "KD",
    "EnsembleKD",
    "EnsembleKDError",
    "MaskedItem",
    "NextItem",
    "Recommendations",
    "Step",
    "fit",
]

__version__ = "0.2.0"
