"""Tests of ``ensemble_kd.stacking``."""
