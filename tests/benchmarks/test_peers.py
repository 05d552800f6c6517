"""Side by side with other libraries: one evaluator for all, an honest clock, records, and a page that shows losses."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.paper.store import pack
from benchmarks.peers import __main__ as command
from benchmarks.peers import environments, jobs, page, records
from benchmarks.peers.jobs import JOBS, Job, by_name
from benchmarks.peers.ranking import mean_scores, rank, scores
from benchmarks.peers.runners import shared
from ensemble_kd import EnsembleKD
from ensemble_kd.data import SequenceData, synthetic
from ensemble_kd.encoders import SASRec
from ensemble_kd.evaluation import evaluate

ITEMS = 80
PLACES = "ENSEMBLE_KD_PEERS_ENVIRONMENTS"


@pytest.fixture(scope="module")
def data() -> SequenceData:
    return synthetic(num_users=30, num_items=ITEMS)


@pytest.fixture(scope="module")
def model() -> EnsembleKD:
    torch.manual_seed(0)
    return EnsembleKD(lambda: SASRec(ITEMS, d_model=8, max_len=50), n=2).eval()


def vectors(model: EnsembleKD, data: SequenceData, split: str) -> shared.Vectors:
    """Return what a runner leaves."""
    items = model.item_vectors()
    queries = model.query_vectors(data.inputs(split, 50))  # type: ignore[arg-type]
    return shared.Vectors(queries, torch.cat([torch.full_like(items[:1], 9), items]), torch.zeros(len(items) + 1))


def sequences(data: SequenceData) -> list[list[int]]:
    items, offsets = data.history("test")
    last = data.target("test").tolist()
    return [[*items[offsets[u] : offsets[u + 1]].tolist(), target] for u, target in enumerate(last)]


def test_vectors_are_ranked_as_a_model_is(model: EnsembleKD, data: SequenceData, tmp_path: Path) -> None:
    shared.write(tmp_path, vectors(model, data, "test"), {"curve": []})
    wanted = evaluate(model, data, "test", exclude="history").ranks["ensemble"]
    assert torch.equal(rank(scores(tmp_path), data), wanted)
    assert json.loads((tmp_path / "account.json").read_text()) == {"curve": []}


def test_validation_of_the_runners_is_that_of_the_library(model: EnsembleKD, data: SequenceData) -> None:
    wanted = evaluate(model, data, "valid", exclude="history").rows["ensemble"]["NDCG@10"]
    found = shared.ndcg(vectors(model, data, "valid"), *shared.split_of(sequences(data), "valid"))
    assert found == pytest.approx(wanted, abs=1e-6)


def test_ties_and_numbers_that_are_none_count_against_the_target() -> None:
    data = SequenceData.from_sequences([[1, 2, 3, 4]])
    assert rank([torch.zeros(1, 5)], data).tolist() == [0]  # only the history is as good
    data = SequenceData.from_sequences([[1, 2, 3], [3, 2, 4]])
    assert rank([torch.zeros(2, 5)], data).tolist() == [1, 1]
    assert rank([torch.full((2, 5), torch.nan)], data).tolist() == [1, 1]
    flat = shared.Vectors(torch.zeros(2, 1), torch.zeros(5, 1), torch.zeros(5))
    assert shared.ndcg(flat, *shared.split_of([[1, 2, 3], [3, 2, 4]], "test")) == pytest.approx(1 / np.log2(3))


def test_items_that_a_library_cannot_score_come_last() -> None:
    data = SequenceData.from_sequences([[1, 2, 3], [1, 2, 4]])
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf])
    assert rank([bias.expand(2, -1)], data).tolist() == [0, 1]


@pytest.mark.parametrize("users", [1, 3])
def test_scores_of_other_users_are_refused(users: int) -> None:
    data = SequenceData.from_sequences([[1, 2, 3], [3, 2, 4]])
    with pytest.raises(ValueError, match="scores of 2 users, got"):
        rank([torch.zeros(1, 5)] * users, data)


def test_the_split_leaves_one_out(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("7 1 2 3 4\n9 5 6 7\n")
    found = shared.read_sequences(path)
    assert shared.split_of(found, "valid") == ([[1, 2], [5]], [3, 6])
    assert shared.split_of(found, "test") == ([[1, 2, 3], [5, 6]], [4, 7])
    path.write_text("7 1 2 3\n9 5 6\n")
    with pytest.raises(ValueError, match="line 2 has fewer than three items"):
        shared.read_sequences(path)


class Cpu:
    """A clock of CPU and wall that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        fake = SimpleNamespace(process_time=lambda: self.now, perf_counter=lambda: 2 * self.now)
        monkeypatch.setattr(shared, "time", fake)


