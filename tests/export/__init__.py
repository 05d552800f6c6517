"""Tests of ``ensemble_kd.export``."""
