"""A saved model keeps the names of its items."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from ensemble_kd import EnsembleKD
from ensemble_kd.data import Vocabulary
from ensemble_kd.encoders import SASRec
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.export import load, save

pytest.importorskip("safetensors")
NAMES: list[list[Any]] = [
    ["ä", "b\n", "", '"'],
    [3, -1, 2**70, 0],
    [uuid.UUID(int=i) for i in range(4)],
    [b"\xff", b"", b"a", b"b"],
]


def factory() -> SASRec:
    return SASRec(4, d_model=4, max_len=5)


@pytest.mark.parametrize("names", NAMES)
def test_names_survive_save_and_load(names: list[Any], tmp_path: Path) -> None:
    model = EnsembleKD(factory, 2, vocabulary=Vocabulary(names))
    loaded = load(save(model, tmp_path / "model.safetensors"), factory)
    assert loaded.vocabulary == model.vocabulary
    assert loaded.member(0).vocabulary == model.vocabulary


def test_without_names_there_are_none(tmp_path: Path) -> None:
    assert load(save(EnsembleKD(factory, 2), tmp_path / "m"), factory).vocabulary is None


def test_names_that_no_file_keeps_leave_no_file(tmp_path: Path) -> None:
    model = EnsembleKD(factory, 2, vocabulary=Vocabulary([(1,), (2,), (3,), (4,)]))
    with pytest.raises(EnsembleKDError, match="item ids that can be saved, got tuple"):
        save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
