"""Tests of ``ensemble_kd.distributed``."""
