"""The examples, run as a user runs them, with few steps."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--users=60", "--items=80", "--n=2", "--d-model=8", "--num-layers=1", "--window=8", "--window-step=4"]


def example(name: str, *arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = [str(EXAMPLES / name)] if code is None else ["-c", code]
    return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, cwd=EXAMPLES)


def report_of(text: str) -> list[str]:
    """What was printed of the trained model: table, protocol, recommendations."""
    lines = text[text.index("scorer") :].splitlines()
    return [re.sub(r"Trained in .*|.*curves.*", "", line) for line in lines]


def test_bert4rec_and_its_resume(tmp_path: Path) -> None:
    flags = [*SMALL, "--epochs", "2", "--checkpoint-every", "0"]
    whole = example("bert4rec_emkd.py", *flags, "--output", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.startswith("SequenceData(num_users=60, num_items=80, ")
    report = report_of(whole.stdout)
    assert report[0].split() == ["scorer", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR"]
    assert [line[:12].strip() for line in report[1:5]] == ["popularity", "member 0", "member 1", "ensemble"]
    protocol = "leave-one-out test, 60 users, all 80 items ranked, exclude='history'"
    assert re.fullmatch(re.escape(protocol) + "; weights of epoch [12] of 2", report[5])
    seen, target = re.fullmatch(r"User 0 saw items \[(.*)\], then (\d+)\. Recommended:", report[8]).groups()  # type: ignore[union-attr]
    recommended = [int(item) for item in re.findall(r"(\d+) \(-?\d+\.\d\d\)", report[9])]
    assert len(set(recommended)) == 10
    assert not set(recommended) & {int(item) for item in seen.split(", ")}
    assert 1 <= int(target) <= 80

    results = json.loads((tmp_path / "whole" / "test.json").read_text())
    assert results["protocol"] == protocol
    for line in report[1:5]:
        scorer, *values = line[:12].strip(), *line[12:].split()
        assert values == [f"{value:.4f}" for value in results["rows"][scorer].values()]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert kinds.count("epoch") == 2
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "whole" / "curves.png").read_bytes().startswith(b"\x89PNG")

    # The same, killed after the first step of the second epoch.
    kill = (
        "import os, runpy, signal, sys\n"
        "from ensemble_kd import checkpoints\n"
        "save = checkpoints.save\n"
        "def last(path, content):\n"
        "    save(path, content)\n"
        "    if content.get('position', {}).get('epoch') == 1 and content['position']['batch'] == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoints.save = last\n"
        "sys.path.insert(0, '.')\n"
        "runpy.run_path('bert4rec_emkd.py', run_name='__main__')\n"
    )
    killed = example("", *flags, "--output", str(tmp_path / "killed"), code=kill)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "scorer" not in killed.stdout
    resumed = example("bert4rec_emkd.py", *flags, "--output", str(tmp_path / "killed"), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert report_of(resumed.stdout) == report


def test_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = [{"valid": {s: {"NDCG@10": 0.1 * i} for s in ("member 0", "ensemble")}} for i in range(3)]
    code = "import json, pathlib, sys, common; common.draw_curves(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    drawn = example("", json.dumps(history), str(tmp_path / "curves.png"), code=code)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    without = example("", json.dumps(history), "x.png", code="import sys; sys.modules['matplotlib'] = None; " + code)
    assert without.returncode == 0, without.stderr
    assert without.stdout == "No curves.png: pip install 'ensemble_kd[plots]' for it.\n"
