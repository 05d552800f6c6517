"""``fit``: what it learns, reports and refuses, and that a run killed anywhere ends as one never killed."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ensemble_kd import (
    AP,
    CCL,
    ICL,
    KD,
    EnsembleKD,
    EnsembleKDError,
    MaskedItem,
    NextItem,
    Step,
    fit,
)
from ensemble_kd.data import BatchPlan, SequenceData, synthetic
from ensemble_kd.encoders import BERT4Rec, SASRec
from ensemble_kd.evaluation import evaluate, evaluate_popularity
from ensemble_kd.losses import compiled as compiling
from ensemble_kd.losses import tiles
from ensemble_kd.training import Cosine, FitResult, Ramp, StepDecay, clip_members_
from ensemble_kd.training import run as training_run
from ensemble_kd.training import state as checkpoints
from ensemble_kd.training.log import RunLog

V = 60
DATA = synthetic(num_users=120, num_items=V, num_clusters=10, max_len=20)
STEPS = 4  # of an epoch of ``train``


def sasrec(**changes: Any) -> EnsembleKD:
    losses = AP() + 0.05 * (ICL() + CCL()) + 0.01 * KD()
    options: dict[str, Any] = {"n": 2, "losses": losses, "item_attributes": DATA.item_attributes} | changes
    return EnsembleKD(lambda: SASRec(V, d_model=8, num_layers=1, max_len=8, dropout=0.2), **options)


def train(model: EnsembleKD, **changes: Any) -> FitResult:
    options: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 64,
        "lr": 1e-2,
        "window_step": 4,
        "log_every": 3,
        "checkpoint_every_s": 0.0,
        "progress": False,
        "schedule": Cosine(warmup=0.5),
    }
    return fit(model, DATA, **(options | changes))


def timeless(entry: Any) -> Any:
    """A log entry without what a clock says."""
    return {name: value for name, value in entry.items() if name not in ("step_s", "train_s", "valid_s")}


def log_of(folder: Path) -> list[Any]:
    return [timeless(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list):
        for name, below in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from flatten(below, f"{path}/{name}")
    else:
        yield path, value


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Weights, optimizer, random state, position: everything but the clock, bit for bit."""
    one, other = (dict(flatten(checkpoints.load(path))) for path in (first, second))
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name.endswith(("train_s", "valid_s")):
            continue
        same = torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        assert same, name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[EnsembleKD, FitResult, Path]:
    """A run that was never killed: its model, its result and its folder."""
    folder, model = tmp_path_factory.mktemp("unbroken"), sasrec()
    return model, train(model, output_dir=folder), folder