def test_the_clock_counts_training_alone_and_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, kept = Cpu(monkeypatch), []
    values = iter([0.1, 0.3, 0.2, 0.25, 0.2, 0.1, 0.1])

    def validate() -> float:
        cpu.now += 1000.0  # costs much and must not count
        return next(values)

    watch = shared.Watch(1.0, validate, lambda: kept.append(len(watch.curve)))
    for _ in range(14):
        cpu.now += 4.0
        watch.step()
    cpu.now += 4.0
    with pytest.raises(shared.Over):
        watch.step()
    account = watch.account(batches=30)
    assert [point["cpu_s"] for point in account["curve"]] == [12.0, 24.0, 36.0, 48.0, 60.0]
    assert account["best"] == {"cpu_s": 24.0, "wall_s": 48.0, "ndcg": 0.3, "epochs": 0, "steps": 6}
    assert kept == [1, 2]
    assert account["seconds_of_training"] == {"cpu": 60.0, "wall": 120.0}


def test_the_clock_validates_after_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Cpu(monkeypatch)
    watch = shared.Watch(None, lambda: 0.5, lambda: None)
    for step in range(1, 7):
        cpu.now += 2.0
        watch.step(ends_epoch=step % 3 == 0)
    assert [point["epochs"] for point in watch.curve] == [1, 2]
    assert watch.epoch_cpu_s == [6.0, 6.0]
    cpu.now += 5.0
    watch.resume()  # what passed since the last step is dropped
    assert watch.cpu_s() == 12.0


def test_recommendations_are_compared_with_the_vectors(model: EnsembleKD, data: SequenceData) -> None:
    histories = [items[:-1] for items in sequences(data)]
    answers = model.recommend(data.inputs("test", 50), k=10).items.tolist()
    found = vectors(model, data, "test")
    assert shared.agreement(found, histories, answers) == 1.0
    assert shared.agreement(found, histories, [histories[u] for u in range(len(histories))]) == 0.0


def test_many_users_are_asked_and_a_few_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, asked = Cpu(monkeypatch), []

    def answer(users: list[int]) -> None:
        asked.append(len(users))
        cpu.now += 0.001 if len(users) == 1 else 0.5

    found = shared.requests(answer, 10_000)
    assert found["request_cpu_ms"] == pytest.approx(1.0)
    assert found["users_per_cpu_s"] == pytest.approx(shared.SOME / 2.0)  # four blocks
    assert asked.count(1) == shared.REQUESTS + 3
    assert sum(asked) - asked.count(1) == shared.SOME


def made_up(name: str, ndcg: float, **other: Any) -> dict[str, Any]:
    """Return the record of a run that never was: ``ndcg`` is the share of users whose item comes first."""
    job, users = by_name(name), 200
    ranks = torch.where(torch.arange(users) < ndcg * users, 0, 99)
    point = {"cpu_s": 60.0, "wall_s": 90.0, "ndcg": ndcg, "epochs": 2, "steps": 20}
    return {
        "name": name,
        "dataset": "Beauty",
        "seed": 0,
        "minutes": 2.0,
        "library": job.library,
        "version": "1.0",
        "settings": job.of("Beauty"),
        "source": job.source,
        "after": job.after,
        "test": {"NDCG@10": ndcg, "HR@10": ndcg},
        "protocol": "leave-one-out test",
        "ranks": pack(ranks),
        "curve": [point],
        "best": point,
        "epochs": 2,
        "epoch_cpu_s": [30.0, 30.0],
        "batches": 10,
        "seconds_of_training": {"cpu": 60.0, "wall": 90.0},
        "peak_mib": 500.0,
        "parameters": 1000,
        "serving": {"request_cpu_ms": 1.0, "request_wall_ms": 1.0, "users_per_cpu_s": 100.0},
        "agreement": 1.0,
        "lines": 10,
        "installed": {"packages": 9, "seconds": 5.0, "mib": 900.0, "torch_mib": 700.0, "pip_check": ["fine"]},
        "machine": {"processor": "made up", "cores": 1},
        "revision": "0",
        **other,
    }


