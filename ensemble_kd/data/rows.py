"""One user's item ids as a checked array, whatever they were passed as."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError

MIN_ITEMS = 3  # one to train on, one to validate, one to test
MOST_ITEMS = 2**31 - 2  # V + 1 still fits into 32 bits


def as_row(
    where: str, sequence: Iterable[int], user: int, *, most: int = MOST_ITEMS, least: int = MIN_ITEMS
) -> np.ndarray[Any, Any]:
    """Return a user's item ids as a flat array of integers, checked.

    Args:
        where: the public call, for the message.
        sequence: a list, a tuple, an array or a tensor of item ids.
        user: the user's place among all, for the message.
        most: the largest id allowed.
        least: the fewest items allowed.

    Raises:
        EnsembleKDError: too few items, something besides whole numbers, or ids out of 1..``most``.

    Examples:
        >>> as_row("write_sequences", [4, 1, 2], 0)
        array([4, 1, 2])
        >>> as_row("write_sequences", [1, 1.5, 2], 0)
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: write_sequences: expected at least 3 whole numbers per user, \
got float64 (3,) of user 0. Item ids are whole numbers from 1; leave shorter users out.
    """
    ids = _as_array(sequence)
    if ids.ndim != 1 or len(ids) < least or ids.dtype.kind not in "iu":
        got = f"{ids.dtype} {ids.shape} of user {user}"
        fix = "Item ids are whole numbers from 1; leave shorter users out."
        raise EnsembleKDError(where, f"at least {least} whole numbers per user", got, fix)
    low, high = int(ids.min()), int(ids.max())
    if low < 1 or high > most:
        fix = "Item ids start at 1; 0 is padding."
        raise EnsembleKDError(where, f"item ids in 1..{most}", f"{low}..{high} of user {user}", fix)
    return ids


def _as_array(sequence: Iterable[int]) -> np.ndarray[Any, Any]:
    if isinstance(sequence, np.ndarray):
        return sequence
    if isinstance(sequence, Tensor):
        return sequence.detach().cpu().numpy()
    try:
        ids = list(sequence)
    except TypeError:
        return np.asarray(sequence)  # one number in place of a sequence
    if bool in map(type, ids):
        return np.asarray(ids, dtype=np.object_)  # among whole numbers NumPy would take True for 1
    try:
        return np.asarray(ids)
    except ValueError:  # rows of different lengths
        return np.empty(len(ids), dtype=np.object_)
