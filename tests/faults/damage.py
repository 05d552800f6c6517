"""Damaged files: flipped bits, cuts, swaps and wrong content in every file that the library writes.

What is read back must be the content that was written, or one ``EnsembleKDError``. Other content is *silently wrong*,
any other exception is *raw*.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_kd import (
    KD,
    EnsembleKD,
    EnsembleKDError,
    fit,
)
from ensemble_kd.data import MappedSequences, SequenceData, write_sequences
from ensemble_kd.encoders import SASRec
from ensemble_kd.export import load, save
from ensemble_kd.internal import files
from tests.faults.outcome import Outcome

V = 12
SEQUENCES = [[1, 2, 3, 4], [4, 5, 6, 7, 8], [9, 10, 11], [12, 1, 2, 3]]


@dataclass(frozen=True)
class Subject:
    """A file, and a function that reads its folder back into something that can be compared."""

    name: str
    file: str
    read: Callable[[Path], str]


def encoder() -> SASRec:
    return SASRec(V, d_model=4, num_layers=1, max_len=4, dropout=0.1)


def train(folder: Path, *, epochs: int, resume: bool = False) -> tuple[EnsembleKD, Any]:
    model = EnsembleKD(encoder, 2, losses=KD())
    data = SequenceData.from_sequences(SEQUENCES, num_items=V)
    result = fit(
        model, data, epochs=epochs, batch_size=4, log_every=1, output_dir=folder, resume=resume, progress=False,
        schedule=_constant, checkpoint_every_s=0.0,
    )  # fmt: skip
    return model, result


def _constant(epoch: float, epochs: int) -> float:
    return 1.0


def seen(value: Any) -> str:
    """Text that is equal for equal content only, without what a clock has measured."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.tolist()}"
    if isinstance(value, dict):
        kept = {name: below for name, below in value.items() if name not in ("train_s", "valid_s", "step_s")}
        return "{" + ",".join(f"{name!r}:{seen(below)}" for name, below in sorted(kept.items(), key=str)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(seen, value)) + "]"
    return repr(value)


def _resumed(folder: Path) -> str:
    """Resume a finished run to its end: it reads last.pt, best.pt and the log."""
    model, result = train(folder, epochs=2, resume=True)
    lines = (folder / "log.jsonl").read_bytes().splitlines()
    return seen([model.state_dict(), result.best_epoch, result.history, [json.loads(line) for line in lines]])


def _loaded(folder: Path) -> str:
    model = load(folder / "model.safetensors", encoder)
    return seen([model.state_dict(), repr(model.objective), repr(model.losses), model.seed])


def _mapped(folder: Path) -> str:
    data = MappedSequences(folder)
    return seen([data.num_users, data.num_items, [[p.items, p.offsets] for p in data.pieces()]])


def subjects(folder: Path) -> dict[Path, list[Subject]]:
    """Make every file, and return who reads it."""
    run, saved, mapped = (folder / name for name in ("run", "saved", "mapped"))
    model, _ = train(run, epochs=2)
    for event in run.glob("events.out*"):
        event.unlink()
    save(model, saved / "model.safetensors")
    write_sequences(mapped, SEQUENCES, num_items=V)
    arrays = [Subject(path.name, path.name, _mapped) for path in sorted(mapped.iterdir())]
    return {
        run: [Subject(name, name, _resumed) for name in ("last.pt", "best.pt", "log.jsonl")],
        saved: [Subject("model.safetensors", "model.safetensors", _loaded)],
        mapped: arrays,
    }


def run(count: int, seed: int) -> Outcome:
    """Damage files ``count`` times."""
    outcome, draw = Outcome("damaged files"), random.Random(seed)
    outcome.counts.update({"damages": 0, "refused": 0, "read as written": 0, "silently wrong": 0, "raw": 0})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        made = [(folder, each) for folder, group in subjects(Path(name)).items() for each in group]
        written = {folder: each.read(_copied(folder, Path(name))) for folder, each in made}
        contents = [(folder / each.file).read_bytes() for folder, each in made]
        for i in range(count):
            folder, subject = made[i % len(made)]
            _one(subject, _copied(folder, Path(name)), written[folder], contents, draw, outcome)
    return outcome


def _copied(folder: Path, beside: Path) -> Path:
    copy = beside / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


def _one(
    subject: Subject, folder: Path, written: str, contents: list[bytes], draw: random.Random, outcome: Outcome
) -> None:
    path = folder / subject.file
    whole = path.read_bytes()
    how, damaged = _damaged(whole, contents, draw)
    if damaged == whole:
        return
    outcome.counts["damages"] += 1
    path.write_bytes(damaged)
    line = f"{subject.name}: {how}"
    try:
        got = subject.read(folder)
    except EnsembleKDError:
        outcome.counts["refused"] += 1
    except Exception as error:
        outcome.fault("raw", f"{line} -> {type(error).__name__}: {error!s:.200}")
    else:
        if got == written:
            outcome.counts["read as written"] += 1
        elif subject.file == "log.jsonl" and _json_still(damaged):
            outcome.counts["a log of other numbers, for people alone"] += 1
        else:
            outcome.fault("silently wrong", line)


def _json_still(log: bytes) -> bool:
    """A changed digit in a log is not found: nothing is computed from it. Every line must still be an entry."""
    try:
        return all(isinstance(json.loads(line), dict) for line in log.splitlines())
    except ValueError:
        return False


def _damaged(whole: bytes, contents: list[bytes], draw: random.Random) -> tuple[str, bytes]:
    """Damage of a kind that is drawn: one bit in half of the cases."""
    at = draw.randrange(len(whole))
    kind = draw.choice(["bit"] * 6 + ["cut", "zeros", "more", "other", "swap", "state"])
    if kind == "bit":
        bit = draw.randrange(8)
        return f"bit {bit} of byte {at}", whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    if kind == "cut":
        return f"cut at byte {at}", whole[:at]
    if kind == "zeros":
        return f"64 zeros at byte {at}", whole[:at] + bytes(min(64, len(whole) - at)) + whole[at + 64 :]
    if kind == "more":
        return "bytes at its end", whole + draw.randbytes(16)
    if kind == "swap":
        half = len(whole) // 2
        return "its halves swapped", whole[half:] + whole[:half]
    if kind == "other":
        return "the content of another file", draw.choice(contents)
    return "a state that lacks a part, or has one too many", _other_state(whole, draw)


def _other_state(whole: bytes, draw: random.Random) -> bytes:
    """A checkpoint with a right checksum whose content is not right; of other files, random bytes."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "state")
        path.write_bytes(whole)
        try:
            content = files.load(path)
        except EnsembleKDError:
            return draw.randbytes(len(whole))
        _spoil(content, draw)
        files.save(path, content)
        return path.read_bytes()


def _spoil(content: dict[str, Any], draw: random.Random) -> None:
    """Take away, or change the type of, one value somewhere."""
    while True:
        name = draw.choice(sorted(content, key=str))
        below = content[name]
        if isinstance(below, dict) and below and draw.random() < 0.7:
            content = below
        elif draw.random() < 0.5:
            del content[name]
            return
        else:
            content[name] = draw.choice([None, [], "x", -999, 10**9, torch.zeros(1), {"x": 1}])
            return
