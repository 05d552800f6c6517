"""The examples, run as a user runs them, with few steps."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

slow = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
TRAIN = "train.py"  # the command line; all others are one screen each
ONE_CALL = [path for path in FILES if "def main(users: int" in path.read_text(encoding="utf-8")]  # others have tests
SMALL = ["--users=60", "--items=80", "--n=2", "--d-model=8", "--num-layers=1", "--window=8", "--window-step=4"]
OUTPUT = re.compile(r"last (?:lines?) of\s+output::\n\n((?:    .*\n|\n)+)")
NEEDS = {
    "huggingface_emkd.py": "transformers",
    "index_faiss.py": "faiss",
    "lightning_emkd.py": "lightning",
    "recbole_emkd.py": "recbole",
}


def run(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder)


def train(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run(
        f"import runpy, sys; runpy.run_path({str(EXAMPLES / TRAIN)!r}, run_name='__main__')", *arguments, folder=folder
    )


def shape(text: str) -> list[str]:
    """The words of an output, without what differs from run to run: numbers and the width of columns."""
    plain = re.sub(r"[-+]?\d[\d,.]*(e-?\d+)?%?", "#", text)
    plain = re.sub(r"\[[#, ]+\]", "[#]", plain.replace("nothing to keep", "#"))
    return [" ".join(line.split()) for line in plain.strip().splitlines()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_example_is_one_screen_that_shows_the_two_calls(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    siblings = {other.stem for other in FILES}
    imported = {name for node in ast.walk(ast.parse(text)) for name in modules(node)}
    assert not imported & siblings, "an example stands alone"
    assert "EnsembleKD(" in text
    assert "fit(" in text
    if path.name != TRAIN:
        assert len(text.splitlines()) <= 80


def modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


@slow
@pytest.mark.parametrize("path", ONE_CALL, ids=lambda path: path.name)
def test_an_example_prints_what_its_docstring_shows(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: one of its own would import torch for longer than it trains."""
    if path.name in NEEDS and importlib.util.find_spec(NEEDS[path.name]) is None:
        pytest.skip(f"{NEEDS[path.name]} is not installed")
    source = path.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        if path.name in NEEDS:  # what another library warns of is its own
            warnings.simplefilter("ignore")
        main = runpy.run_path(str(path))["main"]
        for _ in range(2):  # in a row, without a surprise
            main(users=60, epochs=1)
    printed = capsys.readouterr().out
    said = ast.get_docstring(ast.parse(source), clean=False)
    assert said is not None
    shown = OUTPUT.search(said + "\n")
    if path.name == "recbole_emkd.py" and shown is None:
        return  # RecBole installs beside old versions alone
    assert shown, "the docstring shows the last lines of output"
    last = shape(shown[1])
    assert shape(printed)[-len(last) :] == last


def test_the_shape_of_an_output() -> None:
    assert shape("a  0.5000 12,340\n gain: -3.4%, [1, 2]") == ["a # #", "gain: #, [#]"]
    assert shape("gain: nothing to keep") == shape("gain: 88%")
    assert shape("member 0") != shape("ensemble")


@slow
def test_lightning_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    main = f"import runpy; main = runpy.run_path({str(EXAMPLES / 'lightning_emkd.py')!r})['main']"
    calls = "main(users=60, epochs=1); main(users=60, epochs=2, resume=True)"
    resumed = run(f"{main}; {calls}", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "Restored all states from the checkpoint" in resumed.stdout + resumed.stderr


def report_of(text: str) -> list[str]:
    """The part of the output on the trained model: table, protocol, recommendations."""
    lines = text[text.index("scorer") :].splitlines()
    return [re.sub(r"Trained in .*|.*curves.*", "", line) for line in lines]


@slow
def test_the_command_line_and_its_resume(tmp_path: Path) -> None:
    flags = ["--encoder=bert4rec", *SMALL, "--epochs", "2", "--checkpoint-every", "0"]
    whole = train(*flags, "--output", "whole", folder=tmp_path)
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
    again = train(*flags, "--output", "whole", folder=tmp_path)
    assert again.returncode != 0
    assert "overwrite" in again.stderr

    # The same, killed after the first step of the second epoch.
    kill = (
        "import os, runpy, signal\n"
        "from ensemble_kd.training.checkpoints import Checkpoints\n"
        "save = Checkpoints.save\n"
        "def last(self, progress):\n"
        "    save(self, progress)\n"
        "    if (progress.epoch, progress.batch) == (1, 1):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Checkpoints.save = last\n"
        f"runpy.run_path({str(EXAMPLES / TRAIN)!r}, run_name='__main__')\n"
    )
    killed = run(kill, *flags, "--output", "killed", folder=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "scorer" not in killed.stdout
    resumed = train(*flags, "--output", "killed", "--resume", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert report_of(resumed.stdout) == report


@slow
@pytest.mark.parametrize("encoder", ["gru4rec", "caser"])
def test_the_command_line_has_every_encoder(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [TRAIN, f"--encoder={encoder}", *SMALL, "--epochs=1"])
    runpy.run_path(str(EXAMPLES / TRAIN), run_name="__main__")
    assert "NDCG@10 of the ensemble over its members' mean" in capsys.readouterr().out
    assert (tmp_path / "runs" / "train" / "test.json").exists()
