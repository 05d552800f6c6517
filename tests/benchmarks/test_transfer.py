"""The study of what members pass on: which attempts what is done asks for, and a table of what has run."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import transfer, trials
from benchmarks.paper import store
from benchmarks.transfer import BESIDES, ENCODERS, LESS, LONG, STRENGTHS, Setting, attempt
from benchmarks.trials import FORMULAS, STUDENTS, Trial
from ensemble_kd import EnsembleKD, fit
from ensemble_kd.data import synthetic
from ensemble_kd.distillation import FromTeacher


def record(trial: Trial, valid: float, ensemble: int = 2) -> dict[str, Any]:
    """A finished attempt in which every user's item has the rank ``ensemble``, and one rank worse for a member."""
    ranks = {
        name: store.pack(torch.full((40,), ensemble + worse))
        for name, worse in (("ensemble", 0), ("member 0", 1), ("member 1", 1))
    }
    values = {name: {"NDCG@10": 1 / float(torch.tensor(2.0 + at).log2())} for name, at in
              (("ensemble", ensemble), ("member 0", ensemble + 1), ("member 1", ensemble + 1))}  # fmt: skip
    return {
        "trial": asdict(trial), "ranks": ranks, "valid": [0.0, valid], "best_epoch": 1, "minutes": 3.0,
        "test": values, "machine": {"processor": "a CPU", "torch": "2"},
    }  # fmt: skip


def test_overlap_is_of_the_users_whose_item_a_member_finds() -> None:
    found = record(attempt("SASRec"), 0.07)
    assert trials.overlap(found) == 1.0
    found["ranks"]["member 1"] = store.pack(torch.tensor([3] * 10 + [12] * 30))
    assert trials.overlap(found) == 0.25


def test_formulas_have_strengths_and_names_of_their_own() -> None:
    assert STRENGTHS.keys() == FORMULAS.keys()
    assert FORMULAS.keys() >= STUDENTS.keys() == transfer.LEARNERS.keys()
    tried = [attempt(e, *each) for e in ENCODERS for each in transfer.settings() if each.strength]
    assert len({trial.key for trial in tried}) == len(tried)
    data = synthetic(30, 80)
    for trial in tried:
        losses = trial.model(data).losses
        assert losses == trial.kd * FORMULAS[trial.formula]
        assert ("transfer" in trial.options()) == (trial.formula not in STUDENTS)
    assert attempt("SASRec").model(data).losses == 0


def test_what_is_done_decides_what_is_tried_next() -> None:
    first = list(transfer.wanted({}, 4))
    assert first[:2] == [attempt("GRU4Rec"), attempt("SASRec")]
    usual, besides = first[2 : -2 * len(BESIDES)], first[-2 * len(BESIDES) :]
    assert [trial.encoder for trial in usual] == ["GRU4Rec"] * len(STRENGTHS)  # nothing is known to help it
    assert besides == [attempt(encoder, *each) for each in BESIDES for encoder in ENCODERS]
    done = {trial: record(trial, 0.07) for trial in first}
    assert list(transfer.wanted(done, 4)) == first  # no better than independent
    good = attempt("GRU4Rec", "target", 3.0)
    done[good] = record(good, 0.08)
    more = [trial for trial in transfer.wanted(done, 1) if trial not in done]
    assert more == [attempt("SASRec", "target", 3.0), *(attempt("GRU4Rec", "target", s) for s in (1.0, 10.0))]
    done |= {trial: record(trial, 0.07) for trial in more}  # helps GRU4Rec alone, at one strength
    assert transfer.winner(done) is None
    assert not [trial for trial in transfer.wanted(done, 4) if trial not in done]
    done[more[0]] = record(more[0], 0.075)
    assert transfer.winner(done) == Setting("target", 3.0)
    seeds = [trial for trial in transfer.wanted(done, 3) if trial not in done]
    assert [(t.seed, t.encoder, t.kd > 0) for t in seeds] == [
        (seed, encoder, taught) for seed in (1, 2) for encoder in ENCODERS for taught in (False, True)
    ]


def test_less_dropout_may_win() -> None:
    done = {attempt(encoder): record(attempt(encoder), 0.07) for encoder in ENCODERS}
    for encoder in ENCODERS:
        trial = attempt(encoder, "spliced", 1.0, LESS)
        done[trial] = record(trial, 0.08)
    assert transfer.winner(done) == Setting("spliced", 1.0, LESS)
    fresh = attempt("SASRec", "spliced", 1.0, LESS, seed=1)
    assert fresh in list(transfer.wanted(done, 2))
    page = transfer.report([*done.values(), record(fresh, 0.08)], 2)
    assert "| `1 * KD(temperature=1.0, on='spliced')`, dropout 0.1 | 2 |" in page


def test_a_falling_rate_is_named_and_compared_with_the_default() -> None:
    alone, falling = attempt("SASRec"), attempt("SASRec", "KD", 1.0, cosine=LONG)
    assert falling.options()["epochs"] == LONG
    page = transfer.report([record(alone, 0.07, ensemble=3), record(falling, 0.08)], 1)
    (row,) = (line for line in page.splitlines() if "falls over" in line)
    assert row.startswith("| `1 * KD(temperature=1.0)`, the rate falls over 20 epochs | 1 |")
    assert "+0.0693" in row


