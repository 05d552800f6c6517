"""Checkpoints are whole or not there, run no code, and bring random generators back."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemble_kd import EnsembleKDError
from ensemble_kd.seeding import random_state, set_random_state
from ensemble_kd.training import state as checkpoints

CONTENT: dict[str, Any] = {
    "weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False])},
    "position": {"epoch": 3, "batch": 0},
    "history": [{"valid": 0.25, "name": "ensemble"}, None],
}


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoints.save(path, CONTENT)
    assert same(checkpoints.load(path), CONTENT)
    assert os.listdir(tmp_path) == ["last.pt"]
    checkpoints.save(path, {"epoch": 1})  # over an old one
    assert checkpoints.load(path) == {"epoch": 1}


def test_every_length_of_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoints.save(path, CONTENT)
    whole = path.read_bytes()
    for length in {*range(0, len(whole) - 1, 97), 1, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(
            EnsembleKDError, match=r"^checkpoint: expected a whole checkpoint of ensemble_kd, got .*last"
        ):
            checkpoints.load(path)


def test_no_file_no_checkpoint_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(EnsembleKDError, match=r"a file that exists, got .*none\.pt\. Check the path"):
        checkpoints.load(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(EnsembleKDError, match="a whole checkpoint"):
        checkpoints.load(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(EnsembleKDError, match=r"list\.pt, which holds a list\. Pass"):
        checkpoints.load(tmp_path / "list.pt")


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("sprung",)


def test_loading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(EnsembleKDError, match="UnpicklingError"):
        checkpoints.load(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "sprung").exists()  # the trap would have worked


def draw() -> list[Any]:
    return [
        torch.rand(3).tolist(),
        torch.randn(1).item(),
        np.random.rand(3).tolist(),  # noqa: NPY002
        np.random.standard_normal(),  # noqa: NPY002
        random.random(),
        random.gauss(0, 1),
    ]


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    before = random_state()
    try:
        draw()  # an odd number of Gaussians, so that one is held back
        checkpoints.save(tmp_path / "random.pt", random_state())
        expected = draw()
        assert draw() != expected
        set_random_state(checkpoints.load(tmp_path / "random.pt"))
        assert draw() == expected
    finally:
        set_random_state(before)
