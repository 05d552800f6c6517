"""The precision that "auto" chooses by the device, and that a resumed run keeps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble_kd import EnsembleKD, EnsembleKDError
from ensemble_kd.distributed import Place
from ensemble_kd.encoders import SASRec
from ensemble_kd.ensemble import choose_precision
from ensemble_kd.evaluation import evaluate
from tests.training.runs import DATA, V, sasrec, train


def test_a_cpu_trains_and_ranks_in_float32_unless_bfloat16_is_named(tmp_path: Path, capsys: Any) -> None:
    for given, found in (("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        seen: list[torch.dtype] = []

        class Watched(SASRec):
            def forward(self, item_ids: Tensor, seen: list[torch.dtype] = seen) -> Tensor:
                hidden = super().forward(item_ids)
                seen.append(nn.functional.linear(hidden, hidden[0]).dtype)
                return hidden

        model = EnsembleKD(lambda: Watched(V, d_model=8, num_layers=1, max_len=8), n=1)
        seen.clear()
        folder = tmp_path / given
        result = train(model, precision=given, epochs=1, output_dir=folder, progress=True)
        assert set(seen) == {getattr(torch, found)}  # training and validation
        assert f"precision='{found}'" in repr(result)
        said = "precision float32: bfloat16 costs accuracy, and is often slower on a CPU\n" in capsys.readouterr().out
        assert said is (given == "auto")
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [entry["precision"] for entry in entries if entry["kind"] == "epoch"] == [found]
        assert f"precision='{found}'" in repr(evaluate(model, DATA, "test", precision=given))


@pytest.mark.parametrize("native", [True, False])
def test_a_cuda_device_takes_bfloat16_where_it_is_native(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    def asked(*, including_emulation: bool) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    found = choose_precision("fit", "auto", torch.device("cuda"), place=Place())
    assert found.name == ("bfloat16" if native else "float32")
    other = choose_precision("fit", "auto", torch.device("meta"), place=Place())
    assert (other.name, other.reason) == ("float32", "bfloat16 is untested on meta")


def test_a_resumed_run_keeps_its_precision_and_names_what_would_be_chosen_here(tmp_path: Path, capsys: Any) -> None:
    train(sasrec(), precision="bfloat16", epochs=1, output_dir=tmp_path, schedule=constant)
    options = {"epochs": 2, "output_dir": tmp_path, "resume": True, "schedule": constant}
    with pytest.raises(EnsembleKDError, match="precision: 'bfloat16' then, 'float32' now"):
        train(sasrec(), precision="float32", **options)
    result = train(sasrec(), precision="auto", progress=True, **options)
    assert [entry["precision"] for entry in result.history] == ["bfloat16", "bfloat16"]
    expected = r"precision bfloat16: as the run began; here it would be float32 \(bfloat16 costs accuracy"
    assert re.search(expected, capsys.readouterr().out)


def constant(epoch: float, epochs: int) -> float:
    return 1.0
