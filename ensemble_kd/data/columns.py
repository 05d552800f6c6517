"""Columns of a table of pandas, polars or Arrow, or of a dict of lists, as plain values and as times to sort by.

A table is anything whose ``table[name]`` is a column. So none of the libraries is imported, nor needed.
"""

from __future__ import annotations

import datetime
from collections.abc import Hashable
from typing import Any, TypeAlias

import numpy as np

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import number, shown

Table: TypeAlias = Any  # pandas.DataFrame, polars.DataFrame, pyarrow.Table, a dict of lists or arrays
Times: TypeAlias = np.ndarray[Any, Any]
MISSING = {"NAType", "NaTType"}  # the types of pandas' missing values, which equal nothing, not even themselves


def column(where: str, table: Table, name: str) -> Any:
    """Return a column as the table has it.

    Raises:
        EnsembleKDError: there is none of that name.
    """
    try:
        found = table[name]
    except Exception as error:  # each library has errors of its own
        got = ", ".join(map(str, _names(table))) or type(table).__name__
        fix = "Name the column to read. A lazy or streamed table is to be collected first."
        raise EnsembleKDError(where, f"a table with a column {name!r}", got, fix) from error
    if isinstance(found, list | tuple):
        return list(found)
    if _reader(found) is None:
        fix = "Name a column of the table that no other has the name of."
        raise EnsembleKDError(where, f"one column {name!r}", type(found).__name__, fix)
    return found


def _names(table: Table) -> list[Any]:
    if isinstance(table, dict):
        return list(table)
    if not hasattr(table, "__len__"):  # a lazy table would have to run for them
        return []
    named = getattr(table, "column_names", None)  # Arrow's; its columns are arrays
    return list(getattr(table, "columns", ()) if named is None else named)


def values(found: Any) -> list[Any]:
    """Return the values of a column as objects of Python.

    Examples:
        >>> values(np.array([3, 4])), values(["a"])
        ([3, 4], ['a'])
    """
    read = _reader(found)
    return list(found) if read is None else list(read())


def _reader(found: Any) -> Any:
    methods = (getattr(found, name, None) for name in ("to_pylist", "to_list", "tolist"))
    return next((method for method in methods if callable(method)), None)


def ids_of(where: str, table: Table, name: str) -> list[Hashable]:
    """Return a column of ids, none of which is missing.

    Raises:
        EnsembleKDError: with the row of the first that is missing, or cannot be the key of a dict.
    """
    found = values(column(where, table, name))
    try:
        distinct = set(found)
    except TypeError as error:
        fix = "Convert them, to text for example."
        raise EnsembleKDError(where, f"{name!r} of ids that can be keys of a dict", shown(found[0]), fix) from error
    if any(map(missing, distinct)):
        row = next(i for i, value in enumerate(found) if missing(value))
        raise EnsembleKDError(where, f"{name!r} in every row", f"none in row {row}", "Drop such rows first.")
    return found


def missing(value: object) -> bool:
    """Return True for None, NaN and pandas' NA and NaT.

    Examples:
        >>> [missing(value) for value in (None, float("nan"), np.datetime64("NaT", "s"), 0, "")]
        [True, True, True, False, False]
    """
    return value is None or type(value).__name__ in MISSING or bool(value != value)


def times_of(where: str, table: Table, name: str) -> Times:
    """Return a column of numbers, dates or times as an array that sorts: of numbers, or of datetime64 in UTC.

    Raises:
        EnsembleKDError: a column of something else, or a row without a time.
    """
    found = column(where, table, name)
    kind: Any = getattr(found, "dtype", None)
    if getattr(kind, "tz", None) is not None:  # pandas' times with a zone, which NumPy would make a million objects
        array: Times = found.to_numpy(dtype=f"datetime64[{kind.unit}]")
    else:
        array = np.asarray(found)
    if array.dtype.kind in "OUS":
        plain = values(found)
        if any(map(missing, plain)):
            row = next(i for i, value in enumerate(plain) if missing(value))
            raise EnsembleKDError(where, f"{name!r} in every row", f"none in row {row}", "Drop such rows first.")
        array = _of_objects(where, name, plain)
    if array.dtype.kind not in "iufM" or array.ndim != 1:
        raise _no_times(where, name, f"{array.dtype} {array.shape}")
    bad = np.isnat(array) if array.dtype.kind == "M" else ~np.isfinite(array)
    if bad.any():
        row = int(bad.argmax())
        raise EnsembleKDError(where, f"{name!r} in every row", f"{array[row]} in row {row}", "Drop such rows first.")
    return array


def moment(where: str, value: object, kind: Times) -> Any:
    """Return a value that compares with times: a number, or a datetime64 in UTC.

    Raises:
        EnsembleKDError: it does not compare.

    Examples:
        >>> moment("f", "2024-05-01", np.array(["2024-01-01"], dtype="datetime64[D]"))
        np.datetime64('2024-05-01')
    """
    if kind.dtype.kind != "M":
        return number(where, "a point of time as the column has them", value)
    try:
        found = np.datetime64(value) if isinstance(value, str) else _utc(value)
    except (TypeError, ValueError, AttributeError) as error:
        fix = 'Pass a date or a time, such as "2024-05-01".'
        raise EnsembleKDError(where, "a point of time", shown(value), fix) from error
    return found


def _of_objects(where: str, name: str, plain: list[Any]) -> Times:
    if all(isinstance(value, datetime.date) for value in plain):
        return np.array([_utc(value) for value in plain])
    if any(isinstance(value, str | bytes) for value in plain):
        raise _no_times(where, name, f"text such as {next(v for v in plain if isinstance(v, str | bytes))!r}")
    array = np.array(plain)
    return array if array.dtype.kind != "O" else np.array([number(where, name, value) for value in plain])


def _utc(value: Any) -> np.datetime64:
    """Return a date or a time of Python, NumPy or pandas as a datetime64, in UTC if it has a zone."""
    if isinstance(value, np.datetime64):
        return value
    if isinstance(value, datetime.datetime):
        if value.tzinfo is not None:
            value = value.astimezone(datetime.timezone.utc).replace(tzinfo=None)
        exact = getattr(value, "to_datetime64", None)  # pandas', with nanoseconds
        return exact() if exact is not None else np.datetime64(value)  # type: ignore[no-any-return]
    if isinstance(value, datetime.date):
        return np.datetime64(value)
    raise TypeError(type(value).__name__)


def _no_times(where: str, name: str, got: str) -> EnsembleKDError:
    fix = "Parse it first, with pandas.to_datetime or polars' str.to_datetime; time=None takes the table's order."
    return EnsembleKDError(where, f"{name!r} of numbers, dates or times", got, fix)