def test_the_page_shows_what_a_peer_is_ahead_in(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ours = made_up("ensemble_kd SASRec", 0.1)
    better = made_up("RecTools SASRec, sampled", 0.4, peak_mib=400.0, lines=12)
    worse = made_up("RecBole SASRec", 0.05, epoch_cpu_s=[], batches=40)
    narrow = made_up("ensemble_kd SASRec, width 64", 0.09, peak_mib=450.0)
    text = page.write(tmp_path, [ours, better, worse, narrow]).read_text()
    losses = text.partition("### Where a peer is ahead")[2].partition("\n## ")[0]
    assert "- test NDCG@10: **RecTools SASRec, sampled** 0.4000, ours 0.1000 and 0.0900 (width 64)." in losses
    assert "- peak memory of training, MiB: **RecTools SASRec, sampled** 400, ours 500 and 450 (width 64)." in losses
    assert "RecBole" not in losses
    assert "lines" not in losses
    rows = [line for line in text.splitlines() if line.startswith("| RecTools SASRec, sampled | 0.4000")]
    assert "| +0.3000 (" in rows[0]
    assert "| 0.50 |" in next(line for line in text.splitlines() if line.startswith("| RecBole SASRec | 0.0500"))
    assert "120 (from a part)" in text
    assert (tmp_path / "peers-Beauty.svg").stat().st_size > 1000


def test_a_page_without_losses_says_so(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = page.write(tmp_path, [made_up("ensemble_kd SASRec", 0.1), made_up("RecBole SASRec", 0.05)]).read_text()
    assert "In none of these numbers." in text


def test_a_part_without_ours_or_without_a_curve_shows_neither(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = page.write(tmp_path, [made_up("RecTools SASRec, three separate", 0.1, curve=[])]).read_text()
    assert "0.1000" in text
    assert "ahead of one network" not in text
    assert "![" not in text
    assert not list(tmp_path.glob("*.svg"))


def test_an_average_is_that_of_the_scores_and_costs_all_of_its_parts(
    model: EnsembleKD, data: SequenceData, tmp_path: Path
) -> None:
    """Two members of an ensemble, ranked apart and averaged by hand, are ranked as the ensemble itself."""
    account = {
        name: made_up("RecTools SASRec, softmax", 0.1)[name]
        for name in records.averaged([made_up("RecBole SASRec", 0.1)])
    }
    folders = [tmp_path / str(i) for i in range(2)]
    for i, folder in enumerate(folders):
        folder.mkdir()
        shared.write(folder, vectors(model.member(i), data, "test"), account)
    assert torch.equal(rank(mean_scores(folders), data), evaluate(model, data, "test").ranks["ensemble"])
    found = records.averaged([account, account])
    assert found["seconds_of_training"] == {"cpu": 120.0, "wall": 180.0}
    assert found["serving"]["request_cpu_ms"] == 2.0
    assert found["serving"]["users_per_cpu_s"] == 50.0
    assert page.epochs_done(found) == 2.0
    assert page.cpu_s_of_epoch(found) is None


def test_a_run_within_its_first_epoch_takes_the_batches_of_another() -> None:
    known, short = (
        made_up("ensemble_kd SASRec", 0.1),
        made_up("ensemble_kd SASRec, three", 0.1, batches=0, epoch_cpu_s=[]),
    )
    assert records.with_batches(short, [made_up("RecBole SASRec", 0.1, batches=7), known])["batches"] == 10
    assert records.with_batches(short, [{**known, "dataset": "ML-1M"}])["batches"] == 0
    assert page.epochs_done({**short, "batches": 10}) == 2.0


def test_the_page_compares_epochs_at_equal_width(tmp_path: Path) -> None:
    one, three = "RecTools SASRec, softmax", "RecTools SASRec, three under ensemble_kd"
    rows = [
        made_up("ensemble_kd SASRec, width 64", 0.1, epoch_cpu_s=[10.0]),
        made_up(one, 0.1, epoch_cpu_s=[40.0]),
        made_up(three, 0.1, epoch_cpu_s=[30.0]),
    ]
    assert "RecTools SASRec, softmax 40 s (4.0 times as long)" in page.speed(rows)
    assert "take 30 s of CPU an epoch, three trainings by RecTools 120 s: 25 % of them." in page.speed(rows)
    assert page.speed(rows[2:]) == page.speed([]) == ""
    unequal = "An epoch is not the same here"
    assert unequal in page.speed([{**row, "dataset": "ML-1M"} for row in rows])
    assert unequal not in page.speed(rows)


def test_three_of_a_peer_are_compared_with_three_of_its_own() -> None:
    together = made_up("RecTools SASRec, three under ensemble_kd", 0.2)
    apart = made_up("RecTools SASRec, three separate", 0.1, best={"cpu_s": 180.0})
    said = page.around([together, apart])
    assert "have 0.2000 after 1.0 minutes" in said
    assert "0.1000 after 3.0: +0.1" in said
    another = made_up("RecBole SASRec, three under ensemble_kd", 0.2)
    assert page.around([together]) == page.around([apart, another]) == ""


def test_epochs_are_compared_with_the_targets_of_the_others_too() -> None:
    names = {page.NARROW: 40.0, page.SHORT: 5.0, "RePlay SASRec": 20.0, "RecBole SASRec": 90.0}
    rows = [made_up(name, 0.1, dataset="ML-1M", epoch_cpu_s=[seconds]) for name, seconds in names.items()]
    assert "an epoch takes 5 s here: RePlay SASRec 4.0 times as long." in page.speed(rows)
    assert "With the same" not in page.speed([rows[0], *rows[2:]])
    (line,) = [line for line in page.ahead(rows) if "seconds an epoch" in line]
    assert "20.0, ours 40.0 and 5.0 (width 64, 50 items)." in line


def test_speed_on_two_makes_of_machine_is_not_compared() -> None:
    there = {"machine": {"processor": "another", "cores": 1}}
    slow = {"epoch_cpu_s": [90.0], "dataset": "ML-1M"}
    fast = {
        "epoch_cpu_s": [1.0],
        "dataset": "ML-1M",
        "installed": made_up(page.NARROW, 0.1)["installed"] | {"seconds": 2},
    }
    ours = [
        made_up(name, 0.1, **slow) for name in (page.NARROW, page.SHORT, "RecTools SASRec, three under ensemble_kd")
    ]
    names = ("RePlay SASRec", "RecTools SASRec, softmax")
    same, other = ([made_up(name, 0.1, **fast, **where) for name in names] for where in ({}, there))
    assert page.speed([*ours, *other]) == ""
    assert page.speed([*ours, *same]).count("RePlay SASRec") == 2
    assert "three trainings by RecTools" in page.speed([*ours, *same])
    assert page.ahead([*ours, *other]) == []
    assert {line.partition(":")[0] for line in page.ahead([*ours, *same])} == {
        "- CPU seconds an epoch",
        "- seconds of installation",
    }


def test_several_seeds_are_summed_up_and_paired(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mine = [made_up(page.NARROW, share, seed=seed, minutes=20.0) for seed, share in enumerate((0.2, 0.3, 0.4))]
    theirs = [made_up("RecBole SASRec", share, seed=seed, minutes=20.0) for seed, share in ((0, 0.1), (2, 0.2))]
    single = made_up("RecBole GRU4Rec", 0.3, minutes=20.0)
    text = page.write(tmp_path, [*mine, *theirs, single]).read_text()
    over, _, rest = text.partition("## Beauty, 20 minutes of CPU for each run, seed 0")
    assert "| ensemble_kd SASRec, width 64 | 0, 1, 2 | 0.3000 ± 0.1000 |  |" in over
    assert "| RecBole SASRec | 0, 2 | 0.1500 ± 0.0707 | -0.1500 (" in over
    assert "GRU4Rec" not in over
    assert all(f"run, seed {seed}" in rest for seed in (1, 2))
    assert page.over_seeds([*mine[:1], single]) == ""


def test_each_machine_is_named_with_its_runs_and_how_fast_it_is() -> None:
    there = {"machine": {"processor": "B", "cores": 2}}
    one, other = made_up("RecBole SASRec", 0.1), made_up("RePlay SASRec", 0.1, **there)
    assert page.machines([one, one], []) == "made up, one thread of 1"
    there_too = made_up(page.NARROW, 0.1, seed=1, epoch_cpu_s=[7.0], **there)
    said = page.machines([one, other, one], [there_too, {**there_too, "minutes": 20.0, "epoch_cpu_s": [9.0]}])
    first, second = said.split("; but ")
    assert first == "made up, one thread of 1"  # of most runs
    assert second == f"RePlay SASRec on B, one thread of 2, 7 s for an epoch of {page.NARROW}"


def test_a_likely_reason_is_one_of_these_runs() -> None:
    narrow, wide = made_up("ensemble_kd SASRec, width 64", 0.1), made_up("ensemble_kd SASRec", 0.1)
    memory, lines = (next(m for m in page.MEASURES if m.words.startswith(word)) for word in ("peak memory", "lines"))
    assert page.likely(memory, narrow) == "not known"
    assert page.likely(memory, {**narrow, "dataset": "ML-1M"}) == "ours reads 200 items where the others read 50"
    assert page.likely(memory, wide) == "ours is 128 wide where no width is named"
    assert page.likely(lines, {**wide, "dataset": "ML-1M"}) == lines.reason


def test_the_longest_runs_come_first_and_are_summed_up(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    short = [made_up("ensemble_kd SASRec", 0.1), made_up("RecBole SASRec", 0.05), made_up("RecBole GRU4Rec", 0.08)]
    narrow = made_up("ensemble_kd SASRec, width 64", 0.3, minutes=20.0)
    text = page.write(tmp_path, [*short, narrow, made_up("RecBole SASRec", 0.2, minutes=20.0)]).read_text()
    assert text.index("## Beauty, 20 minutes") < text.index("## Beauty, 2 minutes")
    one = "0.3000 (best validation after 1.0 minutes, 2.0 epochs; it ended by itself after 1.0)"
    assert f"NDCG@10 on test: ensemble_kd SASRec, width 64 {one}; RecBole SASRec 0.2000 (" in text
    assert "NDCG@10 against ensemble_kd SASRec, width 64 (95 %)" in text  # where the wider one has not run
    assert "RecBole GRU4Rec 0.0800 (" in page.summary(short)  # a peer's best
    assert "by itself" not in page.summary([{**each, "minutes": 1.0} for each in short])
    assert page.summary(short[:1]) == page.summary(short[1:]) == ""


def test_the_minutes_of_a_student_name_those_of_its_teacher() -> None:
    three = made_up("ensemble_kd SASRec, three", 0.2, seconds_of_training={"cpu": 180.0, "wall": 200.0})
    student = made_up("ensemble_kd SASRec, student of three", 0.3)
    assert page.teacher_minutes(student, [three, student]) == 3.0
    assert page.teacher_minutes(three, [three, student]) == 0.0
    assert "1.0 + 3.0 of the teacher" in page.accuracy([three, student], [three, student])


def test_records_are_read_back_and_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "peers.jsonl"
    first, again = made_up("RecBole SASRec", 0.1), made_up("RecBole SASRec", 0.2)
    other = made_up("RecBole SASRec", 0.3, minutes=20.0)
    for each in (first, other, again):
        records.append(each, path)
    assert [each["test"]["NDCG@10"] for each in records.read(path)] == [0.2, 0.3]
    assert records.read(tmp_path / "none.jsonl") == []


def test_the_page_of_own_records_lies_beside_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records.append(made_up("RecBole SASRec", 0.1), tmp_path / "own.jsonl")
    before = (page.FOLDER / page.NAME).read_bytes()
    command.main(["--page-only", "--results", str(tmp_path / "own.jsonl")])
    assert "RecBole SASRec" in (tmp_path / page.NAME).read_text(encoding="utf-8")
    assert (page.FOLDER / page.NAME).read_bytes() == before


def test_committed_records_and_page_belong_together(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kept = records.read()
    text = page.write(tmp_path, kept).read_text(encoding="utf-8")
    assert (page.FOLDER / page.NAME).read_text(encoding="utf-8") == text
    for each in kept:
        assert each.get("agreement", 1.0) > 0.99, each["name"]


def test_each_job_has_a_runner_an_environment_and_lines_of_user_code() -> None:
    names = {each.name for each in environments.ENVIRONMENTS}
    for job in JOBS:
        assert job.library in names
        assert job.runner.is_file()
        assert 3 < records.lines_of_user_code(job) < 60
    student, three = (
        records.lines_of_user_code(by_name(f"ensemble_kd SASRec, {x}")) for x in ("student of three", "three")
    )
    assert student > three
    around = [by_name(f"{peer} SASRec, three under ensemble_kd") for peer in ("RecTools", "RecBole")]
    assert all(records.lines_of_user_code(job) < 30 for job in around), "the adapter of one peer, not of both"


def test_results_of_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    job, options = by_name("RePlay SASRec"), {"dataset": "Beauty", "minutes": 2.0, "seed": 0, "small": False}
    folder, data = tmp_path / "run", tmp_path / "Beauty.txt"
    for kept in (job, replace(job, settings={**job.settings, "dropout": 0.9})):
        kept.write(folder, data=data, **options)
        results = folder / "account.json"
        assert not results.exists()
        results.touch()
        kept.write(folder, data=data, **options)
        assert results.exists()
    job.write(folder, data=tmp_path / "other.txt", **options)
    assert not results.exists()


def test_results_of_a_student_are_those_of_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, three = by_name("ensemble_kd SASRec, student of three"), by_name("ensemble_kd SASRec, three")
    folder, options = tmp_path / "run", {"dataset": "Beauty", "minutes": 2.0, "seed": 0, "small": False}
    student.write(folder, data=tmp_path / "Beauty.txt", **options)
    results = folder / "account.json"
    results.touch()
    other = replace(three, settings={**three.settings, "d_model": 32})
    monkeypatch.setattr(jobs, "JOBS", tuple(other if job is three else job for job in JOBS))
    student.write(folder, data=tmp_path / "Beauty.txt", **options)
    assert not results.exists()


def test_every_requirement_is_pinned() -> None:
    for path in environments.REQUIREMENTS.glob("*.txt"):
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert all("==" in line or line == "../../.." for line in lines), path


def test_sizes_count_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0" * 2**20)
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    assert environments.size_mib(tmp_path) == 1.0


def test_the_command_refuses_what_it_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--only", "Nobody"], "no run has Nobody"), ([], "--data-dir is needed")):
        with pytest.raises(SystemExit):
            command.main([*arguments, *(["--page-only"] if arguments else [])])
        assert said in capsys.readouterr().err


def test_runs_are_chosen_by_name_or_by_a_part_of_it() -> None:
    assert [job.name for job in command.chosen(["ensemble_kd SASRec"])] == ["ensemble_kd SASRec"]
    assert {job.library for job in command.chosen(["RecTools"])} == {"rectools"}
    assert command.chosen([]) == list(JOBS)


def test_what_fails_does_not_keep_the_rest_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an environment nor a run; both are named at the end, and only what is missing is tried again."""
    pytest.importorskip("matplotlib")
    broken, tried = {"replay", "RecBole GRU4Rec"}, list[str]()

    def make(environment: environments.Environment, folder: Path) -> dict[str, Any]:
        if environment.name in broken:
            raise RuntimeError("pip install failed")
        return {"version": "1"}

    def train(job: Job, *_: Any, **__: Any) -> list[Path]:
        tried.append(job.name)
        if job.name in broken:
            raise RuntimeError(f"{job.name} ended with 1")
        return []

    monkeypatch.setattr(command, "make", make)
    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(records, "record", lambda job, *_, **__: made_up(job.name, 0.1, dataset="synthetic"))
    names = ["RecBole GRU4Rec", "RecBole SASRec", "RePlay SASRec", "RecTools BERT4Rec"]
    run = ["--smoke", "--minutes", "2", "--output", str(tmp_path), "--only", *names]
    with pytest.raises(SystemExit, match=r"(?s)tries again.*replay is left out: pip.*RecBole GRU4Rec ended with 1"):
        command.main(run)
    assert tried == ["RecBole SASRec", "RecBole GRU4Rec", "RecTools BERT4Rec"]
    assert "RecTools BERT4Rec" in (tmp_path / page.NAME).read_text(encoding="utf-8")
    broken.clear()
    tried.clear()
    command.main(run)
    assert tried == ["RecBole GRU4Rec", "RePlay SASRec"]


@pytest.mark.slow
@pytest.mark.parametrize("library", ["recbole", "rectools", "replay", "ensemble_kd"])
def test_smoke(library: str, tmp_path: Path) -> None:
    """Each library's runners train small networks on made-up data, from the file to the page."""
    places = os.environ.get(PLACES)
    if places is None or not environments.python(Path(places), library).exists():
        pytest.skip(f"{PLACES} names no folder with the environment of {library}: see benchmarks.peers.environments")
    names = [job.name for job in JOBS if job.library == library]
    command.main(["--smoke", "--minutes", "1", "--environments", places, "--output", str(tmp_path), "--only", *names])
    found = records.read(tmp_path / "peers.jsonl")
    assert [each["name"] for each in found] == names
    for each in found:
        assert each["agreement"] == 1.0, each["name"]
        assert each["epochs"] == 2
        assert each["test"]["NDCG@10"] > 0
    assert (tmp_path / page.NAME).is_file()
