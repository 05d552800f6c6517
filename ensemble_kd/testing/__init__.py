"""``check_encoder``: what an encoder of your own does right and wrong, before any training time is spent on it."""

from ensemble_kd.testing.report import Check, Report, check_encoder

__all__ = ["Check", "Report", "check_encoder"]
