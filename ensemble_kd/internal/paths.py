"""Checks of the paths that callers pass, before anything is opened or made."""

from __future__ import annotations

import os
from pathlib import Path

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal.arguments import shown


def file_path(where: str, name: str, value: object) -> Path:
    """Return a path that the system can take, whether or not a file is there.

    A whole number is none, though Python opens it: it would be another's open file.

    Raises:
        EnsembleKDError: anything else.

    Examples:
        >>> file_path("read_text", "path", "data.txt").name
        'data.txt'
        >>> file_path("read_text", "path", 3)
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: read_text: expected path, the path of a file or folder, got 3. \
Pass a string or a Path.
    """
    known = isinstance(value, str | os.PathLike) and not isinstance(value, type)
    text = os.fspath(value) if known else None  # type: ignore[call-overload]
    try:
        if not isinstance(text, str):
            raise ValueError
        os.lstat(text)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        expected = f"{name}, the path of a file or folder"
        raise EnsembleKDError(where, expected, shown(value), "Pass a string or a Path.") from error
    return Path(text)  # type: ignore[arg-type]


def existing_file(where: str, name: str, value: object) -> Path:
    """Return the path of a file that can be read.

    Raises:
        EnsembleKDError: there is none, or it may not be read.

    Examples:
        >>> existing_file("read_text", "path", "no/such.txt")
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: read_text: expected path, a file that can be read, got no/such.txt. \
Check the path and its permissions.
    """
    path = file_path(where, name, value)
    if not (path.is_file() and os.access(path, os.R_OK)):
        fix = "Check the path and its permissions."
        raise EnsembleKDError(where, f"{name}, a file that can be read", str(path), fix)
    return path
