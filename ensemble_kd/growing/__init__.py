"""``grow``: a trained model takes items that appeared since. What it knows of the others stays bit for bit."""

from ensemble_kd.growing.grow import grow

__all__ = ["grow"]
