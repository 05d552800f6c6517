"""Several processes give one process's gradients, and a run of which one was killed ends as one never killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ensemble_kd.internal import files
from tests.distributed.worker import MESHES, cases
from tests.training.runs import assert_same_checkpoint, log_of

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo"),
]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    pipe = subprocess.PIPE
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 0, out + err
    return out, err


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, float]]]:
    """By number of processes: the largest error of each case in each of them."""
    folder = tmp_path_factory.mktemp("distributed")
    assert finish(start(["-m", "tests.distributed.worker", str(folder)])) == ("", "")  # no warning either
    return {
        world: [json.loads((folder / str(world) / f"{rank}.json").read_text()) for rank in range(world)]
        for world in MESHES
    }


@pytest.mark.parametrize(("world", "case"), [(world, name) for world in MESHES for name, _ in cases(world, Path())])
def test_processes_agree_with_one(world: int, case: str, errors: dict[int, list[dict[str, float]]]) -> None:
    assert max(found[case] for found in errors[world]) < 1e-9


RUN = """
import json, os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
from ensemble_kd import AP, CCL, ICL, KD, EnsembleKD, MaskedItem, fit
from ensemble_kd.data import synthetic
from ensemble_kd.distributed import process_group, restarted
from ensemble_kd.encoders import BERT4Rec

torch.set_num_threads(1)
folder, doomed = Path(sys.argv[1]), len(sys.argv) > 2
data = synthetic(num_users=40, num_items=80, num_clusters=8, max_len=12)

def step(entry):
    if doomed and not again and entry["step"] == 7 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)

with process_group():
    again = restarted()
    losses = AP() + 0.1 * (ICL() + CCL()) + 0.1 * KD()
    model = EnsembleKD(lambda: BERT4Rec(80, d_model=4, num_layers=1, num_heads=1, max_len=6, dropout=0.3), n=2,
                       objective=MaskedItem(views=2), losses=losses, item_attributes=data.item_attributes)
    fit(model, data, epochs=3, batch_size=16, lr=1e-2, window_step=3, output_dir=folder, resume=again,
        checkpoint_every_s=0.0, log_every=1, callback=step, progress=False)
    torch.save(model.state_dict(), folder / f"weights {dist.get_rank()}.pt")
    if again:
        (folder / "restarted").touch()
"""


def test_a_run_of_which_a_worker_was_killed_ends_as_one_never_killed(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = [start([*launch, str(script), str(whole)]), start([*launch, str(script), str(killed), "doomed"])]
    for process in started:
        finish(process)
    assert (killed / "restarted").exists()
    assert not (whole / "restarted").exists()
    for rank in range(2):
        one, other = (torch.load(folder / f"weights {rank}.pt", weights_only=True) for folder in (whole, killed))
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    for name in ("last.pt", "best.pt"):
        assert_same_checkpoint(whole / name, killed / name)
    assert len(files.load(whole / "last.pt")["random"]) == 2
    assert log_of(whole) == log_of(killed)


@pytest.mark.parametrize("spread", [["--members=2", "--members-over=2"], ["--members=3", "--shard"]], ids=" ".join)
def test_an_example_runs_in_several_processes(spread: list[str], tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/train.py"]
    sizes: dict[str, Any] = {"users": 60, "items": 80, "d-model": 8, "epochs": 1, "num-layers": 1, "window": 6}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    out, _ = finish(start([*launch, *flags, *spread, "--output", str(tmp_path)]))
    assert out.count("NDCG@10 of the ensemble") == 1  # one process reports
    assert {"best.pt", "last.pt", "log.jsonl", "test.json"} <= {path.name for path in tmp_path.iterdir()}
    assert len(log_of(tmp_path)) >= 1
