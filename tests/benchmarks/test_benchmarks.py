"""The benchmarks run, report what they say they do, and measure against a baseline that computes the same losses."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ensemble_kd.evaluation
from benchmarks import (
    NAMES,
    baseline,
    checks,
    common,
    evaluate,
    gpu,
    limits,
    loss,
    members,
    memory,
    recipes,
    roofline,
    step,
    stream,
    summary,
)
from benchmarks.__main__ import main
from benchmarks.common import Row, Step
from ensemble_kd import EnsembleKD, MaskedItem
from ensemble_kd.data import synthetic
from ensemble_kd.encoders import BERT4Rec

WEIGHTS = [
    baseline.Weights(0.0, 0.0, 0.0, 0.0),
    baseline.Weights(0.7, 0.0, 0.0, 0.0),
    baseline.Weights(0.0, 0.3, 0.2, 0.0),
    baseline.Weights(0.0, 0.0, 0.0, 0.9),
    baseline.Weights(0.7, 0.3, 0.2, 0.9, temperature=0.5),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=["mip", "ap", "contrast", "kd", "all"])
def test_the_baseline_computes_the_librarys_loss(weights: baseline.Weights) -> None:
    data = synthetic(40, 100, num_clusters=10)
    model = EnsembleKD(
        lambda: BERT4Rec(100, d_model=8, max_len=9, dropout=0.0, init_std=0.5).double(),
        n=3,
        objective=MaskedItem(mask_ratio=0.3, views=3),
        losses=weights.losses(),
        item_attributes=data.item_attributes,
    )
    assert model.item_classifier.weight is not None
    with torch.no_grad():
        model.item_classifier.weight.mul_(20)  # far from uniform, so that distillation counts
        model.item_classifier.bias.normal_()
    item_ids = data.train_windows(8)[:12]
    members = baseline.members_of(model)
    found = model.loss(item_ids, generator=torch.Generator().manual_seed(5))
    draw = model.objective.draw(item_ids, mask_token=model.mask_token, generator=torch.Generator().manual_seed(5))
    assert model.attribute_table is not None
    total = baseline.loss(members, draw, model.attribute_table, weights)
    torch.testing.assert_close(total, found.total, rtol=1e-10, atol=1e-10)

    found.total.backward()
    total.backward()
    for name, stacked in model.encoder.named_parameters():
        grads = torch.stack([dict(member.encoder.named_parameters())[name].grad for member in members])  # type: ignore[misc]
        torch.testing.assert_close(grads, stacked.grad, rtol=1e-8, atol=1e-10)
    weight_grads = torch.stack([member.items.weight.grad for member in members])  # type: ignore[misc]
    torch.testing.assert_close(weight_grads, model.item_classifier.weight.grad, rtol=1e-8, atol=1e-10)


def test_the_roofline_counts_the_products_and_the_passes_over_a_tile() -> None:
    t, v, d, n = 512, 4096, 64, roofline.N
    found = {kernel: roofline.estimate(t, v, d, kernel=kernel, in_one=True, tile_rows=None) for kernel in (True, False)}
    for row in found.values():
        assert row["tflop"] == pytest.approx(6 * n * t * v * d / 1e12, rel=0.02)  # logits and two gradients
    # Written by a product, read and written by the kernel, read by two products and by the sum for the biases; and
    # the classifiers and their gradient pass by a few times, whatever the kernel does.
    plane, classifiers = 2 * n * t * v / 1e9, 4 * n * v * d / 1e9
    assert 6 * plane < found[True]["gb"] < 6 * plane + 12 * classifiers  # type: ignore[operator]
    assert found[False]["gb"] > 40 * plane  # type: ignore[operator]


def test_a_variant_that_fails_keeps_its_row_and_the_others_theirs() -> None:
    def fails() -> None:
        raise RuntimeError("no kernel\nat all")

    found = common.interleaved("test", {"good": lambda: None, "bad": fails}, rounds=2)
    assert found["good"].row().keys() == {"median_ms", "best_ms", "worst_ms"}
    assert found["bad"].row() == {"error": "RuntimeError: no kernel"}
    assert found["bad"].faster_than(found["good"]) == found["good"].faster_than(found["bad"]) == {}
    assert common.kept("part", fails) == [{"what": "part", "error": "RuntimeError: no kernel"}]  # type: ignore[arg-type]
    assert common.kept("part", lambda: {"ok": True}) == [{"ok": True}]
    assert "no kernel" in str(common.memory(lambda *_: fails, (), (), "cuda"))


def test_a_check_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Row:
        raise ValueError("not here")

    monkeypatch.setattr(checks, "rank_counts", refuse)
    rows = checks.run(True, compiled=False)
    assert {"what": "ranks", "error": "ValueError: not here"} in rows
    assert sum(bool(row.get("ok")) for row in rows) == len(rows) - 1


def numbers(rows: list[Row]) -> list[float]:
    return [value for row in rows for value in row.values() if isinstance(value, int | float)]


def in_process(make: Callable[..., Step], small: tuple[object, ...], full: tuple[object, ...], device: str) -> Row:
    """In place of a process for each variant, which costs seconds: the same calls of what went through a pickle."""
    make, small, full = pickle.loads(pickle.dumps((make, small, full)))
    make(*small)()
    make(*full)()
    return {"peak_mib": 2.0, "extra_mib": 1.0}


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loss, memory, step, stream):
        monkeypatch.setattr(module, "memory", in_process)
    eager = {name: variant for name, variant in loss.VARIANTS.items() if "compiled" not in name}
    monkeypatch.setattr(loss, "VARIANTS", eager)


@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "scaling"])
def test_rows_are_whole(name: str) -> None:
    rows = importlib.import_module(f"benchmarks.{name}").run(True)
    assert len(rows) >= 1
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert all(value >= 0 for value in numbers(rows))
    for row in rows:
        if "median_ms" in row:
            assert row["best_ms"] <= row["median_ms"] <= row["worst_ms"]
    header, *lines = common.table(rows).splitlines()
    assert header.split() == list(dict.fromkeys(key for row in rows for key in row))
    assert len(lines) == len(rows)


def test_ratios_are_of_medians_and_of_bests() -> None:
    plain, fast = common.Times((8.0, 4.0, 6.0)), common.Times((2.0, 1.0, 4.0))
    assert plain.faster_than(plain) == {"times_faster": 1.0, "times_faster_best": 1.0}
    assert fast.faster_than(plain) == {"times_faster": 3.0, "times_faster_best": 4.0}
    assert fast.row() == {"median_ms": 2.0, "best_ms": 1.0, "worst_ms": 4.0}


def test_rounds_run_every_variant_in_turn() -> None:
    ran: list[str] = []
    steps: dict[str, Step] = {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}
    found = common.interleaved("test", steps, rounds=3, warm_up=2)
    assert ran == ["a", "b"] * 5
    assert [len(times.ms) for times in found.values()] == [3, 3]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel keeps no account of memory")
def test_memory_is_that_of_the_step_alone() -> None:
    make = functools.partial(functools.partial, torch.ones)  # make(300, k) is a step that fills 300 rows of k numbers
    found = common.memory(make, (1, 1), (300, 2**18))
    assert isinstance(found["extra_mib"], float)
    assert isinstance(found["peak_mib"], float)
    assert 295 < found["extra_mib"] < 330
    assert found["peak_mib"] > found["extra_mib"] + 50  # the interpreter and torch


def test_products_are_counted() -> None:
    assert common.gflop(limits.matmul(100, 200, 500, torch.float32, "cpu")) == pytest.approx(0.02)
    for name in loss.VARIANTS:  # logits, and their gradients in both factors
        t, d, v = 10, 8, 200
        assert common.gflop(loss.make(name, t, d, v, "cpu")) == pytest.approx(6e-9 * loss.N * t * d * v)


def test_sorting_and_counting_agree_on_ranks() -> None:
    data = common.beauty(quick=True)
    model = recipes.ensemble(data, 8, views=2)
    found = evaluate.sorted_ranks(model, data, users=25)
    counted = ensemble_kd.evaluation.evaluate(model, data, "test", max_len=recipes.WINDOW).ranks
    assert torch.equal(found, torch.stack(list(counted.values())))


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    main([])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(NAMES)
    monkeypatch.setattr(limits, "run", lambda quick: [{"limit": "speed", "median": 2.5 if quick else 5.0}])
    main(["limits", "--quick"])
    main(["limits", "--no-save"])
    assert not list(tmp_path.iterdir())
    main(["limits"])
    main(["limits"])
    entries = [json.loads(line) for line in (tmp_path / "limits.jsonl").read_text().splitlines()]
    assert [entry["rows"] for entry in entries] == [[{"limit": "speed", "median": 5.0}]] * 2
    assert {"date", "revision", "machine", "seconds", "rows"} == entries[0].keys()
    with pytest.raises(SystemExit):
        main(["speed"])
    with pytest.raises(SystemExit):
        main(["limits", "--data-dir", str(tmp_path)])
    assert "no benchmark speed" in (error := capsys.readouterr().err)
    assert "no Beauty.txt" in error


def test_beauty_is_read_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Beauty.txt").write_text("1 1 2 3\n2 3 1 2 4\n")
    (tmp_path / "Beauty_item2attributes.json").write_text('{"1": [2]}')
    monkeypatch.setenv(common.DATA_DIR, str(tmp_path))
    common.beauty.cache_clear()
    assert common.beauty().num_items == 4
    common.beauty.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
def test_all_on_one_device_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("loss", "step", "evaluate", "memory", "members", "limits"):  # each has its test above
        rows: list[Row] = [{"variant": name}]
        monkeypatch.setattr(getattr(gpu, name), "run", lambda *_, rows=rows: rows)
    monkeypatch.setattr(gpu.limits, "run", lambda *_: 1 / 0)
    path = gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)])
    parts = json.loads(path.read_text())["parts"]
    measured = ["checks", "limits", "loss", "backends", "step", "evaluate", "memory", "members", "train"]
    assert list(parts) == ["questions", *measured]
    assert "ZeroDivisionError" in parts["limits"]["error"]
    assert parts["loss"]["rows"] == [{"variant": "loss"}]
    checked = parts["checks"]["rows"]
    assert {row["ok"] for row in checked} == {True}
    assert len(checked) == 14
    assert [row["variant"] for row in parts["backends"]["rows"]] == ["loop", "vmap"]
    trained = parts["train"]
    assert len(trained["epochs"]) == 2
    assert trained["stopped"] == "all epochs done"
    assert trained["test"].keys() == {"member 0", "member 1", "member 2", "ensemble"}

    gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path / "late"), "--minutes", "0.3"])
    parts = json.loads((tmp_path / "late" / "gpu.json").read_text())["parts"]
    assert parts["train"]["stopped"] == "out of time"


def test_checks_see_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = checks.ranks
    monkeypatch.setattr(checks, "ranks", lambda *inputs: correct(*inputs) + 1)
    assert checks.rank_counts(True, "cpu")["ok"] is False
    masks = checks.mask_positions
    monkeypatch.setattr(checks, "mask_positions", lambda *a, **k: (masks(*a, **k)[0], masks(*a, **k)[1] & False))
    assert checks.mask_counts(True, "cpu")["ok"] is False
    losses = checks.item_losses
    monkeypatch.setattr(checks, "item_losses", lambda *a, **k: losses(*a, **(k | {"kd_weight": 0.11})))
    assert not all(row["ok"] for row in checks.fused_loss(True, "cpu", False))


def test_members_that_cannot_run_are_told() -> None:
    steps: dict[str, Step] = {"good": lambda: 1, "bad": lambda: [][1]}
    assert members.drop_failing(steps) == {"bad": "IndexError: list index out of range"}
    assert list(steps) == ["good"]


@pytest.mark.skipif(not summary.RESULTS.is_dir(), reason="a source distribution carries no results")
def test_the_page_on_speed_shows_the_last_results() -> None:
    """It is what ``benchmarks.summary`` writes from the committed results, to the letter."""
    page = summary.PAGE.read_text(encoding="utf-8")
    assert page == summary.rewritten(page, summary.section())
    assert "times as fast as stored logits" in summary.section()


def test_a_summary_takes_the_newest_line(tmp_path: Path) -> None:
    assert summary.last("epoch", tmp_path) is None
    machine = {"processor": "P", "cores": 2, "torch": "2"}
    for seconds in (30.0, 20.0):
        row = {"n": 3, "d": 64, "views": 2, "epoch_s": seconds}
        line = json.dumps({"revision": "abc", "machine": machine, "rows": [row]})
        with (tmp_path / "epoch.jsonl").open("a") as file:
            file.write(line + "\n")
    assert "n = 3, d = 64, 2 views | 20 s |" in summary.section(tmp_path)
    assert "30 s" not in summary.section(tmp_path)
    assert summary.section(tmp_path).endswith("on P, 2 cores, torch 2; revisions abc.")
    if importlib.util.find_spec("matplotlib"):
        summary.draw(tmp_path / "speed.png", tmp_path)
        assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
