"""Everything on one CUDA device in one call: ``python -m benchmarks.gpu --data-dir DIR --out DIR [--minutes 9]``.

Checks correctness against float64, measures the tables, then trains the paper's recipe on Beauty as far as the time
reaches. ``OUT/gpu.json`` is written after each part and each epoch, so that a call cut off loses nothing; a part that
fails is reported, and the next one runs. Training goes on from ``OUT`` where it holds an earlier call's checkpoints.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import checks, common, evaluate, limits, loss, members, memory, recipes, step
from benchmarks.common import Row, Step, interleaved, kept, sig
from ensemble_kd import KD, EnsembleKD, fit
from ensemble_kd.data import synthetic
from ensemble_kd.encoders import GRU4Rec, SASRec
from ensemble_kd.evaluation import evaluate as rank_all
from ensemble_kd.stacking import StackedModule

TABLES_SHARE = 0.55  # of the time; a table that would begin later is left out, so that there is time to train
RESERVE_S = 20.0  # for the last evaluation


class Report:
    """The results so far, in a file that is whole at any time."""

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "revision": common.revision(),
            "machine": {**common.environment(device), "data": common.data_of_beauty()},
            "parts": {},
        }

    def write(self, part: str, found: Mapping[str, Any]) -> None:
        self.content["parts"][part] = dict(found)
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        os.replace(partial, self.path)


def questions(quick: bool, device: str) -> list[Row]:
    """What only the device can answer, first: recurrent layers on stacked weights, and rows of odd length."""
    return [
        *kept("GRU4Rec, forward and backward", lambda: recurrent(device)),
        *alignment(quick, device),
        *kept("CUDA graphs", lambda: graphs(quick, device)),
    ]


def recurrent(device: str) -> list[Row]:
    """Outputs and gradients of stacked GRUs against plain ones: cuDNN packs weights, and a stack hands it views."""
    built = [GRU4Rec(50, d_model=16, max_len=9, dropout=0.0) for _ in range(3)]
    plain = [copy.deepcopy(member).to(device) for member in built]
    stack, ids = StackedModule(built, backend="loop").to(device), torch.arange(1, 37).view(4, 9).to(device)
    out, expected = stack(ids), torch.stack([member(ids) for member in plain])
    out.square().sum().backward()
    expected.square().sum().backward()
    rows = [checks.row("GRU4Rec, outputs", checks.relative(out.detach(), expected.detach().double()), 1e-4)]
    for name in ("gru.weight_ih_l0", "gru.weight_hh_l0"):
        grad = stack.stacked_parameter(name)
        assert grad is not None
        assert grad.grad is not None
        wanted = torch.stack([member.get_parameter(name).grad for member in plain])  # type: ignore[misc]
        rows.append(checks.row(f"GRU4Rec, d {name}", checks.relative(grad.grad, wanted.double()), 1e-4))
    return rows


def alignment(quick: bool, device: str) -> list[Row]:
    """The product of a tile into rows that begin anywhere, and into rows that begin at a multiple of 64."""
    rows, d, v = (8, 16, 301) if quick else (4096, 256, 12101)
    hidden = torch.randn(rows, d, device=device).to(torch.bfloat16)
    weight = torch.randn(v, d, device=device).to(torch.bfloat16)
    steps: dict[str, Step] = {}
    for stride in (v, -(-v // 64) * 64):
        out = torch.zeros(rows, stride, dtype=torch.bfloat16, device=device)[:, :v]
        steps[f"logits, rows of {stride}"] = functools.partial(torch.mm, hidden, weight.t(), out=out)
        steps[f"d weight, rows of {stride}"] = functools.partial(torch.mm, out.t(), hidden)
    found = interleaved("alignment", steps, rounds=20, warm_up=3, quick=quick)
    return [{"what": name, "v": v, "d": d, **times.row()} for name, times in found.items()]


def graphs(quick: bool, device: str) -> list[Row]:
    """An epoch with steps as CUDA graphs against one without: the weights at its end, and the seconds of each."""
    if not hasattr(torch.get_device_module(device), "CUDAGraph"):
        return []
    data, d, window = (synthetic(16, 80), 4, 9) if quick else (synthetic(2000, 12101), 64, 17)
    weights, seconds = [], []
    for as_graphs in (False, True):
        encoder_fn = functools.partial(SASRec, data.num_items, d_model=d, max_len=window - 1, num_layers=1, dropout=0.0)
        model = EnsembleKD(encoder_fn, n=3, losses=KD(temperature=1.0), backend="loop").to(device)
        options: dict[str, Any] = {"epochs": 1 if quick else 2, "batch_size": 16 if quick else 64, "window": window}
        done = fit(model, data, cuda_graphs=as_graphs, precision="float32", progress=False, **options)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        seconds.append(done.history[-1]["train_s"])
    found = checks.row("CUDA graphs, weights after training", checks.relative(weights[1], weights[0].double()), 2e-2)
    return [{**found, "epoch_s": sig(seconds[1]), "epoch_without_s": sig(seconds[0])}]


def steps_by_backend(quick: bool, device: str, compiled: bool) -> list[Row]:
    """A whole bfloat16 training step of the recipe by backend, and with compiled members at n=3."""
    data, views = common.beauty(quick), 2 if quick else 8
    item_ids = recipes.batch(data, 8 if quick else recipes.BATCH, device)
    rows: list[Row] = []
    for n, d in ((3, 8),) if quick else ((3, 64), (3, 256), (8, 64), (8, 256)):
        torch.compiler.reset()
        steps: dict[str, Step] = {}
        make = functools.partial(recipes.ensemble, data, d, n=n, views=views, device=device)
        for name in members.BACKENDS if compiled and n == recipes.N else members.PLAIN:
            model = make(
                backend="vmap" if "vmap" in name else "loop", encoder_fn=members.builder(name, data.num_items, d)
            )
            steps[name] = recipes.ensemble_step(members.compile_stack(name, model), item_ids, torch.bfloat16)
        found = interleaved(f"backends, n={n}, d={d}", steps, rounds=20, warm_up=3, quick=quick)
        rows += [{"n": n, "d": d, "views": views, "variant": name, **times.row()} for name, times in found.items()]
    return rows


class OutOfTime(Exception):
    """Ends ``fit`` from its callback."""


def train(report: Report, folder: Path, quick: bool, device: str, deadline: float) -> dict[str, Any]:
    """The paper's recipe on Beauty: n=3, d=256, views=8, windows of 15, batches of 256, 250 epochs or until the end."""
    data, d, views = common.beauty(quick), 8 if quick else 256, 2 if quick else 8
    model = recipes.ensemble(data, d, views=views, device=device)
    found: dict[str, Any] = {"n": len(model), "d": d, "views": views, "precision": "bfloat16", "epochs": []}

    def callback(entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "epoch":
            valid = {scorer: values["NDCG@10"] for scorer, values in entry["valid"].items()}
            found["epochs"].append({"train_s": entry["train_s"], "valid_s": entry["valid_s"], "valid NDCG@10": valid})
            report.write("train", found)
            print(
                f"epoch {entry['epoch']}: {entry['train_s']:.1f} s, valid NDCG@10 {valid['ensemble']:.4f}", flush=True
            )
        if time.monotonic() > deadline:
            raise OutOfTime

    try:
        fit(
            model,
            data,
            epochs=2 if quick else 250,
            batch_size=recipes.BATCH,
            window=recipes.WINDOW,
            precision="bfloat16",
            output_dir=folder,
            resume=True,
            log_every=10,
            callback=callback,
            progress=False,
        )
        found["stopped"] = "all epochs done"
    except OutOfTime:
        found["stopped"] = "out of time"
    best = folder / "best.pt"
    if best.exists():
        saved = torch.load(best, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        test = rank_all(model, data, "test", max_len=recipes.WINDOW)
        found |= {"best_epoch": saved["epoch"], "test": {s: dict(r) for s, r in test.rows.items()}}
        found["protocol"] = test.protocol
    seconds = sorted(epoch["train_s"] for epoch in found["epochs"])
    found["epoch_s"] = seconds[len(seconds) // 2] if seconds else None
    return found


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder of Beauty.txt; synthetic data of its size where left out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all works")
    args = parser.parse_args(arguments)
    start = time.monotonic()
    if args.data_dir is not None:
        os.environ[common.DATA_DIR] = str(args.data_dir.resolve())
    args.out.mkdir(parents=True, exist_ok=True)
    report, quick, device = Report(args.out / "gpu.json", args.device), args.quick, args.device
    compiled = device == "cuda"  # on a CPU that takes minutes, and a plain run shows that all works
    tables: dict[str, Callable[[], list[Row]]] = {
        "questions": lambda: questions(quick, device),
        "checks": lambda: checks.run(quick, device, compiled),
        "limits": lambda: limits.run(quick, device),
        "loss": lambda: loss.run(quick, device, compiled),
        "backends": lambda: steps_by_backend(quick, device, compiled),
        "step": lambda: step.run(quick, device),
        "evaluate": lambda: evaluate.run(quick, device),
        "memory": lambda: memory.run(quick, device),
        "members": lambda: members.run(quick, device, compiled),
    }
    for name, run in tables.items():
        began = time.monotonic()
        if began - start > TABLES_SHARE * args.minutes * 60:
            report.write(name, {"skipped": "no time"})
            continue
        try:
            rows = run()
            print(f"{name}\n{common.table(rows)}\n", flush=True)
            report.write(name, {"seconds": round(time.monotonic() - began, 1), "rows": rows})
        except Exception:  # one part's fault must not cost the others their turn on a lent device
            print(traceback.format_exc(), flush=True)
            report.write(name, {"error": traceback.format_exc()})
    deadline = start + args.minutes * 60 - RESERVE_S
    try:
        report.write("train", train(report, args.out / ("quick" if quick else "beauty"), quick, device, deadline))
    except Exception:
        print(traceback.format_exc(), flush=True)
        report.write("train", {**report.content["parts"].get("train", {}), "error": traceback.format_exc()})
    print(json.dumps(report.content["parts"]["train"], indent=1))
    return report.path


if __name__ == "__main__":
    main()
