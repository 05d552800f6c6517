"""The parts that the EMKD examples share: the flags, the run, the table, the recommendations and the curves."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from ensemble_kd import (
    AP,
    CCL,
    ICL,
    KD,
    EnsembleKD,
    NextItem,
    fit,
)
from ensemble_kd.data import SequenceData, read_text, synthetic
from ensemble_kd.distributed import (
    Place,
    gathered,
    process_group,
    restarted,
    shard,
)
from ensemble_kd.evaluation import evaluate, evaluate_popularity, table
from ensemble_kd.objectives import Objective
from ensemble_kd.training import Cosine, Ramp, Schedule, StepDecay


def flags(description: str | None, **defaults: object) -> argparse.ArgumentParser:
    """The flags of every example; ``defaults`` are what suits its encoder."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", type=Path, help="text file, a user a line: id item item ...; default: synthetic data")
    p.add_argument("--attributes", type=Path, help="JSON file {item id: [attribute ids]}")
    p.add_argument("--users", type=int, default=2000, help="of the synthetic data")
    p.add_argument("--items", type=int, default=600, help="of the synthetic data, at least 80")
    p.add_argument("--n", "--members", dest="n", type=int, default=3, help="members (torchrun takes --n for its own)")
    p.add_argument("--views", type=int, default=2, help="M, views of each sequence")
    p.add_argument("--d-model", type=int, default=64)
    p.add_argument("--dropout", type=float, default=0.2)
    p.add_argument("--window", type=int, default=20, help="most items that the encoder reads")
    p.add_argument("--window-step", type=int, default=1)
    p.add_argument("--epochs", type=int, default=12)
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--weight-decay", type=float, default=0.0)
    p.add_argument("--schedule", choices=("cosine", "step"), default="cosine")
    p.add_argument("--temperature", type=float, default=0.3, help="of ICL and CCL")
    p.add_argument("--lambda", dest="lambda_", type=float, default=0.01, help="weight of ICL + CCL; 0: without")
    p.add_argument("--mu", type=float, default=0.001, help="weight of KD; 0: without")
    p.add_argument("--kd-temperature", type=float, default=0.3)
    p.add_argument(
        "--transfer",
        type=float,
        nargs=2,
        default=(0.0, 0.0),
        metavar=("START", "FULL"),
        help="shares of the run between which the weights of ICL, CCL and KD rise from 0",
    )
    p.add_argument("--ap", type=float, default=1.0, help="weight of attribute prediction; 0: without")
    p.add_argument("--classifier", choices=("linear", "tied"), default="linear", help="own weights, or the embedding's")
    p.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--patience", type=int, help="stop after so many epochs without a better validation")
    p.add_argument("--exclude", choices=("none", "window", "history"), default="history")
    p.add_argument("--output", type=Path, default=Path("runs/example"), help="folder of checkpoints, log and curves")
    p.add_argument("--checkpoint-every", type=float, default=120.0, help="seconds")
    p.add_argument("--members-over", type=int, default=1, help="processes of torchrun that members are spread over")
    p.add_argument("--shard", action="store_true", help="each process of torchrun holds a share of every weight")
    p.add_argument("--resume", action="store_true", help="go on where the run in --output stopped")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(**defaults)
    return p


Encoder = Callable[[], nn.Module]
Factory = Callable[[SequenceData], Encoder | list[Encoder]]


def sequences(args: argparse.Namespace) -> SequenceData:
    """The data that the flags name."""
    data = read_text(args.data, args.attributes) if args.data else synthetic(args.users, args.items)
    print(data)
    return data


