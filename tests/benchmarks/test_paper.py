"""The paper's study: declared runs, exact resume, honest tables, tests that find what is there and nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.paper import __main__ as command
from benchmarks.paper import claims, published, report, store
from benchmarks.paper.analysis import Test, ambiguity, diagnose, ndcg, paired_bootstrap
from benchmarks.paper.recipes import INDEPENDENT, Run, load, recipe
from benchmarks.paper.tables import Study, runs, study
from ensemble_kd import EnsembleKD, presets
from ensemble_kd.encoders import SASRec
from ensemble_kd.evaluation import evaluate

Test.__test__ = False  # type: ignore[attr-defined]  # a NamedTuple of ours, no case


def cut(text: str) -> str:
    """A report without what a clock says."""
    return re.sub(rf"{report.COST}.*?(?=\n#|\Z)", "", text, flags=re.DOTALL)


def section(text: str, heading: str) -> str:
    """A section of a report, from its heading to the next."""
    return heading + text.partition(heading)[2].partition("\n#")[0]


@pytest.mark.slow
def test_smoke_and_a_study_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tables whole; and stopped within a run, stopped between runs, resumed: the same report."""
    arguments = ["--scale", "smoke", "--only", "table4", "table1"]
    command.main([*arguments, "--output", str(tmp_path / "whole")])
    whole = (tmp_path / "whole" / "REPORT.md").read_text()
    wanted = list(runs(study("smoke", ["synthetic"], ["table4", "table1"])))
    assert f"from {len(wanted)} finished runs of {len(wanted)}." in whole
    gains = [line.split(" | ") for line in section(whole, report.GAINS).splitlines() if line.startswith("| SASRec")]
    assert (
        len(gains) == 5
    )  # (1), (2), (3), (4) and (7), which has its pair in Table 1; "one network" has nothing to lose
    for _, _, _, overlap, members, differing, ensemble in gains:
        assert float(members) - float(differing) == pytest.approx(float(ensemble.strip(" |")), abs=2e-4)
        assert overlap

    class Stop(Exception):
        pass

    def stopping(at: int) -> None:
        calls, kept = 0, store.append

        def append(*args: object) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Stop  # trained, tested, and not yet written
            kept(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(command.store, "append", append)

    output = ["--output", str(tmp_path / "parts")]
    stopping(3)
    with pytest.raises(Stop):
        command.main([*arguments, *output])
    monkeypatch.undo()
    assert len(store.read(tmp_path / "parts" / "results.jsonl")) == 2
    command.main([*arguments, *output, "--report-only"])
    parts = (tmp_path / "parts" / "REPORT.md").read_text()
    assert "Table 4" in parts
    assert "Table 1" not in parts  # nothing of it has run, or a single row
    assert "from 2 finished runs" in parts
    whole_records = (tmp_path / "whole" / "results.jsonl").read_text().splitlines(keepends=True)
    with (tmp_path / "parts" / "results.jsonl").open("a") as file:
        file.writelines(whole_records[5:])  # so that few are left
    command.main([*arguments, *output])
    assert cut((tmp_path / "parts" / "REPORT.md").read_text()) == cut(whole)
    command.main([*arguments, *output])  # nothing left to do
    assert len((tmp_path / "parts" / "results.jsonl").read_text().splitlines()) == len(wanted)
    assert not list((tmp_path / "parts").glob("*/*.pt"))


def test_all_tables_declare_runs_that_can_be_built() -> None:
    data = load("synthetic", None)
    smoke = list(runs(study("smoke", ["synthetic"])))
    assert {run.encoder for run in smoke} == {"GRU4Rec", "Caser", "SASRec", "BERT4Rec"}
    assert {run.n for run in smoke} == {1, 2, 3, 4}
    for run in smoke[::7]:
        step = run.model(data).loss(data.train_windows(run.fit_window)[:8])
        assert torch.isfinite(step.total)
    with pytest.raises(SystemExit):
        command.parse(["--scale", "smoke", "--only", "table9"])
    with pytest.raises(SystemExit):
        command.parse(["--scale", "cpu"])
    with pytest.raises(SystemExit):
        command.parse(["--scale", "cpu", "--report-only", "--datasets", "ML-1M"])


@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
def test_every_run_has_one_key_and_the_most_telling_come_first(scale: str) -> None:
    tables = study(scale, ["Beauty"] if scale == "cpu" else ["Beauty", "ML-1M"])  # type: ignore[arg-type]
    wanted = list(runs(tables))
    assert len({run.key for run in wanted}) == len(set(wanted)) == len(wanted)
    four, *_ = tables
    seeds = [len(row.runs) for row in four.rows]
    claimed = [row for row in four.rows if len(row.runs) > min(seeds)]
    expected = [row.runs[seed] for seed in range(max(seeds)) for row in claimed]
    expected += [row.runs[0] for row in four.rows if row not in claimed]
    assert wanted[: len(expected)] == expected
    assert bool(claimed) == (scale == "cpu")
    for table in tables:
        for row in table.rows:
            first = 5 if table.name == "replication" else 0
            assert [run.seed for run in row.runs] == list(range(first, first + len(row.runs)))
            assert len({replace(run, seed=0) for run in row.runs}) == 1
    four = next(table for table in tables if (table.name, table.dataset) == ("table4", "Beauty"))
    assert len(four.rows) == 9
    assert all(len(row.runs) >= {"smoke": 1, "cpu": 3, "paper": 5}[scale] for row in four.rows)


def test_the_papers_preset_is_the_papers() -> None:
    run = Study("paper", "Beauty").run("BERT4Rec", 3)
    assert (run.d_model, run.views, run.epochs, run.window, run.batch_size, run.num_layers) == (256, 8, 250, 15, 256, 2)
    assert (run.lr, run.schedule, run.mask_ratio, run.classifier) == (1e-3, "step", 0.15, "linear")
    data = load("synthetic", None)
    assert run.losses() == presets.paper(data.item_attributes)["losses"]
    same = replace(run, newest=None).model(data).objective
    assert same == presets.paper()["objective"]
    for name in ("epochs", "batch_size", "lr", "window", "window_step"):
        assert getattr(run, name) == presets.PAPER_FIT[name]
    assert run.schedules()["schedule"] == presets.PAPER_FIT["schedule"]


def test_the_best_that_we_know_is_the_preset() -> None:
    run, data = Study("cpu", "Beauty").best().rows[0].runs[0], load("synthetic", None)
    assert run.losses() == presets.strong_kd(data.item_attributes)["losses"]
    ramp = run.schedules()["transfer"]
    by_epochs = presets.STRONG_KD_FIT["transfer"]
    assert [ramp(e, 10) for e in range(11)] == pytest.approx([by_epochs(e, 10) for e in range(11)])
    assert EnsembleKD(run.encoder_fn(data), 2, **presets.strong_kd()).losses == presets.strong_kd()["losses"]


def test_rows_of_table_4_differ_in_what_their_names_say() -> None:
    rows = {row.label: row.runs[0] for row in Study("cpu", "Beauty").table_4().rows}
    assert rows.keys() == published.TABLE_4["Beauty"].keys()
    full = rows["(1) EMKD (3)"]
    told = {
        "(2) without ICL": {"icl"},
        "(3) without CCL": {"ccl"},
        "(4) without KD": {"kd"},
        "(9) without AP": {"ap"},
        "(7) EMKD (2)": {"n"},
        "(8) EMKD (4)": {"n"},
        "(6) one network": {"n", *INDEPENDENT},
        "(5) independent": set(INDEPENDENT),
    }
    unread = {"temperature", "kd_temperature", "transfer_from", "transfer_full"}
    for label, names in told.items():
        differing = {f.name for f in fields(Run) if getattr(rows[label], f.name) != getattr(full, f.name)}
        changed = {name for name in names if name == "n" or getattr(full, name)}
        assert differing - unread == changed, label


def test_recipes_name_settings_of_runs() -> None:
    names = {field.name for field in fields(Run)}
    for scale in ("smoke", "cpu", "paper"):
        for encoder in ("GRU4Rec", "Caser", "SASRec", "BERT4Rec"):
            assert recipe(scale, "Beauty", encoder).keys() <= names  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 20000), min_size=1, max_size=50))