def test_the_table_compares_with_independent_members_of_the_same_seeds() -> None:
    target = [attempt("SASRec", "target", 3.0, seed=seed) for seed in (0, 1)]
    records = [record(attempt("SASRec"), 0.07, ensemble=3), *(record(trial, 0.08) for trial in target)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in transfer.report(records, 4).splitlines()]
    rows = {cells[0]: cells for cells in lines if cells}
    assert rows["independent"][7:] == [f"{1 / torch.tensor(5.0).log2():.4f}", "", "1.000"]
    taught = rows["`3 * KD(temperature=1.0, part='target')`"]
    assert taught[1] == "2"
    assert taught[8].startswith("+0.0693")
    assert "## GRU4Rec" not in transfer.report(records, 4)


def test_what_ran_on_two_makes_of_machine_is_compared_on_the_same() -> None:
    here, there = record(attempt("SASRec"), 0.07, ensemble=5), record(attempt("SASRec"), 0.07, ensemble=3)
    there["machine"] = {"processor": "another", "torch": "2"}
    taught = record(attempt("SASRec", "KD", 1.0), 0.08, ensemble=3)
    assert transfer.finished([here, there]) == {attempt("SASRec"): here}
    third = {"processor": "a third", "torch": "2"}  # the first of both
    for machine, difference in ((here["machine"], "+0.0745"), (there["machine"], "+0.0000"), (third, "+0.0745")):
        rows = transfer.report([here, there, {**taught, "machine": machine}], 1).splitlines()
        (row,) = (line for line in rows if line.startswith("| `1 * KD(temperature=1.0)` |"))
        assert row.split("|")[9].strip().startswith(difference), row


def test_students_are_new_networks_and_their_teacher_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "fit", partial(fit, epochs=2))
    data, trial, alone = synthetic(40, 80), attempt("GRU4Rec", "students", 10.0), attempt("GRU4Rec")
    assert trial.teachers == [alone]
    first, anew = (each.model(data).state_dict() for each in (alone, trial))
    assert not any(torch.equal(value, anew[name]) for name, value in first.items() if value.std() > 0)
    found = trials.train(trial, data, tmp_path / trial.key)
    assert found["trial"]["formula"] == "students"
    at = tmp_path / alone.key / trials.BEST
    taught, written = tmp_path / trial.key / trials.BEST, at.stat().st_mtime_ns
    before = torch.load(taught, weights_only=True)["model"]
    stronger = attempt("GRU4Rec", "students", 30.0)
    trials.train(stronger, data, tmp_path / stronger.key)
    assert at.stat().st_mtime_ns == written
    after = torch.load(tmp_path / stronger.key / trials.BEST, weights_only=True)["model"]
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    page = transfer.report([record(alone, 0.07, ensemble=3), record(trial, 0.08)], 1)
    assert "| `10 * KD(temperature=1.0)`, students | 1 |" in page


def test_students_of_both_encoders_learn_from_one_ensemble_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "fit", partial(fit, epochs=1))
    teachers: list[EnsembleKD] = []
    monkeypatch.setattr(
        trials, "FromTeacher", lambda teacher, **o: teachers.append(teacher) or FromTeacher(teacher, **o)
    )
    data, trial = synthetic(40, 80), attempt("SASRec", "mixed", 10.0)
    assert trial.teachers == [attempt("SASRec"), attempt("GRU4Rec")] == attempt("GRU4Rec", "mixed", 3.0).teachers
    trials.train(trial, data, tmp_path / trial.key)
    (teacher,) = teachers
    kinds = [type(teacher.encoder.member(i)).__name__ for i in range(len(teacher))]
    assert kinds == ["SASRec"] * 3 + ["GRU4Rec"] * 3
    assert teacher.weights.std() > 0  # calibrated
    first = trials.trained(trial.teachers[0], data, tmp_path)
    ids = data.inputs("test", 10)[:4]
    assert torch.allclose(teacher.member_scores(ids)[:3], first.member_scores(ids), atol=1e-5)


@pytest.mark.slow
def test_the_study_runs_and_takes_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "load", lambda dataset, folder: synthetic(40, 80))
    monkeypatch.setattr(trials, "fit", partial(fit, epochs=2))
    monkeypatch.setattr(transfer, "STRENGTHS", {"ambiguity": (-0.5, -0.25, 0.5)})
    monkeypatch.setattr(transfer, "BESIDES", (Setting("spliced", 1.0, LESS), Setting(cosine=3)))
    known = attempt("GRU4Rec", "ambiguity", -0.5)
    (tmp_path / "known").write_text(json.dumps(record(known, 1.0)) + "\n")
    given = ["--data-dir", str(tmp_path), *(f"--{name}={tmp_path / name}" for name in ("results", "known", "output"))]
    transfer.main([*given, "--report", str(tmp_path / "page"), "--seeds", "1"])
    done = [Trial(**r["trial"]) for r in trials.read(tmp_path / "results")]
    assert done[:2] == [attempt("GRU4Rec"), attempt("SASRec")]
    assert attempt("SASRec", "ambiguity", -0.5) in done
    assert known not in done  # it helped
    page = (tmp_path / "page").read_text()
    assert "to run: 0." in page
    assert page.count("-0.5 * Ambiguity()") == 2
    transfer.main([*given, "--report", str(tmp_path / "page"), "--seeds", "1"])
    assert len(trials.read(tmp_path / "results")) == len(done)
