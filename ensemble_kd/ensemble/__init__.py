"""``EnsembleKD``: the parts put together."""

from ensemble_kd.ensemble.contract import Attributes
from ensemble_kd.ensemble.model import EnsembleKD, Step, default_losses

__all__ = ["Attributes", "EnsembleKD", "Step", "default_losses"]
