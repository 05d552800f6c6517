"""last.pt and best.pt: every field is checked on reading, and random generators come back."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemble_kd import EnsembleKDError
from ensemble_kd.internal import files, random_state, set_random_state
from ensemble_kd.training.state import BestState, RunState, read_state, write_state
from tests.training.runs import assert_same_checkpoint, sasrec, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    train(sasrec(losses=0), epochs=2, output_dir=path, schedule=lambda epoch, epochs: 1.0)
    return path


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nested dictionary or list that has fields of its own, and every field."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for name, inner in below for p in paths(inner, (*path, name)))]


def changed(content: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    content = copy.deepcopy(content)
    owner = content
    for name in path[:-1]:
        owner = owner[name]
    change(owner, path[-1])
    return content


@pytest.mark.parametrize(("kind", "name"), [(RunState, "last.pt"), (BestState, "best.pt")])
def test_a_state_is_read_as_it_was_written(kind: Any, name: str, folder: Path, tmp_path: Path) -> None:
    write_state(tmp_path / name, read_state(kind, folder / name))
    assert_same_checkpoint(tmp_path / name, folder / name)


# Fields whose content has a format of its own, of torch or NumPy, and fields by which entries are named.
FREE = ("optimizer", "random")


@pytest.mark.parametrize(("kind", "name"), [(RunState, "last.pt"), (BestState, "best.pt")])
def test_every_field_is_checked(kind: Any, name: str, folder: Path, tmp_path: Path) -> None:
    content, path, tried = files.load(folder / name), tmp_path / name, 0
    fixed = ("train", "valid", "rows", "sums", "fingerprint", "model", "shares")  # below these, names are free
    for at in paths(content)[1:]:
        if at[0] in FREE and len(at) > 1:
            continue
        wrong: list[Any] = [changed(content, at, lambda owner, field: owner.__setitem__(field, b"bytes"))]
        if isinstance(at[-1], str) and not any(field in fixed for field in at[:-1]):
            wrong.append(changed(content, at, lambda owner, field: owner.pop(field)))
            wrong.append(changed(content, at, lambda owner, field: owner.__setitem__(f"{field} ", owner[field])))
        for damaged in wrong:
            files.save(path, damaged)
            with pytest.raises(EnsembleKDError, match=f"^resume: expected a {name} written by fit, got "):
                read_state(kind, path)
            tried += 1
    assert tried > 20


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("progress", "epoch"), -1),
        (("progress", "epoch"), 3),
        (("progress", "epoch"), True),
        (("progress", "batch"), 999),
        (("progress", "step"), 1.0),
        (("progress", "entries"), -1),
        (("progress", "entries"), 999),
        (("progress", "history"), []),
        (("progress", "best"), {"epoch": 2, "rows": {}}),
        (("progress", "best"), {"epoch": -1, "rows": {}}),
        (("progress", "best"), {"epoch": 1, "rows": {"ensemble": {}}}),
        (("progress", "recent"), {"sums": {}, "steps": -1}),
        (("model",), {}),
        (("model", "encoder.position_embedding"), torch.zeros(1)),
        (("optimizer",), {}),
        (("optimizer",), {"state": [], "param_groups": []}),
        (("optimizer", "param_groups"), [{}]),
        (("random",), []),
        (("random", 0), {}),
        (("random", 0, "torch"), torch.zeros(3, dtype=torch.uint8)),
        (("random", 0, "python"), [3, [1], None]),
        (("random", 0, "numpy"), ["MT19937"]),
        (("shares",), [0.5]),
        (("fingerprint",), {}),
    ],
    ids=str,
)
def test_content_that_does_not_fit_is_one_clear_error(at: Any, value: Any, folder: Path, tmp_path: Path) -> None:
    for name in ("last.pt", "best.pt", "log.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    files.save(
        tmp_path / "last.pt",
        changed(files.load(folder / "last.pt"), at, lambda owner, field: owner.__setitem__(field, value)),
    )
    with pytest.raises(EnsembleKDError, match=r"^resume: expected .*, got "):
        train(sasrec(losses=0), epochs=2, output_dir=tmp_path, schedule=lambda epoch, epochs: 1.0, resume=True)


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
        files.save(tmp_path / "random.pt", random_state())
        expected = draw()
        assert draw() != expected
        set_random_state(files.load(tmp_path / "random.pt"))
        assert draw() == expected
    finally:
        set_random_state(before)
