"""Results as JSON lines, one a run; a later line of the same run replaces an earlier one."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, environment, revision
from benchmarks.paper.store import pack
from benchmarks.peers.jobs import RUNNERS, Job
from benchmarks.peers.ranking import rank, scores
from ensemble_kd.data import SequenceData
from ensemble_kd.evaluation.ranking import protocol
from ensemble_kd.metrics import metric_row

PATH = RESULTS / "peers.jsonl"
Record = Mapping[str, Any]


def lines_of_user_code(job: Job) -> int:
    """Return the lines that a user writes: of the runner's functions that are called user code, without docstrings."""
    path = RUNNERS / f"run_{job.library}.py"
    source = path.read_text(encoding="utf-8")
    count = 0
    for node in ast.parse(source).body:
        said = (ast.get_docstring(node) or "") if isinstance(node, ast.FunctionDef) else ""
        if isinstance(node, ast.FunctionDef) and (
            said.startswith("User code:") or (job.after is not None and said.startswith("User code of a student:"))
        ):
            numbers = {n for part in node.body[1:] for n in range(part.lineno, (part.end_lineno or part.lineno) + 1)}
            written = [source.splitlines()[n - 1].strip() for n in sorted(numbers)]
            count += sum(bool(line) and not line.startswith("#") for line in written)
    return count


def record(job: Job, folder: Path, data: SequenceData, installed: Mapping[str, Any], **run: Any) -> dict[str, Any]:
    """Rank what a runner left in its folder and return the record of the run.

    Args:
        job: what was run.
        folder: where.
        data: the sequences of the same file.
        installed: the environment's account.
        run: what it was run with: dataset, seed, minutes.
    """
    account = json.loads((folder / "account.json").read_text(encoding="utf-8"))
    found = rank(scores(folder), data)
    return {
        "name": job.name,
        **run,
        "library": job.library,
        "version": installed["version"],
        "settings": job.of(run["dataset"]),
        "source": job.source,
        "after": job.after,
        "test": {name: round(value, 5) for name, value in metric_row(found).items()},
        "protocol": protocol(data, "test", "history", 0, len(found)),
        "ranks": pack(found),
        **account,
        "lines": lines_of_user_code(job),
        "installed": {name: installed[name] for name in ("packages", "seconds", "mib", "torch_mib", "pip_check")},
        "machine": {**environment(), "data": run["dataset"], "threads": 1},
        "revision": revision(),
    }


def read(path: Path = PATH) -> list[dict[str, Any]]:
    """Return the last record of each run, in the order in which they were first kept."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.strip()]
    return list({(each["name"], each["dataset"], each["seed"], each["minutes"]): each for each in records}.values())


def append(each: Record, path: Path = PATH) -> None:
    """Keep a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(each, allow_nan=False) + "\n")


