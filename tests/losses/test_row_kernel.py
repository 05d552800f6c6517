"""The row kernel: right in Triton's interpreter, without spills on GPUs that it is compiled for, and replaceable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import ensemble_kd.losses.compiled as compiled
import ensemble_kd.losses.row_kernel as row_kernel
from ensemble_kd.losses import compile_status, item_losses
from ensemble_kd.losses.pairs import Pairs
from ensemble_kd.losses.peers import Peers

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the extra triton")
TENSORS = (torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.zeros(2, 5), torch.tensor([0, 1, 2]))


def run(name: str, **environment: str) -> str:
    """Run a script of this folder: Triton reads its environment once, when it is imported."""
    command = [sys.executable, str(HERE / name)]
    variables = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@needs_triton
def test_in_the_interpreter_it_computes_what_the_tile_does_and_wrong_kernels_do_not() -> None:
    found = json.loads(run("interpreted.py", TRITON_INTERPRET="1"))
    assert found["cases"] == 48
    assert [what for what, passed in found["wrong"].items() if passed is None] == ["nothing"]
    assert len(found["wrong"]) == 18


@needs_triton
@pytest.mark.slow
def test_compiled_for_gpus_it_spills_nothing_and_leaves_room_for_others() -> None:
    found = [json.loads(line) for line in run("offline.py", TRITON_INTERPRET="0").splitlines()]
    assert {(kernel["capability"], kernel["n"]) for kernel in found} == {(c, n) for c in (80, 90) for n in (1, 3, 8)}
    for kernel in found:
        assert kernel["spilled"] == 0
        assert kernel["registers"] <= 128  # of 65,536 per multiprocessor: two programs of 256 threads
        assert kernel["shared"] <= 16 << 10


def test_a_kernel_that_cannot_be_built_is_replaced_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(row_kernel, "_DEVICES", {"cpu"})
    monkeypatch.setattr(row_kernel, "_failed", False)
    monkeypatch.setattr(row_kernel, "find_spec", lambda _: object())
    monkeypatch.setattr(row_kernel, "row_tile", broken)
    monkeypatch.setattr(compiled, "_status", "not tried")
    expected = item_losses(*TENSORS, compiled=False)
    assert compile_status() == "not tried"
    for _ in range(2):
        assert torch.equal(item_losses(*TENSORS).total, expected.total)
        assert compile_status() == "no row kernel: RuntimeError: no ptxas"
    monkeypatch.setattr(row_kernel, "row_tile", lambda *_: pytest.fail("tried again"))
    item_losses(*TENSORS)


def test_without_cuda_there_is_none() -> None:
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float64)):
        options: dict[str, Any] = {"product": torch.bfloat16, "dtype": dtype, "device": torch.device(device)}
        assert row_kernel.row_kernel(1.0, True, **options) is None


def test_what_the_kernel_does_not_know_is_left_to_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernel, "_DEVICES", {"cpu"})
    monkeypatch.setattr(row_kernel, "_failed", False)
    monkeypatch.setattr(row_kernel, "find_spec", lambda _: object())
    options: dict[str, Any] = {"product": torch.float32, "dtype": torch.float32, "device": torch.device("cpu")}
    assert Peers(1.0, True).kernel(**options) is not None
    assert Peers(1.0, True, Pairs("same", (0, 0, 1))).kernel(**options) is None
    assert Peers(1.0, True, Pairs(gate="better")).kernel(**options) is None
    assert Peers(1.0, True, part="target").kernel(**options) is None
    assert Peers(1.0, True, with_ambiguity=True).kernel(**options) is None
