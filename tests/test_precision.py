"""The precision that "auto" chooses: by a measurement on a CPU, once for all processes, kept by a resumed run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble_kd import EnsembleKD, EnsembleKDError
from ensemble_kd.distributed import Place
from ensemble_kd.encoders import SASRec
from ensemble_kd.ensemble import choose_precision, precision, speedup
from ensemble_kd.evaluation import evaluate
from tests.training.runs import DATA, V, sasrec, train

CPU = torch.device("cpu")


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let bfloat16 be so many times as fast as float32, without a clock."""

    def fake(gain: float) -> None:
        seconds = {"float32": 1.0, "bfloat16": 1 / gain}
        monkeypatch.setattr(precision, "_timed", lambda part, rows, name: seconds[name])
        speedup.cache_clear()

    yield fake  # type: ignore[misc]
    speedup.cache_clear()


@pytest.mark.parametrize(
    ("gain", "found"), [(4.0, "bfloat16"), (1.31, "bfloat16"), (1.29, "float32"), (0.1, "float32")]
)
def test_a_cpu_takes_bfloat16_only_if_it_is_clearly_faster(measure: Any, gain: float, found: str) -> None:
    measure(gain)
    chosen = choose_precision("fit", "auto", sasrec().encoder, CPU, num_items=V, classes=(V, 8), place=Place())
    assert chosen.name == found
    assert f"{gain:.2g} times as fast" in chosen.reason


@pytest.mark.parametrize(("gain", "found"), [(4.0, "bfloat16"), (0.5, "float32")])
def test_a_run_trains_in_it_and_says_so(measure: Any, gain: float, found: str, tmp_path: Path, capsys: Any) -> None:
    measure(gain)
    seen: list[torch.dtype] = []

    class Watched(SASRec):
        def forward(self, item_ids: Tensor) -> Tensor:
            hidden = super().forward(item_ids)
            seen.append(nn.functional.linear(hidden, hidden[0]).dtype)
            return hidden

    model = EnsembleKD(lambda: Watched(V, d_model=8, num_layers=1, max_len=8), n=1)
    seen.clear()
    result = train(model, precision="auto", epochs=1, output_dir=tmp_path, progress=True)
    assert set(seen) == {getattr(torch, found)}  # training and validation
    assert f"precision='{found}'" in repr(result)
    assert f"precision {found}: on this CPU bfloat16 is {gain:.2g} times as fast\n" in capsys.readouterr().out
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["precision"] for entry in entries if entry["kind"] == "epoch"] == [found]
    assert f"precision='{found}'" in repr(evaluate(model, DATA, "test"))


def test_a_resumed_run_keeps_its_precision_and_names_what_would_be_chosen_here(
    measure: Any, tmp_path: Path, capsys: Any
) -> None:
    measure(4.0)
    train(sasrec(), precision="auto", epochs=1, output_dir=tmp_path, schedule=constant)
    measure(0.5)
    options = {"epochs": 2, "output_dir": tmp_path, "resume": True, "schedule": constant}
    with pytest.raises(EnsembleKDError, match="precision: 'bfloat16' then, 'float32' now"):
        train(sasrec(), precision="float32", **options)
    result = train(sasrec(), precision="auto", progress=True, **options)
    assert [entry["precision"] for entry in result.history] == ["bfloat16", "bfloat16"]
    expected = r"precision bfloat16: as the run began; here it would be float32 \(on this CPU bfloat16 is 0\.5 times"
    assert re.search(expected, capsys.readouterr().out)


def test_a_measurement_is_made_once_per_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(precision, "_timed", lambda *given: calls.append(given) or 1e-9)
    speedup.cache_clear()
    made = []
    for classes in ((V, 8), (V, 8), (V, 4)):
        choose_precision("fit", "auto", sasrec().encoder, CPU, num_items=V, classes=classes, place=Place())
        made.append(len(calls))
    speedup.cache_clear()
    assert 0 < made[0] == made[1] == made[2] / 2


@pytest.mark.parametrize("gain", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("per_target", [1e-7, 1e-5, 1e-3])
def test_a_measurement_takes_few_targets_where_they_are_slow(
    monkeypatch: pytest.MonkeyPatch, gain: float, per_target: float
) -> None:
    """Of a machine of any speed, one product is known before a larger one begins; the time is that of the clock."""
    now, rows_seen = 0.0, set()

    def timed(part: Any, rows: int, name: str) -> float:
        nonlocal now
        seconds = per_target / (gain if name == "bfloat16" else 1)
        now += rows * seconds
        rows_seen.add(rows)
        return seconds

    monkeypatch.setattr(precision, "_timed", timed)
    monkeypatch.setattr(precision, "_clock", lambda: now)
    speedup.cache_clear()
    assert speedup(((8, 8), (16, 8)), (V, 8), 1) == pytest.approx(gain)
    speedup.cache_clear()
    smallest = (1 + 3 * 2) * 8 * per_target * (1 + 1 / gain)  # of three parts, two rounds each, and one before them
    assert now <= 0.5 + smallest
    assert (512 in rows_seen) == (per_target < 1e-6 or (gain >= 1 and per_target < 1e-4))


def test_the_real_measurement_leaves_no_trace() -> None:
    speedup.cache_clear()
    before = torch.get_rng_state()
    with torch.no_grad():
        assert speedup(((16, 8),), (50, 8), torch.get_num_threads()) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_look_up_tables_are_no_products() -> None:
    found = precision._weights(sasrec().encoder, V)
    assert set(found) == {(8, 8), (24, 8)}  # attention's, and the feed-forward network's
    assert len(found) > 2  # each layer's
    assert speedup((), None, 1) == 1.0


def constant(epoch: float, epochs: int) -> float:
    return 1.0
