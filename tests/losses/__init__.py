"""Tests of ``ensemble_kd.losses``."""
