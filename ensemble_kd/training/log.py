"""What a training run tells while it goes on: log.jsonl, TensorBoard, a callback, a progress bar."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ensemble_kd.training.settings import Callback


class Means:
    """Means of the loss terms over steps, summed where the terms live, so that a device need not report each step.

    A term counts as 0 in a step that did not compute it.

    Examples:
        >>> import torch
        >>> means = Means()
        >>> means.add({"kd": torch.tensor(1.0)})
        >>> means.add({"kd": torch.tensor(4.0)})
        >>> means.values(), means.steps
        ({'kd': 2.5}, 2)
    """

    def __init__(self, sums: Mapping[str, Tensor] | None = None, steps: int = 0) -> None:
        self.sums, self.steps = dict(sums or {}), steps

    def add(self, terms: Mapping[str, Tensor], steps: int = 1) -> None:
        """Count one step more, or the sums over so many."""
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.detach()
        self.steps += steps

    def values(self) -> dict[str, float]:
        """The mean of each term."""
        return {name: float(value) / self.steps for name, value in self.sums.items()}


class RunLog:
    """Passes each entry on to all who listen, and counts them, so that a resumed run knows where it stopped.

    Args:
        folder: receives log.jsonl, a JSON object a line, and TensorBoard's events where it is installed; None: nothing.
        callback: is given each entry.
        progress: whether to show a bar (where tqdm is installed) and a line an epoch.
    """

    def __init__(self, folder: Path | None, callback: Callback | None, progress: bool) -> None:
        self.folder, self.callback, self.progress = folder, callback, progress
        self.entries = 0
        self._bar: Any = None
        self._writer: Any = None

    def open(self, *, entries: int, step: int) -> None:
        """Go on after so many entries and steps: what a killed run wrote after its checkpoint is written again."""
        self.entries = entries
        if self.folder is None:
            return
        path = self.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(lines[:entries]), encoding="utf-8")
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)

    def write(self, entry: dict[str, Any]) -> None:
        """Pass on one entry, ``{"kind": ..., "step": ..., ...}``."""
        self.entries += 1
        if self.folder is not None:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        if self._writer is not None:
            for name, value in _scalars(entry["kind"], entry):
                self._writer.add_scalar(name, value, entry["step"])
        if self.callback is not None:
            self.callback(entry)

    def say(self, line: str) -> None:
        """Print a line where progress is shown."""
        if self.progress:
            print(line)

    def start_bar(self, total: int, done: int, text: str) -> None:
        """Show a bar, where tqdm is installed."""
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


def _scalars(path: str, value: object) -> Iterator[tuple[str, float]]:
    """The floats of a nested entry, each under its path."""
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, Mapping):
        for name, below in value.items():
            yield from _scalars(f"{path}/{name}", below)
