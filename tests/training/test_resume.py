"""A run that was killed anywhere ends as one that never was, and no other run goes on from its files."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemble_kd import (
    KD,
    EnsembleKD,
    EnsembleKDError,
    NextItem,
    fit,
)
from ensemble_kd.data import SequenceData
from ensemble_kd.encoders import SASRec
from ensemble_kd.internal import files
from ensemble_kd.losses import compiled as compiling
from ensemble_kd.losses import tiles
from ensemble_kd.training import Cosine, FitResult, Ramp, StepDecay, selection
from ensemble_kd.training.log import RunLog
from tests.training.runs import (
    DATA,
    V,
    assert_ends_as,
    log_of,
    recording,
    sasrec,
    train,
)

KILLED = """
import os, signal, sys, warnings, torch
from pathlib import Path
from tests.training.runs import sasrec, train
torch.set_num_threads({threads})

def kill(entry):
    if entry["step"] == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

train(sasrec(), output_dir=Path({folder!r}), log_every=1, callback=kill, checkpoint_every_s={every})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "every", "resumed_at"), [(7, 0.0, 6), (11, 1e9, 8), (2, 1e9, 0)], ids=["each step", "epochs", "at once"]
)
def test_a_run_killed_by_the_system(step: int, every: float, resumed_at: int, tmp_path: Path) -> None:
    """SIGKILL in one process, resumed in another."""
    unbroken, expected = sasrec(), tmp_path / "unbroken"
    result = train(unbroken, output_dir=expected, log_every=1)
    folder = tmp_path / "killed"
    code = KILLED.format(threads=torch.get_num_threads(), step=step, folder=str(folder), every=every)
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert files.load(folder / "last.pt")["progress"]["step"] == resumed_at
    assert log_of(folder)[-1]["step"] == step  # the log ran ahead of the checkpoint
    model = sasrec(seed=5)
    steps: list[int] = []
    got = train(model, output_dir=folder, log_every=1, resume=True, callback=lambda entry: steps.append(entry["step"]))
    assert steps[0] == resumed_at + 1
    assert_ends_as((unbroken, result, expected), folder, model, got)


THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


class Killed(BaseException):
    """Ends a run on the spot; files are left as SIGKILL would leave them."""


def dying(function: Callable[..., Any], at: int, *, before: bool) -> Callable[..., Any]:
    """The function, whose ``at``-th call ends the run, before it did anything or just after."""
    calls = itertools.count()

    def wrapped(*args: Any, **options: Any) -> Any:
        last = next(calls) == at
        if last and before:
            raise Killed
        value = function(*args, **options)
        if last:
            raise Killed
        return value

    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("where", ["replace", "fsync", "evaluate", "write"])
