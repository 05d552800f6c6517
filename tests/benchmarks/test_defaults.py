"""What the defaults reach, on made-up data: runs, a mixed ensemble of them, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import defaults, trials
from benchmarks.trials import Trial
from ensemble_kd import fit
from ensemble_kd.data import synthetic


def test_the_study_of_defaults_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "load", lambda dataset, folder: synthetic(40, 80))
    monkeypatch.setattr(defaults, "FIRST", (("Beauty", "GRU4Rec"), ("LastFM", "SASRec")))
    monkeypatch.setattr(defaults, "TUNED", [Trial("LastFM", "SASRec", dropout=0.1, cosine=1)])
    monkeypatch.setattr(trials, "fit", lambda *model_and_data, **given: fit(*model_and_data, **{"epochs": 3, **given}))
    files = {name: str(tmp_path / name) for name in ("results", "output", "page")}
    given = ["--data-dir", str(tmp_path), *(f"--{name}={path}" for name, path in files.items()), "--seeds", "0"]
    defaults.main([*given, "--only", "Beauty"])
    first = (tmp_path / "results").read_text()
    defaults.main(given)
    records = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert (tmp_path / "results").read_text().startswith(first)
    done = [Trial(**r["trial"]) for r in records if "trial" in r]
    assert len(done) == len(set(done)) == 6
    joined = [(r["mixed"], r["kd"], r["weights"]) for r in records if "mixed" in r]
    assert len(joined) == len(set(joined)) == 8
    page = (tmp_path / "page").read_text()
    assert "| LastFM | SASRec |" in page
    assert "| ML-1M, three SASRec, independent |" in page
    assert "dropout 0.1, 1 epochs, lr 0.002" in page
    assert "The mixed ensemble beats three SASRec, KD of 1, both calibrated" in page
    assert page.count("two SASRec and a GRU4Rec") == 4
