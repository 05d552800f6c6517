"""Draw changes of the library's code and run the tests that can notice them: ``python -m tests.mutation --count 200``.

Each change runs in a forked process with a copy of the package. The file's doctests and its own tests run first, then
the quick tests of its room, until one fails or time is up, which counts as noticed. What no test noticed is a survivor:
to be killed by a new test, or listed in equivalent.py with the reason. Ends with 1 if there is one.

``--save FILE`` keeps a line of JSON for each change, ``--again FILE`` runs the survivors of such a file once more, and
``--table FILE`` prints it as RESULTS.md has it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from tests.mutation.changes import Change, changed, changes
from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.table import table

ROOT = Path(__file__).parents[2]
LIMIT_S = 600  # of tests without a change; with one they get thrice their own time
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


def ordered(file: str, tests: Sequence[str]) -> list[list[str]]:
    """Return the tests in two lots: those of the file itself, which notice most, and those of its room."""
    room, _, name = f"tests/{file}".rpartition("/")
    own = [f"ensemble_kd/{file}", f"{room}/test_{name}"]
    return [own, list(tests)]


class Tried:
    """A copy of the package in which changes are made, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.copy = copied(folder)
        self.seconds: dict[str, float] = {}  # that the tests of a room take without a change

    def outcome(self, file: str, change: Change, tests: Sequence[str]) -> str:
        """Make one change in the copy, run the tests, and put it back."""
        limit = 3 * self._unchanged(tests) + 60
        path = self.copy / "ensemble_kd" / file
        source = path.read_text(encoding="utf-8")
        path.write_text(changed(source, change), encoding="utf-8")
        try:
            return _tested(self.copy, ordered(file, tests), limit)
        finally:
            path.write_text(source, encoding="utf-8")

    def _unchanged(self, tests: Sequence[str]) -> float:
        """Run the tests once without a change: they must pass, or every change would look noticed."""
        name = " ".join(tests)
        if name not in self.seconds:
            start = time.monotonic()
            if (found := _tested(self.copy, [tests], LIMIT_S)) != "survived":
                raise SystemExit(f"Without any change, the tests do not pass: {name} ({found})")
            self.seconds[name] = time.monotonic() - start
        return self.seconds[name]


def _tested(copy: Path, lots: Sequence[Sequence[str]], limit: float) -> str:
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        os._exit(_run(copy, lots))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else "killed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timed out"


def _run(copy: Path, lots: Sequence[Sequence[str]]) -> int:
    """Run pytest in this process, which has imported nothing of the package yet."""
    os.chdir(copy)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "ensemble_kd", "conftest")]:
        del sys.modules[name]
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True
    import pytest

    found = 0
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for lot in lots:
            options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
            found = int(pytest.main([*options, *(test for test in lot if (copy / test).exists())]))
            found = 0 if found == pytest.ExitCode.NO_TESTS_COLLECTED and lot is not lots[-1] else found
            if found:
                break
    return found


def copied(folder: Path) -> Path:
    """Copy what the tests need."""
    for name in ("ensemble_kd", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("conftest.py", "pyproject.toml", "README.md", "ARCHITECTURE.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def revision() -> str:
    """Return the commit that is checked out."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def find(key: str) -> tuple[str, Change] | None:
    """Return the change of that name, unless the code is another now."""
    file = key.partition(" ")[0]
    source = (ROOT / "ensemble_kd" / file).read_text(encoding="utf-8")
    return next(((file, change) for change in changes(source) if change.key(file, source) == key), None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="changes to draw (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--only", default="", help="files whose path has this text in it")
    parser.add_argument("--save", type=Path, help="add a line of JSON for each change to this file")
    parser.add_argument("--again", type=Path, help="run the survivors in this file again, and replace their lines")
    parser.add_argument("--table", type=Path, help="print this file as a table, and run nothing")
    args = parser.parse_args(arguments)
    if args.table is not None:
        print("\n".join(table(_lines(args.table))))
        return 0
    import torch  # before the forks

    torch.set_num_threads(1)
    kept: list[dict[str, Any]] = []
    if args.again is None:
        chosen = [(args.seed, *each) for each in drawn(args.count, args.seed) if args.only in each[0]]
    else:
        kept = [line for line in _lines(args.again) if line["outcome"] != "survived"]
        survivors = [line for line in _lines(args.again) if line["outcome"] == "survived"]
        chosen = [(line["seed"], *each) for line in survivors if (each := find(line["change"])) is not None]
    fresh = []
    with tempfile.TemporaryDirectory() as name:
        tried, tests = Tried(Path(name)), files()
        for seed, file, change in chosen:
            key = change.key(file, (ROOT / "ensemble_kd" / file).read_text(encoding="utf-8"))
            found = "equivalent" if key in EQUIVALENT else tried.outcome(file, change, tests[file])
            line = {"seed": seed, "file": file, "line": change.line, "change": key, "outcome": found}
            fresh.append(line | {"revision": revision()} | ({"reason": EQUIVALENT[key]} if key in EQUIVALENT else {}))
            if found == "survived":
                print(f"{file}:{change.line} {key}", flush=True)
            if args.save is not None:
                _write(args.save, fresh[-1:], "a")
    if args.again is not None:
        _write(args.again, [*kept, *fresh], "w")
    print("\n".join(table([*kept, *fresh])), flush=True)
    return int(any(line["outcome"] == "survived" for line in fresh))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, lines: Sequence[dict[str, Any]], mode: str) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
