"""``fit``: train a model on sequences, keep the best epoch, survive being killed."""

from ensemble_kd.training.device import best_device
from ensemble_kd.training.fit import FitResult, fit
from ensemble_kd.training.gradients import clip_members_
from ensemble_kd.training.optimizer import RowAdamW
from ensemble_kd.training.schedules import (
    Cosine,
    Hump,
    Ramp,
    Schedule,
    StepDecay,
    WarmupStableAverage,
)
from ensemble_kd.training.settings import Callback, Metric

__all__ = [
    "Callback",
    "Cosine",
    "FitResult",
    "Hump",
    "Metric",
    "Ramp",
    "RowAdamW",
    "Schedule",
    "StepDecay",
    "WarmupStableAverage",
    "best_device",
    "clip_members_",
    "fit",
]
