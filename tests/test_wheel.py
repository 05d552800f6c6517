"""The wheel by itself: built, installed into an empty folder, and used away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.snippets import agrees, snippets

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "ensemble_kd" / "__init__.py").is_file(), reason="built from a checkout")
def test_the_quick_start_runs_from_the_wheel_in_an_empty_folder(tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("ensemble_kd-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    quick_start = snippets((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    short = quick_start.code.replace("num_users=1000", "num_users=100").replace("epochs=5", "epochs=1")
    assert short != quick_start.code
    code = f"{short}\nimport ensemble_kd\nprint(ensemble_kd.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *printed, where = done.stdout.splitlines()
    assert Path(where).is_relative_to(site), "the installed package, not the checkout"
    assert quick_start.shown is not None
    assert agrees("\n".join(printed), quick_start.shown)
    assert list(empty.iterdir()) == []
