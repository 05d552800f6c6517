"""Training from sequences on disk: 10 million interactions, the steps that ``fit`` takes on them, and its memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Row, Step, memory, say, sig, timed_ms
from ensemble_kd import EnsembleKD, NextItem, fit
from ensemble_kd.data import MappedSequences, write_sequences
from ensemble_kd.encoders import SASRec

N, WINDOW, BATCH, NEGATIVES = 3, 50, 64, 512
CLUSTERS = 500  # of items; a user stays in one for a while


class _Enough(Exception):
    """Raised to end ``fit`` after so many steps."""


def sequences(interactions: int, items: int, seed: int = 0) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """Made-up users of 20 to 80 items, who walk from an item to a near one and jump now and then."""
    rng = np.random.default_rng(seed)
    left = interactions
    while left > 0:
        length = min(left, int(rng.integers(20, 81)))
        length = left if left - length < 20 else length
        moves = rng.integers(1, items // CLUSTERS + 2, length)
        jumps = rng.random(length) < 0.1
        moves[jumps] = rng.integers(0, items, int(jumps.sum()))
        left -= length
        yield np.cumsum(moves) % items + 1


def make(folder: str, items: int, d: int, steps: int) -> Step:
    """``fit`` for so many steps, from opening the folder on."""

    def enough(entry: Mapping[str, Any]) -> None:
        if entry["step"] == steps:
            raise _Enough

    def run() -> None:
        model = EnsembleKD(
            lambda: SASRec(items, d_model=d, num_layers=1, max_len=WINDOW),
            n=N,
            objective=NextItem(negatives=min(NEGATIVES, items)),
            classifier="tied",
        )
        with suppress(_Enough):
            fit(model, MappedSequences(folder), batch_size=BATCH, log_every=1, callback=enough, progress=False)

    return run


def run(quick: bool) -> list[Row]:
    """Rows: what is on disk, seconds to write it, MiB at the peak of a process that trains on it, ms a step."""
    interactions, items, d, steps = (20_000, 1000, 8, 3) if quick else (10_000_000, 100_000, 64, 20)
    with tempfile.TemporaryDirectory() as folder:
        say(f"stream: writing {interactions} interactions")
        started = time.perf_counter()
        write_sequences(folder, sequences(interactions, items), num_items=items)
        write_s = time.perf_counter() - started
        mib = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
        say(f"stream: {steps} steps")
        found = memory(make, (folder, items, 8, 1), (folder, items, d, steps), "cpu")
        one, many = (timed_ms(make(folder, items, d, count)) for count in (1, 1 + steps))
    row: Row = {
        "interactions": interactions,
        "v": items,
        "n": N,
        "d": d,
        "batch": BATCH,
        "negatives": min(NEGATIVES, items),
    }
    row |= {"disk_mib": round(mib, 1), "write_s": sig(write_s), "steps": steps, **found}
    return [row | {"first_step_ms": sig(one), "step_ms": sig(max(many - one, 0.0) / steps)}]
