"""Malformed calls: a call that works, with one or two arguments replaced by what they cannot be.

The only answer is an ``EnsembleKDError`` in all four parts. Another exception is *raw*, a result is *accepted*, a call
of more than ``LIMIT_S`` seconds is a *hang*. Sizes of 2**70 may be refused or served, but neither raw nor hang.
"""

from __future__ import annotations

import faulthandler
import random
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from ensemble_kd import EnsembleKDError
from tests.faults.junk import HUGE, KINDS
from tests.faults.outcome import Outcome
from tests.faults.surface import VALID, Call, surface

LIMIT_S = 30
MEMORY = 6 << 30  # bytes of address space beyond what is in use: a call that wants more has asked for no bound


class Hang(BaseException):
    """A call took too long."""


def run(count: int, seed: int) -> Outcome:
    """Make ``count`` malformed calls, each function about equally often."""
    outcome, draw = Outcome("malformed calls"), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, _little_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = surface(Path(folder))
        seen: Counter[str] = Counter()
        while outcome.counts["calls"] < count:
            call = draw.choice(calls)
            if not call.kinds:
                continue
            changed = malformed(call, draw)
            outcome.counts["calls"] += 1
            seen[call.name] += 1
            _judge(call, changed, outcome)
        outcome.counts["functions"] = len(seen)
    for kind in ("refused", "raw", "accepted", "hangs"):
        outcome.counts.setdefault(kind, 0)
    return outcome


def malformed(call: Call, draw: random.Random) -> dict[str, Any]:
    """One argument that cannot be used; now and then two."""
    names = draw.sample(sorted(call.kinds), min(len(call.kinds), 2 if draw.random() < 0.15 else 1))
    arguments = call.arguments()
    return {name: _drawn(call, name, arguments[name], draw) for name in names}


def _drawn(call: Call, name: str, given: Any, draw: random.Random) -> Any:
    kind = call.kinds[name]
    optional = kind.endswith("?")
    values = KINDS[kind.rstrip("?")](given)
    if kind in ("natural", "whole_number", "natural?", "whole_number?"):
        values.append(HUGE)
    return draw.choice([value for value in values if not (optional and value is None)])


def _judge(call: Call, changed: dict[str, Any], outcome: Outcome) -> None:
    line = f"{call.name}({', '.join(f'{name}={_short(value)}' for name, value in changed.items())})"
    try:
        with _limited():
            call.function(**{**call.arguments(), **changed})
    except EnsembleKDError as error:
        whole = all(str(part).strip() for part in (error.where, error.expected, error.fix)) and len(str(error)) < 1000
        if whole:
            outcome.counts["refused"] += 1
        else:
            outcome.fault("raw", f"{line} -> an error that lacks a part, or is endless: {error!s:.300}")
    except Hang:
        outcome.fault("hangs", line)
    except Exception as error:
        outcome.fault("raw", f"{line} -> {type(error).__name__}: {str(error)[:160]!r}{_place(error)}")
    else:
        if any(type(value) is int and value == HUGE for value in changed.values()):
            outcome.counts["served"] += 1
        elif all((call.name, name) in VALID or _listed(call.name, name, value) for name, value in changed.items()):
            outcome.counts["valid"] += 1
        else:
            outcome.fault("accepted", line)


def _listed(name: str, argument: str, value: Any) -> bool:
    return (name, argument, _short(value)) in VALID


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype}"
    return repr(value).split(" at 0x")[0][:70]


def _place(error: Exception) -> str:
    trace, place = error.__traceback__, ""
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "/ensemble_kd/" in name:
            place = f" at {name.rpartition('/ensemble_kd/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


@contextmanager
def _limited() -> Iterator[None]:
    """Interrupt Python code after the limit; end the process, with a traceback, if it hangs elsewhere."""

    def stop(_: int, __: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    faulthandler.dump_traceback_later(4 * LIMIT_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _little_memory() -> Iterator[None]:
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
