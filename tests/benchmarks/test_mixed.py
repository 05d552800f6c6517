"""SASRec and GRU4Rec in one ensemble, on made-up data: runs, joined members, and the page."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from benchmarks import mixed, trials
from benchmarks.mixed import ALONE, G_OWN, MIXES, TAUGHT, Kind, S
from ensemble_kd import fit
from ensemble_kd.data import synthetic


def test_each_ensemble_has_members_of_runs_that_differ() -> None:
    kinds = {kind for mix in MIXES.values() for kind in mix}
    assert len({kind.trial(0).key for kind in kinds}) == len(kinds)
    assert all(sum(mix.values()) in (3, 6) for mix in MIXES.values())
    assert Kind("SASRec").trial(2).seed == 2


def test_the_study_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked = synthetic(40, 80), list[str]()
    monkeypatch.setattr(mixed, "load", lambda dataset, folder: data)
    monkeypatch.setattr(trials, "fit", partial(fit, epochs=1))
    monkeypatch.setattr(mixed, "MIXES", {ALONE: {S: 3}, "two and a student": {S: 2, G_OWN: 1}})
    train = trials.train
    monkeypatch.setattr(trials, "train", lambda trial, *more: asked.append(trial.key) or train(trial, *more))
    files = {name: str(tmp_path / name) for name in ("results", "output", "page")}
    given = ["--data-dir", str(tmp_path), *(f"--{name}={path}" for name, path in files.items())]
    mixed.main([*given, "--seeds", "0", "--only", ALONE])
    assert len(asked) == 1
    mixed.main([*given, "--seeds", "0", "1"])
    assert len(asked) == len(set(asked)) == 6  # three runs a seed: SASRec, GRU4Rec and its students
    found = {(r["mix"], r["seed"]): r for r in trials.read(tmp_path / "results")}
    assert len(found) == 4
    assert all(len(r["shares"]) == 3 and sum(r["shares"]) == pytest.approx(3, abs=0.01) for r in found.values())
    alone, joined = found[ALONE, 0], found["two and a student", 0]
    assert alone["ranks"]["member 0"] == joined["ranks"]["member 0"]
    assert alone["ranks"]["member 2"] != joined["ranks"]["member 2"]
    page = (tmp_path / "page").read_text()
    assert "| two and a student | 0." in page
    assert "of 2) |  |" in page  # beside three SASRec alone: none were taught
    assert TAUGHT in page


def test_the_committed_page_is_that_of_the_records() -> None:
    assert mixed.PAGE.read_text(encoding="utf-8") == mixed.page(trials.read(mixed.RESULTS / "mixed.jsonl"))
