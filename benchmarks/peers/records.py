"""Results as JSON lines, one a run; a later line of the same run replaces an earlier one."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, environment, revision
from benchmarks.paper.store import pack
from benchmarks.peers.jobs import Job, by_name
from benchmarks.peers.ranking import mean_scores, rank
from ensemble_kd.data import SequenceData
from ensemble_kd.metrics import metric_row

PATH = RESULTS / "peers.jsonl"
Record = Mapping[str, Any]


def lines_of_user_code(job: Job) -> int:
    """Return the lines that a user writes: of the runner's functions that are called user code, without docstrings.

    "User code:" in front of a docstring is any job's, "User code of RecTools:" that of jobs with this model.
    """
    kinds = ["User code:", f"User code of {job.model}:", *(["User code of a student:"] if job.after else [])]
    runner = by_name(job.average).runner if job.average else job.runner
    source = runner.read_text(encoding="utf-8")
    count = 0
    for node in ast.parse(source).body:
        said = (ast.get_docstring(node) or "") if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and said.startswith(tuple(kinds)):
            numbers = {n for part in node.body[1:] for n in range(part.lineno, (part.end_lineno or part.lineno) + 1)}
            written = [source.splitlines()[n - 1].strip() for n in sorted(numbers)]
            count += sum(bool(line) and not line.startswith("#") for line in written)
    return count


def averaged(accounts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one account of several runs whose scores are averaged: minutes and times of serving add up."""
    parts = [each["seconds_of_training"] for each in accounts]
    best = {key: round(sum(each["best"][key] for each in accounts), 2) for key in ("cpu_s", "wall_s")}
    served = [each["serving"] for each in accounts]
    return {
        "curve": [],  # the average was not validated while its parts were trained
        "best": {**best, "ndcg": None},
        "epochs": float(np.mean([each["curve"][-1]["steps"] / each["batches"] for each in accounts])),
        "epoch_cpu_s": [],
        "batches": accounts[0]["batches"],
        "seconds_of_training": {key: round(sum(part[key] for part in parts), 1) for key in ("cpu", "wall")},
        "peak_mib": max(each["peak_mib"] for each in accounts),
        "parameters": sum(each["parameters"] for each in accounts),
        "serving": {
            "request_cpu_ms": round(sum(each["request_cpu_ms"] for each in served), 3),
            "request_wall_ms": round(sum(each["request_wall_ms"] for each in served), 3),
            "users_per_cpu_s": round(1 / sum(1 / each["users_per_cpu_s"] for each in served), 1),
        },
        "agreement": min(each["agreement"] for each in accounts),
    }


def record(
    job: Job, folders: Sequence[Path], data: SequenceData, installed: Mapping[str, Any], **run: Any
) -> dict[str, Any]:
    """Rank what a runner left in its folder, or the average of several, and return the record of the run.

    Args:
        job: what was run.
        folders: where; several for an average.
        data: the sequences of the same file.
        installed: the environment's account.
        run: what it was run with: dataset, seed, minutes.
    """
    accounts = [json.loads((folder / "account.json").read_text(encoding="utf-8")) for folder in folders]
    account = averaged(accounts) if job.average else accounts[0]
    found = rank(mean_scores(folders), data)
    return {
        "name": job.name,
        **run,
        "library": job.library,
        "version": installed["version"],
        "settings": (by_name(job.average) if job.average else job).of(run["dataset"]),
        "source": job.source,
        "after": job.after,
        "test": {name: round(value, 5) for name, value in metric_row(found).items()},
        "protocol": f"{data.held_out} test, {len(found)} users, all {data.num_items} items ranked, exclude='history'",
        "ranks": pack(found),
        **account,
        "lines": lines_of_user_code(job),
        "installed": {name: installed[name] for name in ("packages", "seconds", "mib", "torch_mib", "pip_check")},
        "machine": {**environment(), "threads": 1},
        "revision": revision(),
    }


def read(path: Path = PATH) -> list[dict[str, Any]]:
    """Return the last record of each run, in the order in which they were first kept."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.strip()]
    return list({(each["name"], each["dataset"], each["seed"], each["minutes"]): each for each in records}.values())


def with_batches(each: Record, earlier: Sequence[Record]) -> dict[str, Any]:
    """Return a record with the batches of an epoch.

    A run of ``fit`` that ended within its first epoch does not know them; they are those of any other one with the
    same data and the same windows, whatever its network.
    """
    if each["batches"] or "fit" in each["settings"]:
        return dict(each)
    of_fit = [e for e in earlier if "ensemble_kd" in e["name"] and "fit" not in e["settings"]]
    known = [e["batches"] for e in of_fit if e["dataset"] == each["dataset"] and e["batches"]]
    return {**each, "batches": known[0] if known else 0}


def append(each: Record, path: Path = PATH) -> None:
    """Keep a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(each, allow_nan=False) + "\n")
