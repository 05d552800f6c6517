"""Checkpoints that are either whole or not there: written to a temporary file, synced, renamed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.files import replacing


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, strings, and lists and dicts of them) to ``path``.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save(Path(folder, "last.pt"), {"epoch": 3})
        ...     load(Path(folder, "last.pt"))
        {'epoch': 3}
    """
    with replacing(path) as file:
        torch.save(dict(content), file)


def load(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what ``save`` wrote; runs no code that the file may hold.

    Raises:
        EnsembleKDError: no such file, or not a whole checkpoint.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        fix = "Check the path, or start without resume."
        raise EnsembleKDError("checkpoint", "a file that exists", str(path), fix) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        got = f"{path} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'unreadable'})"
        fix = "The file is cut short or something else: use another checkpoint, or start anew."
        raise EnsembleKDError("checkpoint", "a whole checkpoint of ensemble_kd", got, fix) from error
    if not isinstance(content, dict):
        got = f"{path}, which holds a {type(content).__name__}"
        raise EnsembleKDError("checkpoint", "a checkpoint of ensemble_kd", got, "Pass last.pt or best.pt of a run.")
    return content
