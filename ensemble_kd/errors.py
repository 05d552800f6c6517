"""The one exception that this library raises on purpose, also for an extra that is not installed."""

from __future__ import annotations

import importlib
from typing import Any


class EnsembleKDError(ValueError):
    """Input that the library cannot use: where, what was expected, what came, and what to do.

    Examples:
        >>> raise EnsembleKDError("KD", "temperature > 0", "-1.0", "Pass a positive temperature.")
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: KD: expected temperature > 0, got -1.0. Pass a positive temperature.
    """

    def __init__(self, where: str, expected: str, got: object, fix: str) -> None:
        # All four go to the base class, so that the exception survives pickling between processes.
        super().__init__(where, expected, got, fix)
        self.where, self.expected, self.got, self.fix = where, expected, got, fix

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, got {self.got}. {self.fix}"


def first_line(error: Exception) -> str:
    """Return class and first line of another library's error, for a text of ours."""
    text = (str(error).strip().splitlines() or ["no text"])[0]
    return f"{type(error).__name__}: {text.rstrip('. ')}"


def import_extra(module: str, *, extra: str, where: str) -> Any:
    """Return a module of an optional dependency.

    Args:
        module: its name, such as "polars".
        extra: the extra of this package that brings it.
        where: the public call that needs it.

    Raises:
        EnsembleKDError: it is not installed.

    Examples:
        >>> import_extra("json", extra="data", where="read").dumps(3)
        '3'
        >>> import_extra("no_such_module", extra="data", where="read_recbole")
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: read_recbole: expected no_such_module, got none installed. \
Run: pip install 'ensemble_kd[data]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fix = f"Run: pip install 'ensemble_kd[{extra}]'"
        raise EnsembleKDError(where, module, "none installed", fix) from error