def ensemble(args: argparse.Namespace, data: SequenceData, encoder: Factory, objective: Objective) -> EnsembleKD:
    """The model that the flags describe."""
    mesh = None
    if dist.is_initialized() and not args.shard:
        sizes = (dist.get_world_size() // args.members_over, args.members_over)
        mesh = init_device_mesh(torch.device(args.device).type, sizes, mesh_dim_names=("data", "member"))
    with_attributes = data.item_attributes is not None
    terms = [args.ap * AP()] * with_attributes
    terms += [args.lambda_ * (ICL(temperature=args.temperature) + CCL(temperature=args.temperature))]
    terms += [args.mu * KD(temperature=args.kd_temperature)]
    factories = encoder(data)
    model = EnsembleKD(
        factories,
        len(factories) if isinstance(factories, list) else args.n,
        num_items=data.num_items,
        objective=objective,
        losses=sum(terms),  # type: ignore[arg-type]
        item_attributes=data.item_attributes,
        classifier=args.classifier,
        seed=args.seed,
        mesh=mesh,
    ).to(args.device)
    return shard(model) if args.shard else model


def fit_options(args: argparse.Namespace, objective: Objective) -> dict[str, Any]:
    """Return the settings of a training run from the flags, except its folder."""
    schedule: Schedule = Cosine(warmup=0.5) if args.schedule == "cosine" else StepDecay()
    return {
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "schedule": schedule,
        "transfer": Ramp(*args.transfer),
        "window": args.window + isinstance(objective, NextItem),  # whose newest item is a target and no input
        "window_step": args.window_step,
        "precision": args.precision,
        "exclude": args.exclude,
        "patience": args.patience,
        "checkpoint_every_s": args.checkpoint_every,
        "seed": args.seed,
    }


def run(args: argparse.Namespace, encoder: Factory, objective: Objective) -> None:
    """Train, evaluate on the test items, recommend, and draw the curves; in all processes that torchrun started."""
    with process_group(), nullcontext() if Place.world().is_first else redirect_stdout(None):  # one process reports
        _run(args, encoder, objective)


def _run(args: argparse.Namespace, encoder: Factory, objective: Objective) -> None:
    data = sequences(args)
    model = ensemble(args, data, encoder, objective)
    started = time.monotonic()
    options = fit_options(args, objective)
    resume = args.resume or restarted()
    result = fit(model, data, **options, output_dir=args.output, resume=resume, overwrite=not resume)
    minutes = (time.monotonic() - started) / 60
    report(args, model, data, f"weights of epoch {result.best_epoch + 1} of {len(result.history)}", minutes)
    if model.place.is_first:
        draw_curves(result.history, args.output / "curves.png")


def report(args: argparse.Namespace, model: EnsembleKD, data: SequenceData, weights: str, minutes: float) -> None:
    """The table of the test items, the ensemble's gain, and what it recommends to one user."""
    test = evaluate(model, data, "test", exclude=args.exclude, precision=args.precision)
    popularity = evaluate_popularity(data, "test", exclude=args.exclude, max_len=args.window)
    rows = {**popularity.rows, **test.rows}
    print(f"\n{table(rows)}\n{test.protocol}; {weights}")
    members = [test.rows[f"member {i}"]["NDCG@10"] for i in range(args.n)]
    gain = test.rows["ensemble"]["NDCG@10"] / max(sum(members) / args.n, 1e-9) - 1
    print(f"NDCG@10 of the ensemble over its members' mean: {gain:+.1%}. Trained in {minutes:.1f} minutes.")
    if model.place.is_first:
        (args.output / "test.json").write_text(json.dumps({"protocol": test.protocol, "rows": rows}, indent=1) + "\n")

    seen = data.inputs("test", data.max_history)[:1]
    seen = seen[:, seen[0] != 0]  # all of it, so that none of it is recommended; the encoder reads the newest
    with gathered(model):
        items, scores = model.recommend(seen.to(args.device), k=10)
    print(f"\nUser 0 saw items {seen[0].tolist()}, then {data.target('test')[0].item()}. Recommended:")
    print("  ".join(f"{item} ({score:.2f})" for item, score in zip(items[0].tolist(), scores[0].tolist(), strict=True)))


def draw_curves(history: list[dict[str, object]], path: Path) -> None:
    """Validation NDCG@10 over epochs, ensemble and members; skipped where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("No curves.png: pip install 'ensemble_kd[plots]' for it.")
        return
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    valid = [entry["valid"] for entry in history]
    epochs = range(1, len(valid) + 1)
    for scorer in valid[0]:  # type: ignore[attr-defined]
        curve = [rows[scorer]["NDCG@10"] for rows in valid]  # type: ignore[index]
        axes.plot(epochs, curve, label=scorer, linewidth=2.5 if scorer == "ensemble" else 1)
    axes.set(xlabel="epoch", ylabel="validation NDCG@10")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"Learning curves: {path}")
