"""A run that nothing interrupted, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from ensemble_kd import EnsembleKD
from ensemble_kd.training import FitResult
from tests.training.runs import (
    sasrec,
    train,
)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[EnsembleKD, FitResult, Path]:
    """A run that was never killed: its model, its result and its folder."""
    folder, model = tmp_path_factory.mktemp("unbroken"), sasrec()
    return model, train(model, output_dir=folder), folder
