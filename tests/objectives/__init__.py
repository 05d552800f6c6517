"""Tests of ``ensemble_kd.objectives``."""
