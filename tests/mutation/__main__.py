"""Draw changes of the library's code and run the tests that can notice them: ``python -m tests.mutation --count 200``.

The tests of a room are collected once. For each change the process is forked, the functions of the module get the
changed code, and the tests run: first the doctests and tests of the file itself, then the quick tests of its room,
until one fails or time is up, which counts as noticed. What no test noticed is a survivor: to be killed by a new test,
or listed in equivalent.py with the reason. Ends with 1 if there is one.

``--save FILE`` keeps a line of JSON for each change, ``--again FILE`` runs the survivors of such a file once more, and
``--table FILE`` prints it as RESULTS.md has it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.mutation.changes import Change, changes
from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.live import put
from tests.mutation.table import table

ROOT = Path(__file__).parents[2]
LIMIT_S = 600  # of the processor, for the tests without a change; with one they get thrice what they took
HANGS_S = 1800  # of the clock, for tests that wait for nothing
# files (of the package) -> the tests that can notice a change of them
TESTS = {
    "functional.py": ["tests/test_functional.py", "tests/spec", "tests/losses"],
    "metrics.py": ["tests/test_metrics.py", "tests/test_evaluation.py"],
    "serving.py": ["tests/test_serving.py", "tests/ensemble"],
    "losses/*.py": ["tests/losses", "tests/spec"],
    "objectives/*.py": ["tests/objectives", "tests/losses/test_sampled.py", "tests/spec/test_identities.py"],
    "stacking/*.py": ["tests/stacking", "tests/ensemble"],
    "training/*.py": ["tests/training"],
    "internal/files.py": ["tests/test_files.py", "tests/training"],
    "data/mapped.py": ["tests/data"],
    "data/ragged.py": ["tests/data"],
    "data/opening.py": ["tests/data/test_mapped.py"],
    "export/weights.py": ["tests/export/test_weights.py"],
    "evaluation/ranking.py": ["tests/test_evaluation.py", "tests/training"],
}
ELSEWHERE = {"row_kernel.py", "graphs.py"}  # run on CUDA alone; tests/device has them
OPTIONS = ["-x", "-qq", "-s", "-m", "not slow", "-p", "no:cacheprovider"]


def files() -> dict[str, list[str]]:
    """Every file that may change, with its tests."""
    package = ROOT / "ensemble_kd"
    return {
        path.relative_to(package).as_posix(): tests
        for pattern, tests in TESTS.items()
        for path in sorted(package.glob(pattern))
        if path.name not in ("__init__.py", *ELSEWHERE)
    }


def source_of(file: str) -> str:
    return (ROOT / "ensemble_kd" / file).read_text(encoding="utf-8")


def drawn(count: int, seed: int) -> list[tuple[str, Change]]:
    """Draw changes, each file by its number of them."""
    everything = [(file, change) for file in files() for change in changes(source_of(file))]
    return random.Random(seed).sample(everything, min(count, len(everything)))


def find(key: str) -> tuple[str, Change] | None:
    """Return the change of that name, unless the code is another now."""
    file, _, rest = key.partition(" ")
    source, function = source_of(file), rest.partition(":")[0]
    of_function = [change for change in changes(source) if change.function == function]
    return next(((file, change) for change in of_function if change.key(file, source) == key), None)


class CannotPutError(Exception):
    """A change that cannot be put into a living function: to be looked at by hand, so it counts as a survivor."""


class Hunt:
    """A plugin of pytest that runs the tests of a room once for each change, in place of once."""

    def __init__(self, chosen: Sequence[tuple[str, Change]], tell: Callable[[str, Change, str], None]) -> None:
        self.chosen, self.tell = chosen, tell

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("The tests cannot be collected.")
        found, seconds = _forked(lambda: _failed(session, session.items), LIMIT_S)
        if found != "survived":
            raise session.Interrupted(f"The tests do not pass without a change ({found}).")
        for file, change in self.chosen:
            self.tell(file, change, _forked(lambda f=file, c=change: self._changed(session, f, c), 3 * seconds + 60)[0])
        return True

    def _changed(self, session: pytest.Session, file: str, change: Change) -> bool:
        try:
            put(ROOT / "ensemble_kd" / file, change)
        except ValueError as error:
            raise CannotPutError from error
        room, _, name = f"tests/{file}".rpartition("/")
        own = {ROOT / "ensemble_kd" / file, ROOT / room / f"test_{name}"}
        return _failed(session, sorted(session.items, key=lambda item: item.path not in own))


def _failed(session: pytest.Session, items: Sequence[pytest.Item]) -> bool:
    """Run tests until one fails."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return True
    return False


def _forked(failed: Callable[[], bool], limit: float) -> tuple[str, float]:
    """Run tests in a fork: the outcome, and seconds of the processor, which the load of other programs hardly moves."""
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), resource.RLIM_INFINITY))
        try:
            os._exit(int(failed()))
        except CannotPutError:
            os._exit(2)
        except BaseException:  # a change may break pytest's own work: noticed
            os._exit(1)
    end = time.monotonic() + HANGS_S
    while time.monotonic() < end:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2:
                return "survived", 0.0
            late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
            passed = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
            return "timed out" if late else "survived" if passed else "killed", used.ru_utime + used.ru_stime
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timed out", limit


def hunt(chosen: Iterable[tuple[str, Change]], tell: Callable[[str, Change, str], None]) -> None:
    """Try the changes, room by room, each room in a process of its own."""
    rooms: dict[tuple[str, ...], list[tuple[str, Change]]] = {}
    known = files()
    for file, change in chosen:
        if change.key(file, source_of(file)) in EQUIVALENT:
            tell(file, change, "equivalent")
        else:
            rooms.setdefault(tuple(known[file]), []).append((file, change))
    for tests, several in rooms.items():
        child = os.fork()
        if not child:
            with tempfile.TemporaryDirectory() as folder:
                doctests = sorted({f"ensemble_kd/{file}" for file, _ in several})
                options = [*OPTIONS, f"--basetemp={folder}/tests"]
                code = int(pytest.main([*options, *doctests, *tests], plugins=[Hunt(several, tell)]))
            os._exit(code if code != pytest.ExitCode.NO_TESTS_COLLECTED else 0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise SystemExit(f"Stopped at {' '.join(tests)}.")


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
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(1)  # before the forks
    command = ["git", "rev-parse", "--short", "HEAD"]
    revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    seeds: dict[str, int] = {}
    kept: list[dict[str, Any]] = []
    if args.again is None:
        chosen = [each for each in drawn(args.count, args.seed) if args.only in each[0]]
    else:
        kept = [line for line in _lines(args.again) if line["outcome"] != "survived"]
        lines = [line for line in _lines(args.again) if line["outcome"] == "survived"]
        seeds = {line["change"]: line["seed"] for line in lines}
        chosen = [each for line in lines if (each := find(line["change"])) is not None]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as fresh:

        def tell(file: str, change: Change, found: str) -> None:
            key = change.key(file, source_of(file))
            line = {"seed": seeds.get(key, args.seed), "file": file, "line": change.line, "change": key}
            line |= {"outcome": found, "revision": revision}
            line |= {"reason": EQUIVALENT[key]} if found == "equivalent" else {}
            if found == "survived":
                print(f"{file}:{change.line} {key}", flush=True)
            for path in filter(None, (Path(fresh.name), args.save)):
                with path.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(line) + "\n")

        hunt(chosen, tell)
        found = [*kept, *_lines(Path(fresh.name))]
    if args.again is not None:
        args.again.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    print("\n".join(table(found)), flush=True)
    return int(any(line["outcome"] == "survived" for line in found))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
