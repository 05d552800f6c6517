"""``fit``: train a model on sequences, keep the best epoch, survive being killed."""

from ensemble_kd.training.run import FitResult, clip_members_, fit
from ensemble_kd.training.schedules import Cosine, Ramp, Schedule, StepDecay
from ensemble_kd.training.settings import Callback

__all__ = ["Callback", "Cosine", "FitResult", "Ramp", "Schedule", "StepDecay", "clip_members_", "fit"]