def test_packed_ranks_come_back(ranks: list[int]) -> None:
    assert store.unpack(store.pack(torch.tensor(ranks))).tolist() == [min(rank, store.FAR) for rank in ranks]


def test_one_process_a_run(tmp_path: Path) -> None:
    with store.taken(tmp_path) as first, store.taken(tmp_path) as second:
        assert (first, second) == (True, False)
    with store.taken(tmp_path) as again:
        assert again


def test_the_bootstrap_finds_a_difference_and_no_other() -> None:
    rng = np.random.default_rng(0)
    hits = ndcg(rng.integers(0, 100, (3, 4000)))
    none = paired_bootstrap(hits, hits, resamples=500)
    assert (none.difference, none.p, none.wins) == (0.0, 1.0, 0)
    better = hits.copy()
    better[:, :400] += 0.1
    found = paired_bootstrap(better, hits, resamples=500)
    assert found.p < 0.01
    assert found.low < found.difference < found.high
    assert found.difference == pytest.approx(0.01)
    assert (found.wins, found.seeds) == (3, 3)
    back = paired_bootstrap(hits, better, resamples=500)
    assert (back.difference, back.wins) == (-found.difference, 0)
    # Under the null p is about uniform, so it is seldom small.
    ps = [paired_bootstrap(rng.normal(size=(1, 300)), rng.normal(size=(1, 300)), resamples=200).p for _ in range(60)]
    assert sum(p < 0.05 for p in ps) <= 9
    # Its standard error is that of the mean.
    first, second = rng.normal(size=(1, 500)), rng.normal(size=(1, 500))
    test = paired_bootstrap(first, second, resamples=4000)
    error = (first - second).std() / 500**0.5
    assert (test.high - test.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 6), st.integers(0, 99))
