"""Tests of ``ensemble_kd.training``."""
