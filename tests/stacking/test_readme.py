"""The page on what to mind names only tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import ensemble_kd

README = Path(ensemble_kd.__file__).parent / "stacking" / "README.md"


def test_every_point_names_a_test() -> None:
    text = README.read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    sources = Path(__file__).parents[1].rglob("test_*.py")
    there = set(re.findall(r"^def (test_\w+)", "\n".join(p.read_text(encoding="utf-8") for p in sources), re.M))
    assert named <= there
    points = [point for point in text.split("\n- ")[1:] if not point.startswith("**Not covered")]
    assert all("`test_" in point for point in points)
