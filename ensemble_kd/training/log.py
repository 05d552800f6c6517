"""Reports of a training run while it goes on: log.jsonl, TensorBoard, a callback, a progress bar."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import append, replacing, sync
from ensemble_kd.training.folder import LOG
from ensemble_kd.training.settings import Callback


class RunLog:
    """The reports of one run, passed on entry by entry.

    Args:
        folder: receives log.jsonl, a JSON object per line, and TensorBoard's events if it is installed; None: nothing.
        callback: receives each entry.
        progress: show a bar (if tqdm is installed) and a line per epoch.
    """

    def __init__(self, folder: Path | None, callback: Callback | None, progress: bool) -> None:
        self.folder, self.callback, self.progress = folder, callback, progress
        self._bar: Any = None
        self._writer: Any = None

    def open(self, *, entries: int, step: int) -> int:
        """Go on after so many entries and steps: what a killed run wrote after its checkpoint is written again.

        Returns:
            The number of entries in the log: ``entries``, or 0 if its file was taken away.

        Raises:
            EnsembleKDError: a log in which one of these entries is damaged or missing.
        """
        if self.folder is None:
            return entries
        kept = _shorten(self.folder / LOG, entries)
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)
        return kept

    def write(self, entry: Mapping[str, Any]) -> None:
        """Pass on one entry, ``{"kind": ..., "step": ..., ...}``."""
        if self.folder is not None:
            append(self.folder / LOG, (json.dumps(entry) + "\n").encode())
        if self._writer is not None:
            for name, value in _scalars(entry["kind"], entry):
                self._writer.add_scalar(name, value, entry["step"])
        if self.callback is not None:
            self.callback(entry)

    def sync(self) -> None:
        """Bring the entries so far to the disk."""
        if self.folder is not None:
            sync(self.folder / LOG)

    def say(self, line: str) -> None:
        """Print a line, if progress is shown."""
        if self.progress:
            print(line)

    def start_bar(self, total: int, done: int, text: str) -> None:
        """Show a bar, if tqdm is installed."""
        if self.progress:
            with suppress(ImportError):
                from tqdm.auto import tqdm

                self._bar = tqdm(total=total, initial=done, desc=text, leave=False, mininterval=1.0)

    def advance(self) -> None:
        """Move the bar by a step."""
        if self._bar is not None:
            self._bar.update()

    def show(self, means: Mapping[str, float]) -> None:
        """Write the means beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()})

    def stop_bar(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Leave no bar and no open file behind."""
        self.stop_bar()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _shorten(path: Path, entries: int) -> int:
    """Keep the first entries of a log. The file is replaced, never cut in place: no kill can lose them."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    for i in range(entries):
        if not (i < len(lines) and _is_entry(lines[i])):
            fix = "Move it away, and the run goes on with a new log."
            raise EnsembleKDError("resume", f"{LOG} with {entries} entries", f"{path}, damaged at line {i + 1}", fix)
    if len(lines) > entries:
        with replacing(path) as file:
            file.writelines(lines[:entries])
    return entries


def _is_entry(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _scalars(path: str, value: object) -> Iterator[tuple[str, float]]:
    """Yield the floats of a nested entry, each under its path."""
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, Mapping):
        for name, below in value.items():
            yield from _scalars(f"{path}/{name}", below)