def assert_ends_as(unbroken: tuple[EnsembleKD, FitResult, Path], folder: Path, model: EnsembleKD, got: Any) -> None:
    expected_model, expected, expected_folder = unbroken
    for (name, a), (_, b) in zip(expected_model.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert (got.best_epoch, got.best) == (expected.best_epoch, expected.best)
    assert [timeless(entry) for entry in got.history] == [timeless(entry) for entry in expected.history]
    assert log_of(folder) == log_of(expected_folder)
    for name in ("last.pt", "best.pt"):
        assert_same_checkpoint(folder / name, expected_folder / name)
    assert str(evaluate(model, DATA, "test")) == str(evaluate(expected_model, DATA, "test"))


# ---------------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_fit_lowers_the_loss_and_beats_popularity() -> None:
    model = sasrec()
    result = train(model, epochs=15, window_step=1)
    first, last = result.history[0]["train"], result.history[-1]["train"]
    assert list(first) == ["nip", "kd", "ap", "icl", "ccl"]
    assert last["nip"] < 0.9 * first["nip"]
    assert last["ap"] < 0.9 * first["ap"]
    assert len(result.history) == 15
    test, popularity = evaluate(model, DATA, "test"), evaluate_popularity(DATA, "test")
    assert test.rows["ensemble"]["NDCG@10"] > 1.1 * popularity.rows["popularity"]["NDCG@10"]


def test_the_best_epochs_weights_are_left(tmp_path: Path) -> None:
    model = sasrec()

    def spoil(entry: Mapping[str, Any]) -> None:  # after the second epoch popular items are avoided
        if entry["kind"] == "epoch" and entry["epoch"] == 1:
            with torch.no_grad():
                model.item_classifier.bias.copy_(-DATA.popularity()[1:])

    result = train(model, callback=spoil, output_dir=tmp_path)
    assert result.best_epoch < 2
    scores = [entry["valid"]["ensemble"]["NDCG@10"] for entry in result.history]
    assert scores.index(max(scores)) == result.best_epoch
    assert evaluate(model, DATA, "valid").rows == result.best == result.history[result.best_epoch]["valid"]
    best = checkpoints.load(tmp_path / "best.pt")
    assert (best["epoch"], best["valid"]) == (result.best_epoch, result.best)
    again = sasrec(seed=9)
    again.load_state_dict(best["model"])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_early_stopping() -> None:
    result = train(sasrec(), epochs=20, patience=2, lr=1e-12)  # nothing moves, so nothing gets better
    assert (result.best_epoch, len(result.history)) == (0, 3)


@pytest.mark.parametrize("objective", [NextItem(views=2), NextItem(mask_ratio=0.2), MaskedItem(views=1)])
@pytest.mark.parametrize("losses", [0, KD(), ICL() + CCL()])
def test_every_objective_trains(objective: Any, losses: Any) -> None:
    model = EnsembleKD(lambda: BERT4Rec(V, d_model=8, num_layers=1, max_len=8), n=2, objective=objective, losses=losses)
    assert len(train(model, epochs=1, window_step=9).history) == 1


def test_bfloat16_trains_and_keeps_float32_weights() -> None:
    model = sasrec()
    result = train(model, precision="bfloat16", epochs=4)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.history[-1]["train"]["nip"] < result.history[0]["train"]["nip"]
    plain = train(sasrec(), epochs=4)
    assert result.history[0]["train"]["nip"] == pytest.approx(plain.history[0]["train"]["nip"], rel=1e-2)
    assert result.history[0]["train"] != plain.history[0]["train"]  # autocast was on


def test_weight_decay_is_decoupled() -> None:
    model, decayed = sasrec(), sasrec()
    train(model, epochs=1)
    train(decayed, epochs=1, weight_decay=1.0)
    assert sum(float(p.detach().norm()) for p in decayed.parameters()) < sum(
        float(p.detach().norm()) for p in model.parameters()
    )


def test_the_window_is_as_long_as_the_encoder_trains() -> None:
    """Next-item training reads all but the newest item: a window of max_len would leave a position untrained."""
    model = sasrec(losses=0)
    positions = model.encoder.get_parameter("position_embedding")
    before = positions.detach().clone()
    train(model, epochs=1)
    assert bool((positions != before).any(dim=-1).all())


def test_the_mode_is_restored() -> None:
    for mode in (True, False):
        model = sasrec().train(mode)
        train(model, epochs=1)
        assert model.training == model.encoder.training == mode


def global_random_state() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), [str(x) for x in np.random.get_state()]]  # noqa: NPY002


def test_the_global_random_state_is_untouched(tmp_path: Path) -> None:
    model, before = sasrec(), global_random_state()
    train(model, epochs=1, output_dir=tmp_path)
    evaluate(model, DATA, "test")
    assert global_random_state() == before

    def stop(entry: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, callback=stop, output_dir=tmp_path, resume=False)
    assert global_random_state() == before
    train(model, output_dir=tmp_path, resume=True)
    assert global_random_state() == before


def test_the_result_depends_on_the_seed_and_not_on_the_global_random_state() -> None:
    torch.manual_seed(1)
    one = train(sasrec(), epochs=1)
    torch.manual_seed(2)
    same, other = train(sasrec(), epochs=1), train(sasrec(), epochs=1, seed=1)
    assert one.history[0]["train"] == same.history[0]["train"] != other.history[0]["train"]


# ---------------------------------------------------------------------------------------------------------- the log


def recording(model: EnsembleKD) -> list[dict[str, float]]:
    """The terms of every step that the model will take."""
    steps: list[dict[str, float]] = []
    loss = model.loss

    def record(*args: Any, **options: Any) -> Any:
        step = loss(*args, **options)
        steps.append({name: float(value) for name, value in step.terms.items()})
        return step

    model.loss = record  # type: ignore[method-assign]
    return steps


