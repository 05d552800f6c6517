"""Epochs in float32 and in bfloat16, and in what "auto" chooses; on x86 the README's model once more with AVX2 alone.

Each set of instructions has a process of its own, since torch looks at them once. Seconds are of the processor.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch

from benchmarks.common import Row, sig
from ensemble_kd import AP, CCL, ICL, KD, EnsembleKD, MaskedItem, NextItem, fit
from ensemble_kd.data import SequenceData, synthetic
from ensemble_kd.distributed import Place
from ensemble_kd.encoders import BERT4Rec, SASRec
from ensemble_kd.ensemble import choose_precision

EVERY, AVX2 = "all that it has", "AVX2 alone"
LIMITS: dict[str, Mapping[str, str]] = {EVERY: {}, AVX2: {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}}
CASES = ("bert4rec_emkd.py", "SASRec, d = 64", "SASRec, d = 256")  # the last two with as many items as Beauty


def run(quick: bool) -> list[Row]:
    """Rows: seconds of an epoch in each precision and in the one that "auto" chose."""
    if quick:
        return [{"instructions": EVERY, **_measured(CASES[0], quick)}]
    rows: list[Row] = []
    start = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    for name, limits in LIMITS.items():
        if name == AVX2 and platform.machine() not in ("x86_64", "AMD64"):
            continue
        with _environment(limits), start() as process:
            rows += [
                {"instructions": name, **process.submit(_measured, case, quick).result()}
                for case in CASES[: 1 if name == AVX2 else None]
            ]
    fastest = {row["model"]: float(str(row["auto_s"])) for row in rows if row["instructions"] == EVERY}
    for row in rows:
        row["auto_over_all"] = sig(float(str(row["auto_s"])) / fastest[row["model"]], 3)
    return rows


def _measured(case: str, quick: bool) -> Row:
    model, data, options = _case(case, quick)
    seconds: dict[str, float] = {}
    for precision in ("float32", "bfloat16", "auto"):
        torch.manual_seed(0)
        marks = [time.process_time()]
        note = lambda entry, marks=marks: marks.append(time.process_time()) if entry["kind"] == "epoch" else None  # noqa: E731
        fit(model, data, epochs=2, precision=precision, progress=False, callback=note, **options)  # type: ignore[arg-type]
        seconds[precision] = marks[-1] - marks[-2]  # of the second: the first makes kernels
    chosen = choose_precision("fit", "auto", model.device, place=Place())
    return {
        "model": case,
        "float32_s": sig(seconds["float32"], 3),
        "bfloat16_s": sig(seconds["bfloat16"], 3),
        "real_gain": sig(seconds["float32"] / seconds["bfloat16"], 3),
        "chosen": chosen.name,
        "reason": chosen.reason,
        "auto_s": sig(seconds["auto"], 3),
    }


def _case(case: str, quick: bool) -> tuple[EnsembleKD, SequenceData, dict[str, object]]:
    if case == CASES[0]:
        data = synthetic(60 if quick else 1000, num_items=200)
        model = EnsembleKD(
            lambda: BERT4Rec(200, d_model=32, max_len=16, dropout=0.1, norm_first=True),
            n=3,
            objective=MaskedItem(mask_ratio=0.3, views=2, newest=0.5),
            losses=0.2 * AP() + 0.01 * (ICL(temperature=0.3) + CCL(temperature=0.3)) + 0.001 * KD(temperature=0.3),
            item_attributes=data.item_attributes,
        )
        return model, data, {"batch_size": 64, "lr": 3e-3, "window": 15, "window_step": 4}
    d, items = int(case.rpartition(" ")[2]), 12_101
    data = synthetic(400, num_items=items)
    model = EnsembleKD(lambda: SASRec(items, d_model=d, max_len=20), n=2, objective=NextItem(), losses=KD())
    return model, data, {"batch_size": 256, "window": 21, "window_step": 4}


class _environment:
    """Within the block, processes that start have these variables."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = variables

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