@pytest.mark.parametrize("every", [0.0, 1e9], ids=["each step", "epochs"])
def test_a_run_killed_anywhere(
    where: str,
    before: bool,
    every: float,
    unbroken: tuple[EnsembleKD, FitResult, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Around every renaming of a checkpoint, every sync (the file is still a .tmp), validation and log entry."""
    owner = {"evaluate": selection, "write": RunLog}.get(where, os)
    stride = {"replace": 2, "fsync": 3, "write": 1, "evaluate": 1}[where]
    if every == 0 and where in ("replace", "fsync"):
        stride *= 4  # a checkpoint a step: every one would be 31 runs
    if not THOROUGH:
        stride *= 4 if where == "write" else 2
    count = 0
    for at in itertools.count(0, stride):
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            patch.setattr(owner, where, dying(getattr(owner, where), at, before=before))
            try:
                train(sasrec(), output_dir=folder, checkpoint_every_s=every)
                break  # there is no such call
            except Killed:
                count += 1
        started = (folder / "last.pt").exists()  # else the run begins anew, from the weights that it is given
        model = sasrec(seed=at + 1 if started else 0)
        got = train(model, output_dir=folder, resume=True)
        assert_ends_as(unbroken, folder, model, got)
    assert count >= 2


def test_a_best_checkpoint_that_was_not_written_comes_from_the_last(tmp_path: Path) -> None:
    """A kill between the two writes leaves last.pt of the best epoch alone."""
    places = iter(range(100))
    train(sasrec(), output_dir=tmp_path, epochs=2, metric=lambda _, __: float(next(places)))
    written = files.load(tmp_path / "best.pt")
    (tmp_path / "best.pt").unlink()
    train(sasrec(), output_dir=tmp_path, epochs=2, metric=lambda _, __: float(next(places)), resume=True)
    again = files.load(tmp_path / "best.pt")
    assert again["epoch"] == written["epoch"] == 1
    assert all(torch.equal(again["model"][name], weight) for name, weight in written["model"].items())


def test_seconds_go_on_after_a_resume(tmp_path: Path) -> None:
    started = time.monotonic()
    seconds: list[float] = []

    def stop(entry: Mapping[str, Any]) -> None:
        seconds.append(files.load(tmp_path / "last.pt")["progress"]["train_s"])
        if entry["step"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train(sasrec(), output_dir=tmp_path, log_every=1, callback=stop)
    result = train(sasrec(), output_dir=tmp_path, log_every=1, resume=True)
    assert 0 <= seconds[0] < seconds[1] < time.monotonic() - started
    assert seconds[1] < result.history[0]["train_s"] < time.monotonic() - started


@pytest.mark.slow
def test_a_run_killed_again_and_again(unbroken: tuple[EnsembleKD, FitResult, Path], tmp_path: Path) -> None:
    for step in (2, 4, 5, 8, 12):

        def stop(entry: Mapping[str, Any], step: int = step) -> None:
            if entry["step"] >= step:
                raise Killed

        with pytest.raises(Killed):
            train(sasrec(), output_dir=tmp_path, resume=True, callback=stop)
    model = sasrec()
    assert_ends_as(unbroken, tmp_path, model, train(model, output_dir=tmp_path, resume=True))


def test_a_finished_run_resumes_to_its_end(unbroken: tuple[EnsembleKD, FitResult, Path], tmp_path: Path) -> None:
    train(sasrec(), output_dir=tmp_path)
    model = sasrec(seed=3)
    steps = recording(model)
    assert_ends_as(unbroken, tmp_path, model, train(model, output_dir=tmp_path, resume=True))
    assert steps == []


def test_more_epochs_under_a_schedule_that_does_not_mind(tmp_path: Path) -> None:
    whole = sasrec()
    expected = train(whole, output_dir=tmp_path / "whole", epochs=4, schedule=StepDecay(every=2))
    train(sasrec(), output_dir=tmp_path / "parts", epochs=2, schedule=StepDecay(every=2))
    model = sasrec()
    got = train(model, output_dir=tmp_path / "parts", epochs=4, schedule=StepDecay(every=2), resume=True)
    last = [files.load(tmp_path / name / "last.pt") for name in ("whole", "parts")]
    assert last[0]["shares"] == last[1]["shares"]
    assert_ends_as((whole, expected, tmp_path / "whole"), tmp_path / "parts", model, got)


def test_resume_where_there_is_nothing_starts_anew(
    unbroken: tuple[EnsembleKD, FitResult, Path], tmp_path: Path
) -> None:
    (tmp_path / "last.pt.tmp").write_bytes(b"cut sh")  # what a kill within the first checkpoint leaves
    model = sasrec()
    got = train(model, output_dir=tmp_path, resume=True)
    assert not (tmp_path / "last.pt.tmp").exists()
    assert_ends_as(unbroken, tmp_path, model, got)


def test_a_new_run_forgets_the_one_before(unbroken: tuple[EnsembleKD, FitResult, Path], tmp_path: Path) -> None:
    train(sasrec(seed=7), output_dir=tmp_path, epochs=3)

    def stop(entry: Mapping[str, Any]) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(sasrec(), output_dir=tmp_path, checkpoint_every_s=1e9, callback=stop, overwrite=True)
    assert not (tmp_path / "best.pt").exists()
    model = sasrec(seed=1)
    assert_ends_as(unbroken, tmp_path, model, train(model, output_dir=tmp_path, resume=True))


def test_a_best_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    def stop(entry: Mapping[str, Any]) -> None:
        if entry["step"] == 6:
            raise Killed

    with pytest.raises(Killed):
        train(sasrec(), output_dir=tmp_path, callback=stop)
    files.save(tmp_path / "best.pt", {"epoch": 7, "model": {}, "valid": {}})
    with pytest.raises(EnsembleKDError, match=r"resume: expected best\.pt of epoch 0, got 7\. Put back"):
        train(sasrec(), output_dir=tmp_path, resume=True)
    (tmp_path / "best.pt").unlink()
    with pytest.raises(EnsembleKDError, match=r"a file that exists, got .*best\.pt"):
        train(sasrec(), output_dir=tmp_path, resume=True)


@pytest.mark.slow
def test_exact_through_compiled_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused loss compiles from a size on, which is that of a call and not of a run's history."""
    compiled: list[bool] = []
    choose = tiles.compiled_tile

    def chosen(*args: Any, **options: Any) -> Any:
        function = choose(*args, **options)
        compiled.append(function is not None)
        return function

    monkeypatch.setattr(tiles, "compiled_tile", chosen)
    monkeypatch.setattr(compiling, "_COMPILE_FROM", 2 * V * 350)  # between the sizes of a run's batches
    whole = sasrec()
    expected = train(whole, output_dir=tmp_path / "whole", epochs=2)
    if compiling.compile_status().startswith("eager"):
        pytest.skip(compiling.compile_status())
    first, compiled[:] = list(compiled), []
    assert {True, False} == set(first)

    def stop(entry: Mapping[str, Any]) -> None:
        if entry["step"] == 6:
            raise Killed

    with pytest.raises(Killed):
        train(sasrec(), output_dir=tmp_path / "parts", epochs=2, callback=stop)
    compiled[:] = []
    model = sasrec()
    torch._dynamo.reset()
    compiling._compiled.cache_clear()
    got = train(model, output_dir=tmp_path / "parts", epochs=2, resume=True)
    assert compiled == first[5:]
    assert_ends_as((whole, expected, tmp_path / "whole"), tmp_path / "parts", model, got)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 2e-2}, r"lr: 0\.01 then, 0\.02 now"),
        ({"batch_size": 32}, r"batch_size: 64 then, 32 now"),
        ({"seed": 1}, r"seed: 0 then, 1 now"),
        ({"weight_decay": 0.1}, r"weight_decay: 0\.0 then, 0\.1 now"),
        ({"max_grad_norm": None}, r"max_grad_norm: 5\.0 then, None now"),
        ({"window": 5}, r"window: 9 then, 5 now"),
        ({"window_step": 2}, r"window_step: 4 then, 2 now"),
        ({"by_length": False}, r"by_length: True then, False now"),
        ({"precision": "bfloat16"}, r"precision: 'float32' then, 'bfloat16' now"),
        ({"exclude": "none"}, r"exclude: 'history' then, 'none' now"),
        ({"schedule": StepDecay()}, r"schedule at epoch 0: 0 then, 1 now"),
        ({"transfer": Ramp(0.0, 0.5)}, r"transfer at epoch 0: 1 then, 0 now"),
        ({"epochs": 4}, r"schedule at epoch 0\.75: [0-9.]+ then, [0-9.]+ now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused_by_name(
    changes: dict[str, Any], named: str, unbroken: tuple[EnsembleKD, FitResult, Path]
) -> None:
    with pytest.raises(
        EnsembleKDError, match=f"^resume: expected the run that wrote the checkpoint, got {named}[^;]*$"
    ):
        train(sasrec(), output_dir=unbroken[2], resume=True, **changes)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: sasrec(n=3), r"parameter encoder\.\S+: \(2, .* then, \(3, .*; and \d+ more\. "),
        (lambda: sasrec(losses=KD()), r"losses: AP\(\) \+ 0\.05 .* then, KD\(temperature=0\.3\) now\. "),
        (lambda: sasrec(objective=NextItem(views=2)), r"objective: NextItem\(views=1, .* then, NextItem\(views=2, "),
        (lambda: sasrec(backend="vmap"), r"backend: 'auto' then, 'vmap' now\. "),
        (
            lambda: EnsembleKD(
                lambda: SASRec(V, d_model=8, num_layers=1, max_len=8, dropout=0.3),
                n=2,
                losses=sasrec().losses,
                item_attributes=DATA.item_attributes,
            ),
            r"member 0: SASRec\(.*dropout=0\.2.* then, SASRec\(.*dropout=0\.3.* now; ",
        ),
    ],
    ids=["members", "losses", "objective", "backend", "dropout"],
)
def test_another_model_is_refused_by_name(
    model: Callable[[], EnsembleKD], named: str, unbroken: tuple[EnsembleKD, FitResult, Path]
) -> None:
    with pytest.raises(EnsembleKDError, match=f"got {named}"):
        train(model(), output_dir=unbroken[2], resume=True)


