"""Checks of single arguments: one rule and one wording for the whole library."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import TypeGuard, TypeVar

import torch

from ensemble_kd.errors import EnsembleKDError

T = TypeVar("T")
LARGEST = 2**63 - 1  # of a whole number that torch and NumPy can take


def whole(where: str, name: str, value: object, *, least: int | None = None, most: int | None = None) -> int:
    """Return a whole number as an ``int``.

    Integers of Python and NumPy pass, and so do 0-d integer arrays and tensors. Truth values and floats do not, not
    even 3.0: what was meant is not certain.

    Args:
        where: the public call, for the message.
        name: the argument's name.
        value: what the caller passed.
        least: the smallest number allowed; None: no bound.
        most: the largest number allowed; None: no bound but that of 64 bits.

    Raises:
        EnsembleKDError: anything else.

    Examples:
        >>> whole("fit", "epochs", 3, least=1)
        3
        >>> whole("fit", "epochs", 0, least=1)
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: fit: expected epochs, a whole number >= 1, got 0. Pass such a number.
        >>> whole("recommend", "k", True, least=1, most=50)
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: recommend: expected k, a whole number in 1..50, got True. \
Pass such a number.
    """
    plain = _plain(value)
    low, high = -LARGEST if least is None else least, LARGEST if most is None else most
    in_range = is_whole(plain) and low <= plain <= high
    if not in_range:
        if least is not None and most is not None:
            bounds = f" in {least}..{most}"
        else:
            bounds = "" if least is most else f" >= {least}" if most is None else f" <= {most}"
        raise EnsembleKDError(where, f"{name}, a whole number{bounds}", shown(value), "Pass such a number.")
    return int(plain)  # type: ignore[call-overload, no-any-return]


def is_whole(value: object) -> TypeGuard[int]:
    """Return True for what ``whole`` accepts.

    Examples:
        >>> import numpy as np
        >>> is_whole(np.int64(3)), is_whole(True), is_whole(3.0), is_whole(None)
        (True, False, False, False)
    """
    plain = _plain(value)
    return isinstance(plain, numbers.Integral) and not isinstance(plain, bool)


def number(
    where: str,
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """Return a real number as a ``float``. Infinity passes only if ``most=math.inf`` allows it, NaN never.

    Args:
        where: the public call, for the message.
        name: the argument's name.
        value: what the caller passed: a number of Python or NumPy, a 0-d array or tensor, but no truth value.
        least: the smallest number allowed.
        above: a number that ``value`` must exceed, in place of ``least``.
        most: the largest number allowed.
        below: a number that ``value`` must stay under, in place of ``most``.

    Raises:
        EnsembleKDError: anything else.

    Examples:
        >>> number("fit", "lr", 1, above=0)
        1.0
        >>> number("fit", "lr", 0.0, above=0)
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: fit: expected lr, a finite number > 0, got 0.0. Pass such a number.
        >>> number("SASRec", "dropout", 1.0, least=0, below=1)
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: SASRec: expected dropout, a number in [0, 1), got 1.0. Pass such a number.
    """
    plain = _float(value)
    fits = (
        (math.isfinite(plain) or (plain == math.inf and most == math.inf))
        and (least is None or plain >= least)
        and (above is None or plain > above)
        and (most is None or plain <= most)
        and (below is None or plain < below)
    )
    if not fits:
        expected = f"{name}, {_interval(least, above, most, below)}"
        raise EnsembleKDError(where, expected, shown(value), "Pass such a number.")
    return plain


def ratio(where: str, name: str, value: object, *, above_zero: bool = False) -> float:
    """Return a number in [0, 1], or in (0, 1] with ``above_zero``, as a ``float``.

    Raises:
        EnsembleKDError: anything else.

    Examples:
        >>> ratio("MaskedItem", "mask_ratio", 1, above_zero=True)
        1.0
        >>> ratio("MaskedItem", "mask_ratio", 0.0, above_zero=True)
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: MaskedItem: expected mask_ratio, a number in (0, 1], got 0.0. \
Pass such a number.
    """
    return number(where, name, value, least=None if above_zero else 0, above=0 if above_zero else None, most=1)


def choice(where: str, name: str, value: object, choices: Iterable[T]) -> T:
    """Return ``value``, one of ``choices``.

    Raises:
        EnsembleKDError: anything else, with the choices.

    Examples:
        >>> choice("evaluate", "exclude", "history", ("none", "window", "history"))
        'history'
        >>> choice("evaluate", "exclude", "all", ("none", "window", "history"))
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: evaluate: expected exclude 'none', 'window' or 'history', got 'all'. \
Choose one of these.
    """
    known = tuple(choices)
    for one in known:
        if type(value) is type(one) and value == one:
            return one
    *first, last = map(repr, known)
    listed = f"{', '.join(first)} or {last}" if first else last
    raise EnsembleKDError(where, f"{name} {listed}", shown(value), "Choose one of these.")


def flag(where: str, name: str, value: object) -> bool:
    """Return a truth value. Nothing else passes: "False", 0 and an empty list may all be meant otherwise.

    Raises:
        EnsembleKDError: anything else.

    Examples:
        >>> flag("recommend", "exclude_seen", "False")
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: recommend: expected exclude_seen True or False, got 'False'. \
Choose one of these.
    """
    return choice(where, name, value, (True, False))


def instance(where: str, name: str, value: object, kind: type | tuple[type, ...], fix: str) -> None:
    """Check that a value is an object of a class.

    Raises:
        EnsembleKDError: anything else.

    Examples:
        >>> instance("fit", "callback", 3, str, "Pass a string.")
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: fit: expected callback, a str, got 3. Pass a string.
    """
    if not isinstance(value, kind):
        names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise EnsembleKDError(where, f"{name}, a {names}", shown(value), fix)


def generator(where: str, value: object) -> None:
    """Check a source of randomness: a ``torch.Generator``, or None for torch's global one.

    Raises:
        EnsembleKDError: anything else.
    """
    if value is not None:
        instance(where, "generator", value, torch.Generator, "Pass torch.Generator().manual_seed(0), or None.")


def shown(value: object) -> str:
    """Return one short line that describes ``value``, however large it is, for the "got" of an error.

    Examples:
        >>> import torch
        >>> shown(torch.zeros(2, 3)), shown("ids"), shown(range(5))
        ('Tensor (2, 3) torch.float32', "'ids'", 'range(0, 5)')
    """
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if not isinstance(value, type) and shape is not None and dtype is not None and len(shape):
        return f"{type(value).__name__} {tuple(shape)} {dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: object) -> object:
    """Python's number in a 0-d array or tensor; anything else as it is."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (RuntimeError, ValueError, TypeError):  # a tensor without storage
        return value


def _float(value: object) -> float:
    """NaN for what is no real number."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        return math.nan
    try:
        return float(plain)
    except OverflowError:
        return math.nan


def _interval(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    low, high = least if above is None else above, most if below is None else below
    finite = "a number" if most == math.inf else "a finite number"
    high = None if high == math.inf else high
    if low is not None and high is not None:
        return f"a number in {'[' if above is None else '('}{low:g}, {high:g}{']' if below is None else ')'}"
    if low is not None:
        return f"{finite} {'>=' if above is None else '>'} {low:g}"
    if high is not None:
        return f"{finite} {'<=' if below is None else '<'} {high:g}"
    return finite
