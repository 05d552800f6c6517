"""The public calls on a device: fit, evaluate, recommend and others do what they do on the CPU."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ensemble_kd.losses.compiled as compiled
import ensemble_kd.training.gradients as gradients
from ensemble_kd import EnsembleKDError, fit
from ensemble_kd.data import MappedSequences, write_sequences
from ensemble_kd.evaluation import evaluate
from ensemble_kd.losses import item_losses
from ensemble_kd.stacking import take_rows
from tests.device import cases, simulated

pytestmark = pytest.mark.device


def test_answers_are_the_cpus_and_take_ids_from_the_host() -> None:
    here, ids = cases.build("SASRec", cases.OBJECTIVES["next"]).eval(), cases.batch()
    expected: list[Any] = [here.recommend(ids, k=5), here(ids), here.uncertainty(ids), here.query_vectors(ids)]
    metrics = evaluate(here, cases.data(), "test", max_len=cases.LENGTH).rows["ensemble"]
    with simulated.device():
        there = cases.build("SASRec", cases.OBJECTIVES["next"]).eval()
        there.load_state_dict(here.state_dict())
        there = there.to(simulated.NAME)
        for given in (ids, ids.to(simulated.NAME)):
            found: list[Any] = [there.recommend(given, k=5), there(given)]
            found += [there.uncertainty(given), there.query_vectors(given)]
            for got, want in zip(found, expected, strict=True):
                for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, want)), strict=True):
                    torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)
        again = evaluate(there, cases.data(), "test", max_len=cases.LENGTH).rows["ensemble"]
        assert again == pytest.approx(metrics)
        with pytest.raises(EnsembleKDError, match=r"^loss: expected item_ids on simulated:0, as the model, got cpu"):
            there.loss(ids)


@pytest.mark.parametrize("mapped", [False, True])
def test_fit_waits_no_more_for_more_steps(mapped: bool, tmp_path: Path) -> None:
    data: Any = cases.data()
    if mapped:
        rows = [data.items[start:stop].tolist() for start, stop in pairwise(data.offsets.tolist())]
        write_sequences(tmp_path / "data", rows, num_items=data.num_items)
        data = MappedSequences(tmp_path / "data")
    waits = []
    for batch_size in (8, 32):
        with simulated.device() as log:
            objective = cases.OBJECTIVES["next, sampled"]
            model = cases.build("SASRec", objective, losses=0, item_attributes=None, backend="vmap")
            model = model.to(simulated.NAME)
            log.clear()
            options: dict[str, Any] = {"window": cases.LENGTH, "precision": "bfloat16", "log_every": 1000}
            fit(model, data, epochs=1, batch_size=batch_size, progress=False, **options)
            waits.append(Counter(log.waits))
    assert waits[0] == waits[1]  # four times as many steps


def test_a_gru_under_autocast_stays_in_float32() -> None:
    with simulated.device():
        encoder = cases.ENCODERS["GRU4Rec"](0.0)
        encoder.gru._flat_weights = []
        encoder, ids = encoder.to(simulated.NAME), cases.batch().to(simulated.NAME)
        kept: list[Tensor] = []
        encoder.gru.register_forward_hook(lambda _, __, output: kept.append(output[0]))
        with torch.autocast(simulated.NAME, torch.bfloat16):
            encoder(ids)
            raw = encoder.gru(torch.zeros(1, 2, 8, device=simulated.NAME))[0]
    assert kept[0].dtype == torch.float32
    assert raw.dtype == torch.float16  # what the device, as CUDA, does by itself


def test_out_of_memory_in_a_compiled_tile_is_raised_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(compiled, "_COMPILE_FROM", 1)
    monkeypatch.setattr(compiled, "_status", "not tried")
    monkeypatch.setattr(compiled, "_compiled", lambda *_: full)
    tensors = (torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.zeros(2, 5), torch.tensor([0, 1, 2]))
    with pytest.raises(torch.OutOfMemoryError):
        item_losses(*tensors)
    assert compiled.compile_status() == "not tried"


def test_clipping_and_the_optimizer_merge_once() -> None:
    with simulated.device() as log:
        table = torch.nn.Parameter(torch.ones(2, 9, 3, device=simulated.NAME))
        optimizer = cases.RowAdamW([table])
        for _ in range(2):  # gradients that are added up after clipping are merged again
            take_rows(table, torch.tensor([1, 4, 4], device=simulated.NAME)).sum().backward()
            log.clear()
            gradients.clip_members_([table], 1.0)
            optimizer.step()
            assert log.operations["sort"] == 1
