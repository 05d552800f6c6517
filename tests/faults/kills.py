"""``kill -9`` at random instants and at random file operations; a run that was killed must end as one that was not.

Each run is a forked process: the parent imports torch, but computes nothing with it, and kills the child.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ensemble_kd import (
    CCL,
    ICL,
    KD,
    EnsembleKD,
    MaskedItem,
    NextItem,
    fit,
)
from ensemble_kd.data import MappedSequences, synthetic, write_sequences
from ensemble_kd.distillation import FromTeacher
from ensemble_kd.encoders import BERT4Rec, SASRec
from ensemble_kd.internal import files
from ensemble_kd.training import FitResult, Ramp
from tests.faults.damage import seen
from tests.faults.outcome import Outcome
from tests.training.runs import log_of

V, L = 40, 6
DATA = synthetic(num_users=48, num_items=V, num_clusters=5, max_len=10)
AT_ONCE = 6  # kills of one run, at most; then it may end
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "shutil.rmtree"}
Train = Callable[..., tuple[EnsembleKD, FitResult]]


def _causal(**changes: Any) -> EnsembleKD:
    options = {"losses": 0.05 * (ICL() + CCL()) + 0.1 * KD()} | changes
    return EnsembleKD(lambda: SASRec(V, d_model=4, num_layers=1, max_len=L, dropout=0.2), 2, **options)


def _fit(model: EnsembleKD, data: Any = DATA, **changes: Any) -> tuple[EnsembleKD, FitResult]:
    options = {"epochs": 3, "batch_size": 16, "lr": 1e-2, "window_step": 3, "log_every": 2, "progress": False} | changes
    return model, fit(model, data, **options)


def variants(folder: Path) -> dict[str, Train]:
    """The ways to train; ``folder`` receives data on disk."""
    rows = [DATA.items[a:b].tolist() for a, b in zip(DATA.offsets[:-1], DATA.offsets[1:], strict=True)]
    write_sequences(folder / "mapped", rows, num_items=V)
    masked = MaskedItem(mask_ratio=0.3, views=2)
    student = {"n": 1, "losses": 10 * KD(temperature=1.0)}
    return {
        "plain": lambda **o: _fit(_causal(), **o),
        "sampled": lambda **o: _fit(_causal(objective=NextItem(negatives=8)), **o),
        "ramp": lambda **o: _fit(_causal(), transfer=Ramp(0.3, 0.6), **o),
        "on disk": lambda **o: _fit(_causal(), MappedSequences(folder / "mapped", block=64), **o),
        "distillation": lambda **o: _fit(_student(student), loss=FromTeacher(_causal(seed=7)), **o),
        "masked": lambda **o: _fit(
            EnsembleKD(lambda: BERT4Rec(V, d_model=4, num_layers=1, max_len=L), 2, objective=masked), **o
        ),
        "patience": lambda **o: _fit(_causal(), lr=0.3, epochs=4, patience=1, **o),
    }


def _student(options: dict[str, Any]) -> EnsembleKD:
    return EnsembleKD(lambda: SASRec(V, d_model=4, num_layers=1, max_len=L, dropout=0.1), **options)


def run(count: int, seed: int) -> Outcome:
    """Kill runs ``count`` times."""
    torch.set_num_threads(1)
    outcome, draw = Outcome("kills"), random.Random(seed)
    outcome.counts.update({"kills": 0, "at file operations": 0, "runs": 0, "inexact": 0, "raw": 0})
    with tempfile.TemporaryDirectory() as name:
        known = variants(Path(name))
        unbroken = {kind: _unbroken(train, Path(name, f"whole {kind}")) for kind, train in known.items()}
        while outcome.counts["kills"] < count:
            kind = list(known)[outcome.counts["runs"] % len(known)]
            expected, seconds = unbroken[kind]
            folder = Path(name, f"run {outcome.counts['runs']}")
            _one_run(kind, known[kind], folder, seconds, expected, draw, outcome)
    return outcome


def _unbroken(train: Train, folder: Path) -> tuple[str, float]:
    started = time.monotonic()
    status = _forked(train, folder, every=0.0, kill_at=None, after=None)
    if status:
        raise RuntimeError(f"{folder.name} ends with {status}")
    return _ended(folder), time.monotonic() - started


def _one_run(
    kind: str, train: Train, folder: Path, seconds: float, expected: str, draw: random.Random, outcome: Outcome
) -> None:
    outcome.counts["runs"] += 1
    every, history = draw.choice([0.0, 0.0, 1e9]), []
    for i in range(AT_ONCE + 1):
        kill_at = draw.randrange(1, 60) if draw.random() < 0.5 else None
        after = None if kill_at is not None else draw.uniform(0, seconds)
        if i == AT_ONCE:
            kill_at = after = None
        history.append(f"operation {kill_at}" if kill_at is not None else f"{after} s")
        status = _forked(train, folder, every=every, kill_at=kill_at, after=after)
        if os.WIFSIGNALED(status):
            outcome.counts["kills"] += 1
            outcome.counts["at file operations"] += kill_at is not None
            continue
        if status:
            outcome.fault("raw", f"{kind}, a checkpoint each {every} s, killed at {history}: it ends with an error")
        elif _ended(folder) != expected:
            outcome.fault("inexact", f"{kind}, a checkpoint each {every} s, killed at {history}")
        return


def _forked(train: Train, folder: Path, *, every: float, kill_at: int | None, after: float | None) -> int:
    """Train in a process of its own and return its status. It is killed at a file operation, or after some seconds."""
    child = os.fork()
    if not child:
        try:
            if kill_at is not None:
                _die_at(kill_at)
            model, result = train(output_dir=folder, resume=True, checkpoint_every_s=every)
            found = {"model": model.state_dict(), "best": dict(result.best), "history": result.history}
            files.save(folder / "result", found)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)  # one that has ended is a zombie until it is waited for
    return os.waitpid(child, 0)[1]


def _die_at(operation: int) -> None:
    left = operation

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in FILE_EVENTS:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def _ended(folder: Path) -> str:
    """All that a run leaves behind, but for what a clock has measured."""
    states = [files.load(folder / name) for name in ("result", "last.pt", "best.pt")]
    left = sorted(path.name for path in folder.iterdir() if not path.name.startswith("events.out"))
    return seen([states, log_of(folder), left])
