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

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--users=60", "--items=80", "--n=2", "--d-model=8", "--num-layers=1", "--window=8", "--window-step=4"]


def example(name: str, *arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = [str(EXAMPLES / name)] if code is None else ["-c", code]
    return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, cwd=EXAMPLES)


def report_of(text: str) -> list[str]:
    """The part of the output on the trained model: table, protocol, recommendations."""
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
        "from ensemble_kd.training.checkpoints import Checkpoints\n"
        "save = Checkpoints.save\n"
        "def last(self, progress):\n"
        "    save(self, progress)\n"
        "    if (progress.epoch, progress.batch) == (1, 1):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Checkpoints.save = last\n"
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


THIRD_PARTY = {
    "huggingface_emkd.py": ("transformers", ["--model=bert"]),
    "huggingface_emkd.py --model=gpt2": ("transformers", ["--model=gpt2"]),
    "recbole_emkd.py": ("recbole", []),
    "lightning_emkd.py": ("lightning", []),
}


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_examples_with_other_libraries(name: str, tmp_path: Path) -> None:
    library, flags = THIRD_PARTY[name]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    flags = [*SMALL, *flags, "--epochs=2", "--output", str(tmp_path)]
    done = example(name.split()[0], *flags)
    assert done.returncode == 0, done.stderr
    report = report_of(done.stdout)
    assert [line[:12].strip() for line in report[1:5]] == ["popularity", "member 0", "member 1", "ensemble"]
    weights = r"the best of 2 epochs" if library == "lightning" else r"weights of epoch [12] of 2"
    assert re.fullmatch(rf"leave-one-out test, 60 users, all 80 items ranked, exclude='history'; {weights}", report[5])
    rows = json.loads((tmp_path / "test.json").read_text())["rows"]
    scores = [tuple(rows[scorer].values()) for scorer in ("member 0", "member 1", "ensemble")]
    assert len(set(scores)) > 1, "members that score alike are no ensemble"


def test_lightning_goes_on_where_it_stopped(tmp_path: Path) -> None:
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    flags = [*SMALL, "--output", str(tmp_path), "--checkpoint-every=0"]
    assert example("lightning_emkd.py", *flags, "--epochs=1").returncode == 0
    resumed = example("lightning_emkd.py", *flags, "--epochs=2", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "the best of 2 epochs" in resumed.stdout
    assert "Restored all states from the checkpoint" in resumed.stdout + resumed.stderr


def test_distil_to_one(tmp_path: Path) -> None:
    done = example("distil_to_one.py", *SMALL, "--epochs=2", "--student-epochs=1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    header = next(i for i, line in enumerate(lines) if "parameters" in line)
    rows = json.loads((tmp_path / "test.json").read_text())["rows"]
    assert list(rows) == ["ensemble of 2", "student", "network alone"]
    for line, (name, row) in zip(lines[header + 1 :], rows.items(), strict=False):
        score, _, parameters, _ = line.removeprefix(name).split()
        assert (score, int(parameters.replace(",", ""))) == (f"{row['NDCG@10']:.4f}", row["parameters"])
    assert rows["ensemble of 2"]["parameters"] == 2 * rows["network alone"]["parameters"]
    assert rows["student"]["parameters"] == rows["network alone"]["parameters"]
    assert lines[-1].startswith("Of the ensemble's gain over a network alone the student keeps: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "ensemble", "student", "test.json"]


def test_index_faiss(tmp_path: Path) -> None:
    if importlib.util.find_spec("faiss") is None:
        pytest.skip("faiss-cpu is not installed")
    small = [flag for flag in SMALL if "num-layers" not in flag]
    done = example("index_faiss.py", *small, "--epochs=1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "for 60 of 60 users" in done.stdout
