"""The one exception that this library raises on purpose."""

from __future__ import annotations


class EnsembleKDError(ValueError):
    """Input that the library cannot use: says where, what was expected, what came, and what to do.

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
    """Class and first line of an error of somebody else's, for a text of ours."""
    text = (str(error).strip().splitlines() or ["no text"])[0]
    return f"{type(error).__name__}: {text.rstrip('. ')}"