def test_other_data_of_the_same_size_are_refused(unbroken: tuple[EnsembleKD, FitResult, Path]) -> None:
    items = DATA.items.clone()
    items[[0, 1]] = items[[1, 0]]
    other = SequenceData(items, DATA.offsets, V, DATA.item_attributes)
    options = {"batch_size": 64, "lr": 1e-2, "window_step": 4, "schedule": Cosine(warmup=0.5), "progress": False}
    with pytest.raises(EnsembleKDError, match=r"got data: SequenceData.* with checksum \w+ then, SequenceData"):
        fit(sasrec(), other, epochs=3, output_dir=unbroken[2], resume=True, **options)  # type: ignore[arg-type]


def test_equal_settings_said_otherwise_are_the_same_run(tmp_path: Path) -> None:
    """Values are compared, not the words for them, and never the addresses of objects."""
    with pytest.raises(Killed):
        train(sasrec(), output_dir=tmp_path, schedule=lambda epoch, epochs: 0.5, callback=dying(dict, 3, before=True))
    said = {"lr": np.float64(0.01), "weight_decay": 0, "max_grad_norm": 5, "window": 9, "log_every": 1}
    result = train(sasrec(), output_dir=tmp_path, schedule=lambda epoch, epochs: 1 / 2, resume=True, patience=9, **said)
    assert len(result.history) == 3
    fingerprint = files.load(tmp_path / "last.pt")["fingerprint"]
    assert not [value for value in fingerprint.values() if "0x" in value]


def test_a_checkpoint_cut_short_is_refused(tmp_path: Path) -> None:
    train(sasrec(), output_dir=tmp_path, epochs=1)
    whole = (tmp_path / "last.pt").read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-20]):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(EnsembleKDError, match=r"a whole checkpoint of ensemble_kd, got .*last\.pt"):
            train(sasrec(), output_dir=tmp_path, epochs=1, resume=True)
    files.save(tmp_path / "last.pt", {"weights": 1})
    with pytest.raises(EnsembleKDError, match=r"resume: expected a last\.pt written by fit, got .*last\.pt"):
        train(sasrec(), output_dir=tmp_path, epochs=1, resume=True)