def mean_of(steps: list[dict[str, float]]) -> Any:
    return pytest.approx({name: sum(s[name] for s in steps) / len(steps) for name in steps[0]}, rel=1e-5)


def test_entries_hold_means_over_their_own_steps() -> None:
    """4 steps an epoch, an entry every 3: epochs end between entries."""
    model = sasrec()
    entries: list[Any] = []
    steps = recording(model)
    result = train(model, callback=entries.append)
    assert [(e["kind"], e["step"], e["epoch"]) for e in entries] == [
        ("step", 3, 0),
        ("epoch", 4, 0),
        ("step", 6, 1),
        ("epoch", 8, 1),
        ("step", 9, 2),
        ("step", 12, 2),
        ("epoch", 12, 2),
    ]
    spans = {("step", 3): (0, 3), ("step", 6): (4, 6), ("step", 9): (8, 9), ("step", 12): (9, 12)}
    for entry in entries:
        if entry["kind"] == "step":
            start, stop = spans["step", entry["step"]]
            assert {name: entry[name] for name in steps[0]} == mean_of(steps[start:stop])
            assert entry["step_s"] > 0
        else:
            assert entry["train"] == mean_of(steps[entry["step"] - STEPS : entry["step"]])
            assert entry["train_s"] > 0
            assert entry["valid_s"] > 0
            assert list(entry["valid"]) == ["member 0", "member 1", "ensemble"]
    assert result.history == [entry for entry in entries if entry["kind"] == "epoch"]


