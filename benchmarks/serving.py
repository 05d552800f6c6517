"""Answering requests: the ensemble, one network of it, an exact vector index and ONNX Runtime; see ``examples/``.

A request is one user's newest items and wants ten. Ten users' worth of warm-up; latency at batch 1, throughput at batch
64. FAISS and ONNX Runtime are measured where they are installed.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Row, beauty, sig
from ensemble_kd import EnsembleKD
from ensemble_kd.encoders import SASRec
from ensemble_kd.export import to_onnx

K, LENGTH, BATCH = 10, 50, 64
Answer = Callable[[Tensor], object]


def answers(model: EnsembleKD, folder: Path) -> dict[str, Answer]:
    """Each way to answer a batch of sequences."""
    one = model.member(0)
    found: dict[str, Answer] = {
        "recommend, ensemble": lambda ids: model.recommend(ids, K),
        "recommend, one network": lambda ids: one.recommend(ids, K),
    }
    if importlib.util.find_spec("faiss"):
        import faiss

        vectors = model.item_vectors().numpy()
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        found["FAISS, ensemble"] = lambda ids: index.search(model.query_vectors(ids).numpy(), K + ids.shape[1])
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        import onnxruntime

        for name, part in (("ensemble", model), ("one network", one)):
            session = onnxruntime.InferenceSession(to_onnx(part, folder / "model.onnx", k=K))
            found[f"ONNX Runtime, {name}"] = lambda ids, s=session: s.run(None, {"item_ids": ids.numpy()})  # type: ignore[misc]
    return found


def seconds(answer: Answer, batches: tuple[Tensor, ...]) -> list[float]:
    times = []
    for ids in batches:
        started = time.perf_counter()
        answer(ids)
        times.append(time.perf_counter() - started)
    return times


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows: latency at batch 1 (median, p99), requests a second at batch 64."""
    data, d, requests = beauty(quick), 8 if quick else 64, 20 if quick else 1000
    model = EnsembleKD(lambda: SASRec(data.num_items, d_model=d, max_len=LENGTH), 3).to(device).eval()
    inputs = data.inputs("test", LENGTH)
    users = inputs[torch.linspace(0, len(inputs) - 1, requests).long()].to(device)
    single = tuple(ids[:, ids[0] != 0] for ids in users.split(1))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, answer in answers(model, Path(folder)).items():
            seconds(answer, single[:10])
            alone = sorted(seconds(answer, single))
            together = statistics.median(seconds(answer, users.split(BATCH)[: max(1, requests // BATCH)]))
            rows.append(
                {
                    "d": d,
                    "v": data.num_items,
                    "variant": name,
                    "p50_ms": sig(statistics.median(alone) * 1e3),
                    "p99_ms": sig(alone[int(0.99 * (len(alone) - 1))] * 1e3),
                    "requests_per_s": sig(min(BATCH, requests) / together),
                }
            )
    return rows
