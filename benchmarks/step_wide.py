"""The training step of ``benchmarks.step`` at the paper's width, d = 256."""

from __future__ import annotations

from benchmarks import step
from benchmarks.common import Row


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows as of ``step``, without the terms one by one."""
    return step.width(16 if quick else 256, quick, device)