def test_ambiguity_is_the_gain_exactly(n: int, b: int, v: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, b, v, generator=g, dtype=torch.float64)
    found = ambiguity(logits, torch.randint(v, (b,), generator=g))
    assert found["ambiguity"] >= -1e-12
    assert found["members_ce"] == pytest.approx(found["ensemble_ce"] + found["ambiguity"], abs=1e-10)


def test_diagnoses_agree_with_the_librarys_evaluation() -> None:
    data = load("synthetic", None)
    model = EnsembleKD(lambda: SASRec(data.num_items, d_model=8, max_len=9, init_std=0.5), 3)
    found = diagnose(model, data, rows=37)
    expected = evaluate(model, data, "test", exclude="history").rows["ensemble"]["NDCG@10"]
    assert found["NDCG@10 of mean logits"] == pytest.approx(expected, abs=1e-5)
    assert found["members_ce"] == pytest.approx(found["ensemble_ce"] + found["ambiguity"], abs=1e-4)


def test_verdicts_and_estimates(tmp_path: Path) -> None:
    assert claims.verdict(Test(0.1, 0.05, 0.2, 0.01, 3, 3)) == "holds"
    assert claims.verdict(Test(0.1, 0.05, 0.2, 0.01, 4, 5)) == "holds"
    assert claims.verdict(Test(0.1, 0.05, 0.2, 0.01, 3, 5)) == "not settled"
    assert claims.verdict(Test(-0.1, -0.2, -0.05, 0.01, 2, 5)) == "not settled"
    run = Run("Beauty", "SASRec")
    assert command.remaining_s([run], {}) is None
    store.append(tmp_path / "r.jsonl", run, {"wall_s": 30.0})
    done = store.read(tmp_path / "r.jsonl")
    assert json.loads((tmp_path / "r.jsonl").read_text())["run"]["encoder"] == "SASRec"
    assert command.remaining_s([replace(run, n=6), run], done) == pytest.approx(90)
    assert command.remaining_s([replace(run, encoder="Caser")], done) == pytest.approx(30)
