"""The parts that benchmarks share: rounds in turn, memory in a process of its own, the data, the machine, the table."""

from __future__ import annotations

import datetime
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ensemble_kd.data import SequenceData, read_text, synthetic
from ensemble_kd.errors import first_line

Row = dict[str, object]
Step = Callable[[], object]
Shape = tuple[int, ...]
ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
DATA_DIR = "ENSEMBLE_KD_DATA_DIR"  # in the environment, so that the processes that measure memory find it, too
BEAUTY_SIZE = (22363, 12101)  # users and items


@dataclass(frozen=True)
class Times:
    """Milliseconds of one variant, one number a round."""

    ms: tuple[float, ...]
    error: str | None = None  # why the variant could not run; then its times are infinite

    @property
    def median(self) -> float:
        return math.inf if self.error else statistics.median(self.ms)

    @property
    def best(self) -> float:
        return math.inf if self.error else min(self.ms)

    def row(self) -> Row:
        if self.error:
            return {"error": self.error}
        return {"median_ms": sig(self.median), "best_ms": sig(self.best), "worst_ms": sig(max(self.ms))}

    def faster_than(self, other: Times) -> Row:
        if self.error or other.error:
            return {}
        return {
            "times_faster": sig(other.median / self.median, 3),
            "times_faster_best": sig(other.best / self.best, 3),
        }


def sig(value: float, digits: int = 4) -> float:
    """Rounded to so many significant digits."""
    return float(f"{value:.{digits}g}")


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available() and (kind := torch.accelerator.current_accelerator()) is not None:
        torch.get_device_module(kind).synchronize()


def timed_ms(step: Step) -> float:
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def interleaved(
    what: str, steps: Mapping[str, Step], rounds: int, warm_up: int = 1, *, quick: bool = False
) -> dict[str, Times]:
    """Run each variant once per round, so that a busy machine slows all alike; the first rounds do not count.

    ``quick``: a single round, to see that all works. A variant that fails is left out of the rounds that follow, and
    its ``Times`` gives the reason.
    """
    kept: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, str] = {}
    rounds, warm_up = (1, 0) if quick else (rounds, warm_up)
    for i in range(-warm_up, rounds):
        said = f"round {i + 1}/{rounds}" if i >= 0 else "warming up"
        for name, step in steps.items():
            if name in failed:
                continue
            say(f"{what}: {said}, {name}")
            try:
                ms = timed_ms(step)
            except Exception as error:  # on a lent device one variant's fault must not cost the others their rows
                failed[name] = first_line(error)
                continue
            if i >= 0:
                kept[name].append(ms)
    say("")
    return {name: Times(tuple(ms), failed.get(name)) for name, ms in kept.items()}


def kept(what: str, run: Callable[[], Row | list[Row]]) -> list[Row]:
    """Return the rows of a part, or one row that gives the reason why there are none."""
    try:
        found = run()
    except Exception as error:
        return [{"what": what, "error": first_line(error)}]
    return found if isinstance(found, list) else [found]


def say(text: str) -> None:
    """Progress on one line, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r{text[:118]:<118}\r", end="", file=sys.stderr, flush=True)


def gflop(step: Step) -> float:
    """Billions of operations in the products of a step, which runs eagerly: the counter is no place to compile."""

    def products(_: Shape, a: Shape, b: Shape, *__: object, **___: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    # The counter passes over products added in place, and fails at those with a type of their own for the sum.
    mapping = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.addmm), products)
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.compiler.set_stance("force_eager"), counter:
        step()
    return float(counter.get_total_flops()) / 1e9


def resident_mib(field: str) -> float:
    """A field of the kernel's own account of this process: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _measure_memory(make: Callable[..., Step], small: tuple[Any, ...], full: tuple[Any, ...], threads: int) -> Row:
    torch.set_num_threads(threads)
    make(*small)()
    step = make(*full)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far: a child inherits its parent's
    step()
    peak = resident_mib("VmHWM")
    return {"peak_mib": round(peak, 1), "extra_mib": round(peak - before, 1)}


def memory(make: Callable[..., Step], small: tuple[Any, ...], full: tuple[Any, ...], device: str = "cpu") -> Row:
    """Return the MiB of a first step, see ``_memory``, or the reason why it could not run."""
    try:
        return _memory(make, small, full, device)
    except Exception as error:
        return {"memory_error": first_line(error)}


def _memory(make: Callable[..., Step], small: tuple[Any, ...], full: tuple[Any, ...], device: str = "cpu") -> Row:
    """MiB of a first step: at its peak, and above what was held before. ``make(*full)`` builds it, ``small`` warms up.

    On a CPU it is the resident set of a process of its own, where the kernel keeps such an account; on CUDA what the
    allocator gave out.
    """
    if device != "cpu":
        module = torch.get_device_module(device)
        if not hasattr(module, "max_memory_allocated"):  # a device without an account
            make(*full)()
            return {"peak_mib": None, "extra_mib": None}
        make(*small)()
        others = module.memory_allocated()
        step = make(*full)
        before = module.memory_allocated()
        module.reset_peak_memory_stats()
        step()
        peak = module.max_memory_allocated()
        return {"peak_mib": round((peak - others) / 2**20, 1), "extra_mib": round((peak - before) / 2**20, 1)}
    if not Path("/proc/self/clear_refs").exists():
        return {"peak_mib": None, "extra_mib": None}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_memory, make, small, full, torch.get_num_threads()).result()


def beauty_file() -> Path | None:
    folder = os.environ.get(DATA_DIR)
    path = Path(folder, "Beauty.txt") if folder else None
    return path if path and path.is_file() else None


@cache
def beauty(quick: bool = False) -> SequenceData:
    """Amazon Beauty from the folder that ``--data-dir`` names, else made-up data of its size; small with ``quick``."""
    if quick:
        return synthetic(60, 120)
    path = beauty_file()
    return read_text(path, path.with_name("Beauty_item2attributes.json")) if path else synthetic(*BEAUTY_SIZE)


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def revision() -> str:
    """The commit that was measured, with a ``+`` where files of the package or the benchmarks differ from it."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ROOT.parent.joinpath("ensemble_kd").as_posix(), "*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "") or "unknown"


def environment(device: str = "cpu") -> dict[str, object]:
    found: dict[str, object] = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # above the threads: distrust
        "torch": torch.__version__,
    }
    if device == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def data_of_beauty() -> str:
    """Return what ``beauty()`` gives: the file's data, or made-up data."""
    return "Beauty" if beauty_file() else "synthetic, of Beauty's size"


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, one column for each key that any of them has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *(["" if row.get(c) is None else str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def save(name: str, rows: Sequence[Row], seconds: float, machine: Mapping[str, object]) -> Path:
    """Append one JSON line to the results of a benchmark."""
    path = RESULTS / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    entry = {"date": datetime.date.today().isoformat(), "revision": revision(), "machine": dict(machine)}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**entry, "seconds": round(seconds, 1), "rows": list(rows)}, allow_nan=False) + "\n")
    return path
