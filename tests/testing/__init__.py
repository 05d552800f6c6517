"""Tests of ``ensemble_kd.testing``."""
