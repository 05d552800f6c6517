"""Draw changes of the library's code and run the tests that can notice them: ``python -m tests.mutation --count 200``.

Each change runs in a forked process with a copy of the package. The quick tests of the file's own room run, with its
doctests first, until one fails or time is up, which counts as noticed. What no test noticed is a survivor: to be killed
by a new test, or listed in equivalent.py with the reason. Ends with 1 if there is one.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from tests.mutation.changes import Change, changed, changes
from tests.mutation.equivalent import EQUIVALENT

ROOT = Path(__file__).parents[2]
LIMIT_S = 300
# files (of the package) -> the tests that can notice a change of them
TESTS = {
    "functional.py": ["tests/test_functional.py", "tests/spec/test_identities.py", "tests/losses"],
    "metrics.py": ["tests/test_metrics.py", "tests/test_evaluation.py"],
    "serving.py": ["tests/test_serving.py", "tests/ensemble"],
    "losses/*.py": ["tests/losses", "tests/spec/test_identities.py"],
    "objectives/*.py": ["tests/objectives", "tests/losses/test_sampled.py", "tests/spec/test_identities.py"],
    "stacking/*.py": ["tests/stacking", "tests/ensemble"],
    "training/*.py": ["tests/training"],
    "internal/files.py": ["tests/test_files.py", "tests/training"],
    "data/mapped.py": ["tests/data"],
    "data/opening.py": ["tests/data/test_mapped.py"],
    "export/weights.py": ["tests/export/test_weights.py"],
    "evaluation/ranking.py": ["tests/test_evaluation.py", "tests/training"],
}
ELSEWHERE = {"row_kernel.py"}  # runs on CUDA alone; tests/device has it
OUTCOMES = ("killed", "timed out", "equivalent", "survived")


def files() -> dict[str, list[str]]:
    """Every file that may change, with its tests."""
    package = ROOT / "ensemble_kd"
    return {
        path.relative_to(package).as_posix(): tests
        for pattern, tests in TESTS.items()
        for path in sorted(package.glob(pattern))
        if path.name not in ("__init__.py", *ELSEWHERE)
    }


def drawn(count: int, seed: int) -> list[tuple[str, Change]]:
    """Draw changes, each file by its number of them."""
    everything = [
        (file, change)
        for file in files()
        for change in changes((ROOT / "ensemble_kd" / file).read_text(encoding="utf-8"))
    ]
    return random.Random(seed).sample(everything, min(count, len(everything)))


def outcome(copy: Path, file: str, change: Change, tests: Sequence[str]) -> str:
    """Make one change in the copy, run the tests, and put it back."""
    path = copy / "ensemble_kd" / file
    source = path.read_text(encoding="utf-8")
    path.write_text(changed(source, change), encoding="utf-8")
    try:
        return _tested(copy, [f"ensemble_kd/{file}", *tests])
    finally:
        path.write_text(source, encoding="utf-8")


def _tested(copy: Path, tests: Sequence[str]) -> str:
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        os._exit(_run(copy, tests))
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else "killed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timed out"


def _run(copy: Path, tests: Sequence[str]) -> int:
    """Run pytest in this process, which has imported nothing of the package yet."""
    os.chdir(copy)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "ensemble_kd", "conftest")]:
        del sys.modules[name]
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True
    import pytest

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        return int(pytest.main([*options, *(test for test in tests if (copy / test).exists())]))


def copied(folder: Path) -> Path:
    """Copy what the tests need."""
    for name in ("ensemble_kd", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("conftest.py", "pyproject.toml", "README.md", "ARCHITECTURE.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="changes to draw (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--only", default="", help="files whose path has this text in it")
    parser.add_argument("--save", type=Path, help="add a line of JSON for each change to this file")
    args = parser.parse_args(arguments)
    import torch  # before the forks

    torch.set_num_threads(1)
    table: dict[str, Counter[str]] = {}
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        copy, tests = copied(Path(name)), files()
        if _tested(copy, ["tests/test_metrics.py"]) != "survived":
            raise SystemExit("The tests fail without any change.")
        for file, change in drawn(args.count, args.seed):
            if args.only not in file:
                continue
            key = change.key(file, (ROOT / "ensemble_kd" / file).read_text(encoding="utf-8"))
            found = "equivalent" if key in EQUIVALENT else outcome(copy, file, change, tests[file])
            table.setdefault(file, Counter())[found] += 1
            line = {"seed": args.seed, "file": file, "line": change.line, "change": key, "outcome": found}
            if found == "survived":
                survivors.append(f"{file}:{change.line} {key}")
                print(survivors[-1], flush=True)
            if args.save is not None:
                _append(args.save, line | ({"reason": EQUIVALENT[key]} if key in EQUIVALENT else {}))
    print("\n".join(_table(table)), flush=True)
    return 1 if survivors else 0


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _table(table: dict[str, Counter[str]]) -> list[str]:
    """A Markdown table of counts, by file."""
    rows = [f"| file | drawn | {' | '.join(OUTCOMES)} |", f"|---|{'---|' * (len(OUTCOMES) + 1)}"]
    every: Counter[str] = Counter()
    for file, counts in sorted(table.items()):
        every += counts
        rows.append(f"| {file} | {counts.total()} | {' | '.join(str(counts[name]) for name in OUTCOMES)} |")
    return [*rows, f"| all | {every.total()} | {' | '.join(str(every[name]) for name in OUTCOMES)} |"]


if __name__ == "__main__":
    raise SystemExit(main())
