"""What a simulated device waited for, with the line of the package that made it wait."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import ensemble_kd
from tests.device import graphs

PACKAGE = str(Path(ensemble_kd.__file__).parent)


class Wait(NamedTuple):
    """One wait of the host for the device, or of the device for the host."""

    kind: str
    operation: str
    line: str


class Log:
    """The waits, the number of operations by name, and that of matrix products by rows and columns."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.operations: Counter[str] = Counter()
        self.products: Counter[tuple[int, int]] = Counter()
        self.doubles: set[str] = set()  # lines that made tensors of float64, which not every device has

    def clear(self) -> None:
        self.waits.clear()
        self.operations.clear()
        self.products.clear()
        self.doubles.clear()

    def wait(self, kind: str, operation: str) -> None:
        if graphs.capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation}")
        self.waits.append(Wait(kind, operation, line_of_package()))

    def count(self, operation: str) -> None:
        self.operations[operation] += 1


def line_of_package() -> str:
    """Return the innermost line of the package that runs now."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            return f"{file[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


LOG = Log()
