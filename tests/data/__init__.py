"""Tests of ``ensemble_kd.data``."""
