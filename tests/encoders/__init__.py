"""Tests of ``ensemble_kd.encoders``."""