def test_transfer_follows_its_schedule(tmp_path: Path) -> None:
    """Weightless terms are not computed; the others weigh their share of the model's own weights, AP all of it."""
    model, shares, seen = sasrec(), [], []
    plain, losses = model.loss, model.losses

    def noted(item_ids: Tensor, *, share: float, **options: Any) -> Step:
        shares.append(share)
        return plain(item_ids, share=share, **options)

    def note(entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "step":
            seen.append(set(entry) & {"icl", "ccl", "kd", "ap"})

    model.loss = noted  # type: ignore[method-assign, assignment]
    train(model, epochs=2, callback=note, log_every=1, transfer=lambda epoch, epochs: 0.0 if epoch < 1 else epoch / 2)
    assert model.losses is losses
    assert shares == pytest.approx([0.0] * STEPS + [step / STEPS / 2 for step in range(STEPS, 2 * STEPS)])
    assert seen == [{"ap"}] * STEPS + [{"icl", "ccl", "kd", "ap"}] * STEPS
    late = train(sasrec(), epochs=2, transfer=Ramp(1.0, 1.0)).history[-1]
    alone = train(sasrec(losses=AP()), epochs=2).history[-1]
    assert timeless(late)["valid"] == timeless(alone)["valid"]


def test_the_learning_rate_follows_the_schedule() -> None:
    entries: list[Any] = []
    train(sasrec(), callback=entries.append, log_every=1, schedule=lambda epoch, epochs: 1 / (1 + epoch + epochs))
    rates = [entry["lr"] for entry in entries if entry["kind"] == "step"]
    assert rates == pytest.approx([1e-2 / (4 + i / STEPS) for i in range(3 * STEPS)])


def test_log_and_callback_say_the_same(tmp_path: Path) -> None:
    entries: list[Any] = []
    train(sasrec(), callback=entries.append, output_dir=tmp_path / "new" / "folder")
    lines = (tmp_path / "new" / "folder" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == entries


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(sasrec(), epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_progress_with_and_without_tqdm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    train(sasrec(), epochs=1, progress=True)
    shown = capsys.readouterr()
    assert "epoch 1/1" in shown.err
    assert "epoch 1: valid NDCG@10 ensemble 0." in shown.out
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    train(sasrec(), epochs=1, progress=True)
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "epoch 1: valid NDCG@10 ensemble 0." in shown.out
    train(sasrec(), epochs=1)
    assert capsys.readouterr() == ("", "")


class Writer:
    """Stands in for TensorBoard's SummaryWriter."""

    made: list[Writer]

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert not self.closed
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Writer.made = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    result = train(sasrec(), output_dir=tmp_path, epochs=1, schedule=StepDecay())
    (writer,) = Writer.made
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path), None, True)
    named = {name: (value, step) for name, value, step in writer.scalars}
    assert named["epoch/valid/ensemble/NDCG@10"] == (result.best["ensemble"]["NDCG@10"], STEPS)
    assert named["epoch/train/nip"] == (result.history[0]["train"]["nip"], STEPS)
    assert named["step/lr"] == (1e-2, 3)
    assert named["step/kd"][1] == 3

    def stop(entry: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(sasrec(), output_dir=tmp_path, epochs=2, schedule=StepDecay(), resume=True, callback=stop)
    assert Writer.made[1].purge_step == STEPS + 1
    assert Writer.made[1].closed


def test_tensorboard_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(sasrec(), output_dir=tmp_path, epochs=1)
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"epoch/valid/ensemble/NDCG@10" in events.read_bytes()


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(sasrec(), output_dir=tmp_path, epochs=1)
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "last.pt", "log.jsonl"}


# ------------------------------------------------------------------------------------------------- killed and resumed

KILLED = """
import os, signal, sys, warnings, torch
from pathlib import Path
from tests.training.test_fit import sasrec, train
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
    assert checkpoints.load(folder / "last.pt")["position"]["step"] == resumed_at
    assert log_of(folder)[-1]["step"] == step  # the log ran ahead of the checkpoint
    model = sasrec(seed=5)
    steps: list[int] = []
    got = train(model, output_dir=folder, log_every=1, resume=True, callback=lambda entry: steps.append(entry["step"]))
    assert steps[0] == resumed_at + 1
    assert_ends_as((unbroken, result, expected), folder, model, got)


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
    owner = {"evaluate": training_run, "write": RunLog}.get(where, os)
    stride = {"replace": 2, "fsync": 3, "write": 1, "evaluate": 1}[where]
    if every == 0 and where in ("replace", "fsync"):
        stride *= 4  # a checkpoint a step: every one would be 31 runs
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
    last = [checkpoints.load(tmp_path / name / "last.pt") for name in ("whole", "parts")]
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
        train(sasrec(), output_dir=tmp_path, checkpoint_every_s=1e9, callback=stop)
    assert not (tmp_path / "best.pt").exists()
    model = sasrec(seed=1)
    assert_ends_as(unbroken, tmp_path, model, train(model, output_dir=tmp_path, resume=True))


def test_a_best_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    def stop(entry: Mapping[str, Any]) -> None:
        if entry["step"] == 6:
            raise Killed

    with pytest.raises(Killed):
        train(sasrec(), output_dir=tmp_path, callback=stop)
    checkpoints.save(tmp_path / "best.pt", {"epoch": 7, "model": {}})
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
    fingerprint = checkpoints.load(tmp_path / "last.pt")["fingerprint"]
    assert not [value for value in fingerprint.values() if "0x" in value]


def test_a_checkpoint_cut_short_is_refused(tmp_path: Path) -> None:
    train(sasrec(), output_dir=tmp_path, epochs=1)
    whole = (tmp_path / "last.pt").read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-20]):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(EnsembleKDError, match=r"a whole checkpoint of ensemble_kd, got .*last\.pt"):
            train(sasrec(), output_dir=tmp_path, epochs=1, resume=True)
    checkpoints.save(tmp_path / "last.pt", {"weights": 1})
    with pytest.raises(EnsembleKDError, match=r"resume: expected a last\.pt written by fit, got .*last\.pt"):
        train(sasrec(), output_dir=tmp_path, epochs=1, resume=True)


# ------------------------------------------------------------------------------------------------- losses not finite


def poison(model: EnsembleKD, step: int) -> Callable[[Mapping[str, Any]], None]:
    """Spoil a weight after a step, as an exploding update would."""

    def callback(entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "step" and entry["step"] == step:
            with torch.no_grad():
                model.item_classifier.bias[1, 5] = math.nan

    return callback


def test_a_loss_that_is_not_finite_names_step_and_term(
    unbroken: tuple[EnsembleKD, FitResult, Path], tmp_path: Path
) -> None:
    model, before = sasrec(), global_random_state()
    with pytest.raises(EnsembleKDError, match=r"^fit: step 7, term 'nip': expected a finite value, got nan\. Lower lr"):
        train(model, output_dir=tmp_path, checkpoint_every_s=1e9, callback=poison(model, 6))
    assert global_random_state() == before
    assert checkpoints.load(tmp_path / "last.pt")["position"]["step"] == STEPS
    model = sasrec()
    assert_ends_as(unbroken, tmp_path, model, train(model, output_dir=tmp_path, resume=True))


def test_weights_that_are_not_finite_reach_no_checkpoint(
    unbroken: tuple[EnsembleKD, FitResult, Path], tmp_path: Path
) -> None:
    model = sasrec()
    with pytest.raises(EnsembleKDError, match=r"^fit: step 6, weights 'item_classifier\.bias': expected finite weigh"):
        train(model, output_dir=tmp_path, callback=poison(model, 6))
    assert checkpoints.load(tmp_path / "last.pt")["position"]["step"] == 5
    model = sasrec()
    assert_ends_as(unbroken, tmp_path, model, train(model, output_dir=tmp_path, resume=True))


@pytest.mark.parametrize(
    ("max_grad_norm", "named"),
    [(5.0, r"step 3, term 'gradient of member 1'"), (None, r"step 3, weights 'item_classifier\.bias'")],
)
def test_a_gradient_that_is_not_finite_is_found(max_grad_norm: float | None, named: str, tmp_path: Path) -> None:
    model, calls = sasrec(), itertools.count(1)

    def explode(gradient: Tensor) -> Tensor | None:
        if next(calls) != 3:
            return None
        gradient = gradient.clone()
        gradient[1] = math.inf
        return gradient

    model.item_classifier.bias.register_hook(explode)
    with pytest.raises(EnsembleKDError, match=f"^fit: {named}"):
        train(model, output_dir=tmp_path, max_grad_norm=max_grad_norm)
    last = checkpoints.load(tmp_path / "last.pt")
    assert last["position"]["step"] == 2
    assert all(bool(torch.isfinite(weights).all()) for weights in last["model"].values())


# ------------------------------------------------------------------------------------------------ clipping, schedules


def test_gradients_are_clipped_member_by_member() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.zeros(3, *shape, requires_grad=True) for shape in ((4, 5), (2,), ())]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * torch.tensor([0.01, 1.0, 100.0]).view(
            3, *[1] * (p.ndim - 1)
        )
    frozen = torch.zeros(3, 2)
    before = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    norms = clip_members_([*parameters, frozen], 2.0)
    for i in range(3):
        plain = [g[i].clone() for g in before]
        twins = [torch.zeros_like(g, requires_grad=True) for g in plain]
        for twin, gradient in zip(twins, plain, strict=True):
            twin.grad = gradient
        expected = nn.utils.clip_grad_norm_(twins, 2.0)
        torch.testing.assert_close(norms[i], expected)
        for p, twin in zip(parameters, twins, strict=True):
            torch.testing.assert_close(p.grad[i], twin.grad, rtol=1e-5, atol=1e-7)  # type: ignore[index]
    assert torch.equal(parameters[0].grad[0], before[0][0])  # type: ignore[index]


def test_the_gradient_norm_limits_the_run() -> None:
    def gradient(limit: float | None) -> float:
        model = sasrec()
        train(model, epochs=1, max_grad_norm=limit)
        return max(float(p.grad[i].norm()) for p in model.parameters() for i in range(2))  # type: ignore[index]

    assert gradient(1e-3) <= 1.001e-3 < gradient(None)


def test_a_member_parameter_that_is_a_number_trains() -> None:
    class Scaled(nn.Module):
        causal = True

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = SASRec(V, d_model=8, num_layers=1, max_len=8), nn.Parameter(torch.tensor(1.0))

        def forward(self, item_ids: Tensor) -> Tensor:
            return self.scale * self.inner(item_ids)  # type: ignore[no-any-return]

    model = EnsembleKD(Scaled, n=2, num_items=V, max_len=8)
    train(model, epochs=1)
    assert (model.encoder.scale != 1).all()  # type: ignore[union-attr]


def test_schedules() -> None:
    assert [StepDecay(2, 0.5)(e, 9) for e in (0, 1.9, 2, 5)] == [1, 1, 0.5, 0.25]
    cosine = [Cosine(warmup=1, floor=0.2)(e / 4, 5) for e in range(24)]
    assert cosine[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert all(a > b for a, b in itertools.pairwise(cosine[4:21]))
    assert cosine[20:] == [0.2] * 4
    assert [Ramp(0.5, 1.0)(e, 4) for e in (0, 2, 3, 4)] == [0, 0, 0.5, 1]
    assert [Ramp(0.5, 0.5)(e, 4) for e in (1.9, 2, 4)] == [0, 1, 1]
    for made, named in (
        (lambda: StepDecay(0), "StepDecay: expected every >= 1, got 0"),
        (lambda: StepDecay(1, 0.0), "factor in"),
        (lambda: Cosine(-1.0), "Cosine: expected warmup >= 0"),
        (lambda: Cosine(floor=math.nan), "floor in"),
        (lambda: Ramp(0.5, 0.4), r"Ramp: expected start in \[0, full\], got 0.5"),
        (lambda: Ramp(0.5, 1.1), "Ramp: expected full <= 1, got 1.1"),
        (lambda: Ramp(-0.1, 0.4), "Ramp: expected start in"),
    ):
        with pytest.raises(EnsembleKDError, match=named):
            made()


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs, a whole number >= 1, got 0"),
        ({"epochs": True}, "epochs, a whole number >= 1, got True"),
        ({"batch_size": 2.0}, "batch_size, a whole number >= 1, got 2.0"),
        ({"window_step": 0}, "window_step, a whole number >= 1, got 0"),
        ({"log_every": 0}, "log_every, a whole number >= 1, got 0"),
        ({"window": 0}, "window, a whole number >= 1, got 0"),
        ({"window": 10}, "window <= 9, which the encoder can read, got 10"),
        ({"patience": 0}, "patience, a whole number >= 1, got 0"),
        ({"seed": -1}, "seed, a whole number >= 0, got -1"),
        ({"lr": 0.0}, "lr, a finite number > 0, got 0.0"),
        ({"lr": math.nan}, "lr, a finite number > 0, got nan"),
        ({"lr": math.inf}, "lr, a finite number > 0, got inf"),
        ({"lr": "1e-3"}, "lr, a finite number > 0, got '1e-3'"),
        ({"weight_decay": -0.1}, "weight_decay, a finite number >= 0, got -0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm, a finite number > 0, got 0.0"),
        ({"checkpoint_every_s": -1.0}, "checkpoint_every_s, a finite number >= 0, got -1.0"),
        ({"precision": "float16"}, "precision 'float32' or 'bfloat16', got 'float16'"),
        ({"exclude": "seen"}, "exclude 'none' or 'window' or 'history', got 'seen'"),
        ({"schedule": lambda e, n: -e}, "a schedule of finite shares >= 0, got -0.25 at epoch 0.25"),
        ({"transfer": lambda e, n: math.nan}, "a schedule of finite shares >= 0, got nan at epoch 0.0"),
        ({"resume": True, "output_dir": None}, "output_dir with resume=True, got None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_are_checked_before_anything_is_written(changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(EnsembleKDError) as caught:
        train(sasrec(), **({"output_dir": tmp_path / "run"} | changes))
    assert str(caught.value).startswith(f"fit: expected {message}. ")
    assert not (tmp_path / "run").exists()


def test_data_that_do_not_fit() -> None:
    small = SequenceData.from_sequences([[1, 2, 3], [3, 2, 1]])
    with pytest.raises(EnsembleKDError, match="fit: expected data of 60 items, as the model, got 3"):
        fit(sasrec(), small)
    one = SequenceData.from_sequences([[1, 2, 3, 4, V]])
    with pytest.raises(EnsembleKDError, match="fit: expected at least 2 training windows, got 1"):
        fit(sasrec(), one)


def test_one_sequence_a_batch_needs_losses_without_contrast(tmp_path: Path) -> None:
    assert len(train(sasrec(losses=KD()), epochs=1, batch_size=1, window=4, window_step=60).history) == 1
    with pytest.raises(EnsembleKDError, match="sequences"):
        train(sasrec(), epochs=1, batch_size=1, window=4, window_step=60)


def test_the_plan_of_these_tests() -> None:
    """Epochs of so many steps are what the kill points above are placed in."""
    assert len(BatchPlan(DATA.train_windows(9, 4, min_len=2), 64, 0, 0)) == STEPS


def test_a_folder_may_be_a_relative_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(sasrec(), epochs=1, output_dir="run")
    assert (tmp_path / "run" / "best.pt").exists()
