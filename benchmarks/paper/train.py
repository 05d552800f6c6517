"""One run: train, take the weights of the best validation, test."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from benchmarks.paper.analysis import diagnose
from benchmarks.paper.recipes import Run
from benchmarks.paper.store import pack
from ensemble_kd import fit
from ensemble_kd.data import SequenceData
from ensemble_kd.distillation import distill
from ensemble_kd.evaluation import evaluate
from ensemble_kd.training import FitResult

METRIC = "NDCG@10"


def train(run: Run, data: SequenceData, folder: Path, *, code: str) -> dict[str, Any]:
    """Train a run by revision ``code`` and return its results; a stopped run goes on from its last checkpoint."""
    model, started = run.model(data), time.monotonic()
    parameters = sum(p.numel() for p in model.parameters())
    options: dict[str, Any] = {
        "batch_size": run.batch_size,
        "lr": run.lr,
        "window": run.fit_window,
        "window_step": run.window_step,
        "precision": run.precision,
        "resume": True,
        "progress": False,
        "seed": run.seed,
    }
    schedules: dict[str, Any] = dict(run.schedules())
    found = fit(model, data, epochs=run.epochs, output_dir=folder, **options, **schedules)
    if run.student_epochs:
        options |= {"epochs": run.student_epochs, "schedule": schedules["schedule"], "output_dir": folder / "students"}
        model, taught = distill(model, run.encoder_fn(data), data, n=run.n, **options)
        best_epoch = len(found.history) + taught.best_epoch
        found = FitResult(best_epoch, taught.best, [*found.history, *taught.history])
    test = evaluate(model, data, "test", exclude="history")
    window = evaluate(model, data, "test", exclude="window")
    return {
        "test": {scorer: {metric: round(v, 5) for metric, v in row.items()} for scorer, row in test.rows.items()},
        "window": round(window.rows["ensemble"][METRIC], 5),
        "protocol": test.protocol,
        "ranks": {scorer: pack(ranks) for scorer, ranks in test.ranks.items()},
        "members": diagnose(model, data) if run.n > 1 else {},
        "best_epoch": found.best_epoch,
        "valid": [round(entry["valid"]["ensemble"][METRIC], 5) for entry in found.history],
        "epoch_s": [round(entry["train_s"], 2) for entry in found.history],
        "wall_s": round(time.monotonic() - started, 1),
        "parameters": parameters,
        "machine": environment(),
        "revision": code,
    }
