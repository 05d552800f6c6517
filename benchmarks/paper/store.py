"""Finished runs as JSON lines; per-user ranks packed into text, so that tests can pair users between runs."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.recipes import Run

Record = Mapping[str, Any]
FAR = 255  # ranks from here on are kept as this: no metric looks as far


def pack(ranks: Tensor) -> str:
    """(users,) ranks from 0 as text: one byte a user, compressed."""
    return base64.b64encode(zlib.compress(ranks.clamp(max=FAR).to(torch.uint8).numpy().tobytes(), 9)).decode()


def unpack(text: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the ranks that ``pack`` was given, up to ``FAR``."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)


def read(path: Path) -> dict[str, Record]:
    """Finished runs by key."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.strip()]
    return {Run(**record["run"]).key: record for record in records}


def append(path: Path, run: Run, record: Record) -> None:
    """Add a finished run, in one write, so that several processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"run": asdict(run), **record}, allow_nan=False) + "\n")


@contextmanager
def taken(folder: Path) -> Iterator[bool]:
    """Yield True if this process may have the run of that folder; a process that dies gives it back."""
    try:
        import fcntl
    except ImportError:  # no such locks here: one process at a time
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
