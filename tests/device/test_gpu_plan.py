"""The plan of a lease runs whole on the simulated device: every row is there, and none failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from tests.device import simulated

pytestmark = [pytest.mark.device, pytest.mark.slow]


def test_every_row_is_there_and_none_failed(tmp_path: Path) -> None:
    with simulated.device():
        path = gpu.main(["--quick", "--device", simulated.NAME, "--minutes", "60", "--out", str(tmp_path)])
    parts: dict[str, Any] = json.loads(path.read_text())["parts"]
    tables = ["questions", "checks", "limits", "loss", "backends", "step", "evaluate", "memory", "members"]
    assert list(parts) == [*tables, "train"]
    for name in tables:
        assert "error" not in parts[name], parts[name]
        for row in parts[name]["rows"]:
            assert not isinstance(row.get("error"), str), row  # a check's error is a number
            assert "memory_error" not in row
            assert row.get("ok", True), row
    assert parts["train"]["stopped"] == "all epochs done"
    assert len(parts["train"]["epochs"]) == 2
