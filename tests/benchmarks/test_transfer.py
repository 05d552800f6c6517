"""The study of what members pass on: declared attempts, and a table of what has run."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import transfer
from benchmarks.paper import store
from benchmarks.transfer import ATTEMPTS, Attempt
from ensemble_kd import KD
from ensemble_kd.losses import Ambiguity


def record(attempt: Attempt, ensemble: int, valid: float) -> dict[str, Any]:
    """A finished attempt in which every user's item has the rank ``ensemble``, and one rank worse for a member."""
    ranks = {
        name: store.pack(torch.full((40,), ensemble + worse)) for name, worse in (("ensemble", 0), ("member 0", 1))
    }
    return {
        "run": asdict(attempt), "ranks": ranks, "valid": [0.0, valid], "best_epoch": 1, "wall_s": 60.0,
        "members": {"jaccard@10": 0.3, "ambiguity": 0.2}, "machine": {"processor": "a CPU", "torch": "2"},
    }  # fmt: skip


def test_attempts_differ_in_one_thing_each() -> None:
    assert len({attempt.key for attempt in ATTEMPTS}) == len(ATTEMPTS)
    for attempt in ATTEMPTS:
        assert attempt.precision == "float32"
        assert (attempt.label.startswith("independent")) == (attempt.losses() == 0)
    named = {attempt.label: attempt.losses() for attempt in ATTEMPTS}
    assert named["Ambiguity of -0.5"] == -0.5 * Ambiguity()
    assert named["KD(part='target') of 3"] == 3 * KD(temperature=1.0, part="target")
    assert named["KD(gate='better') of 1, longer"] == KD(temperature=1.0, gate="better")


def test_the_table_compares_with_the_best_independent_one(tmp_path: Path) -> None:
    sasrec = {attempt.label: attempt for attempt in ATTEMPTS if attempt.encoder == "SASRec"}
    target = sasrec["KD(part='target') of 1"]
    runs = [
        record(sasrec["independent"], 3, 0.07), record(sasrec["independent, longer"], 1, 0.06),
        record(target, 2, 0.08), record(replace(target, seed=1), 2, 0.08),
    ]  # fmt: skip
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(json.dumps(run) for run in runs) + "\n")
    done = transfer.read(path)
    assert [a.label for a in transfer.winners(done, "SASRec")] == ["independent", target.label]
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in transfer.report(done).splitlines()}
    assert lines["independent"][8] == f"{1 / torch.tensor(5.0).log2():.4f}"  # at rank 3 from 0
    assert lines["independent"][9].strip() == ""
    assert lines[target.label][1] == "2"
    assert lines[target.label][9].startswith("+0.0693")
    assert "GRU4Rec" not in transfer.report(done)
    todo = [a for a in transfer.wanted(done, 2, list(transfer.BASES)) if a.key not in done]
    assert todo[-1] == replace(sasrec["independent"], seed=1)
