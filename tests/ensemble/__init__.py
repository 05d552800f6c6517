"""Tests of ``ensemble_kd.ensemble``."""
