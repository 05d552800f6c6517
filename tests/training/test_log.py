"""The log, the bar and TensorBoard: each entry has the means of its own steps, and all say the same."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ensemble_kd import AP, Step
from ensemble_kd.training import Ramp, StepDecay
from tests.training.runs import (
    STEPS,
    recording,
    sasrec,
    timeless,
    train,
)


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
