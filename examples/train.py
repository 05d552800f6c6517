"""Train an ensemble from the command line: every setting is a flag, and ``torchrun`` spreads the run over processes.

Without arguments it trains three SASRec networks on a synthetic catalogue. On a file of yours, and in four processes::

    python examples/train.py --encoder bert4rec --data Beauty.txt --attributes Beauty_item2attributes.json
    torchrun --nproc-per-node 4 examples/train.py --members 4 --members-over 2

The folder of ``--output`` receives the checkpoints, the log, test.json and curves.png. A folder with a run is refused
unless ``--resume`` goes on with the run or ``--overwrite`` replaces it.
"""

from __future__ import annotations

import argparse
import importlib.util
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

from ensemble_kd import AP, CCL, ICL, KD, EnsembleKD, MaskedItem, NextItem, fit
from ensemble_kd.data import SequenceData, read_text, synthetic
from ensemble_kd.distributed import Place, gathered, process_group, restarted, shard
from ensemble_kd.encoders import BERT4Rec, Caser, GRU4Rec, SASRec
from ensemble_kd.evaluation import evaluate, evaluate_popularity, table
from ensemble_kd.objectives import Objective
from ensemble_kd.plots import curves
from ensemble_kd.training import Cosine, Ramp, Schedule, StepDecay, best_device

# What suits each encoder on the synthetic catalogue; any flag given on the command line goes before it.
DEFAULTS: dict[str, dict[str, object]] = {
    "sasrec": {"views": 1, "batch_size": 64, "epochs": 6, "lr": 2e-3, "dropout": 0.3},
    "bert4rec": {"window": 15, "epochs": 14, "batch_size": 128, "lr": 2e-3, "dropout": 0.1, "ap": 0.2},
    "gru4rec": {"views": 1, "batch_size": 64, "epochs": 8, "lr": 3e-3, "dropout": 0.4, "num_layers": 1},
    "caser": {"views": 1, "batch_size": 64, "epochs": 8, "lr": 3e-3, "dropout": 0.4},
}


def flags(description: str | None, **defaults: object) -> argparse.ArgumentParser:
    """Return a parser of the flags; ``defaults`` are what suits an encoder."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", type=Path, help="text file, a user a line: id item item ...; default: synthetic data")
    p.add_argument("--attributes", type=Path, help="JSON file {item id: [attribute ids]}")
    p.add_argument("--users", type=int, default=2000, help="of the synthetic data")
    p.add_argument("--items", type=int, default=600, help="of the synthetic data, at least 80")
    p.add_argument("--n", "--members", dest="n", type=int, default=3, help="members (torchrun takes --n for its own)")
    p.add_argument("--views", type=int, default=2, help="M, views of each sequence")
    p.add_argument("--mask-ratio", type=float, default=0.3, help="share of a sequence that is masked (bert4rec)")
    p.add_argument("--newest", type=float, default=0.5, help="probability that the newest item is masked (bert4rec)")
    p.add_argument("--d-model", type=int, default=64)
    p.add_argument("--num-layers", type=int, default=2, help="blocks or recurrent layers (not of caser)")
    p.add_argument("--num-heads", type=int, help="of attention; default: 2 (bert4rec), 1 (sasrec)")
    p.add_argument("--filter-window", type=int, default=5, help="newest items that the convolutions read (caser)")
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
    p.add_argument("--device", default=str(best_device()))
    p.add_argument("--patience", type=int, help="stop after so many epochs without a better validation")
    p.add_argument("--exclude", choices=("none", "window", "history"), default="history")
    p.add_argument("--output", type=Path, default=Path("runs/train"), help="folder of checkpoints, log and curves")
    p.add_argument("--checkpoint-every", type=float, default=120.0, help="seconds")
    p.add_argument("--members-over", type=int, default=1, help="processes of torchrun that members are spread over")
    p.add_argument("--shard", action="store_true", help="each process of torchrun holds a share of every weight")
    p.add_argument("--resume", action="store_true", help="go on where the run in --output stopped")
    p.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(**defaults)
    return p


Factory = Callable[[SequenceData], Callable[[], nn.Module]]


def encoder(args: argparse.Namespace) -> Factory:
    """Return, for data, a factory of the encoder that the flags name."""
    sizes = {"d_model": args.d_model, "max_len": args.window, "dropout": args.dropout}
    layers = {"num_layers": args.num_layers}
    if args.encoder == "bert4rec":  # room for the [mask] that stands for the next item; pre-norm, as the authors' code
        sizes |= {"max_len": args.window + 1}
        options = {**sizes, **layers, "num_heads": args.num_heads or 2, "norm_first": True}
        return lambda data: lambda: BERT4Rec(data.num_items, **options)
    if args.encoder == "sasrec":
        return lambda data: lambda: SASRec(data.num_items, **sizes, **layers, num_heads=args.num_heads or 1)
    if args.encoder == "gru4rec":
        return lambda data: lambda: GRU4Rec(data.num_items, **sizes, **layers)
    return lambda data: lambda: Caser(data.num_items, window=args.filter_window, **sizes)


def sequences(args: argparse.Namespace) -> SequenceData:
    """Return the data that the flags name."""
    data = read_text(args.data, args.attributes) if args.data else synthetic(args.users, args.items)
    print(data)
    return data


def ensemble(args: argparse.Namespace, data: SequenceData, factory: Factory, objective: Objective) -> EnsembleKD:
    """Return the model that the flags describe."""
    mesh = None
    if dist.is_initialized() and not args.shard:
        sizes = (dist.get_world_size() // args.members_over, args.members_over)
        mesh = init_device_mesh(torch.device(args.device).type, sizes, mesh_dim_names=("data", "member"))
    terms = [args.ap * AP()] * (data.item_attributes is not None)
    terms += [args.lambda_ * (ICL(temperature=args.temperature) + CCL(temperature=args.temperature))]
    terms += [args.mu * KD(temperature=args.kd_temperature)]
    model = EnsembleKD(
        factory(data),
        args.n,
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
    same = ("epochs", "batch_size", "lr", "weight_decay", "window_step", "precision", "exclude", "patience", "seed")
    return {
        **{name: getattr(args, name) for name in same},
        "schedule": schedule,
        "transfer": Ramp(*args.transfer),
        "window": args.window + isinstance(objective, NextItem),  # whose newest item is a target and no input
        "checkpoint_every_s": args.checkpoint_every,
    }


def run(args: argparse.Namespace, factory: Factory, objective: Objective) -> None:
    """Train, evaluate on the test items, recommend, and draw the curves; in all processes that torchrun started."""
    with process_group(), nullcontext() if Place.world().is_first else redirect_stdout(None):  # one process reports
        data = sequences(args)
        model, started = ensemble(args, data, factory, objective), time.monotonic()
        folder = {"output_dir": args.output, "resume": args.resume or restarted(), "overwrite": args.overwrite}
        result = fit(model, data, **fit_options(args, objective), **folder)
        minutes = (time.monotonic() - started) / 60
        report(args, model, data, f"weights of epoch {result.best_epoch + 1} of {len(result.history)}", minutes)
        if model.place.is_first and importlib.util.find_spec("matplotlib"):
            curves(result).save(args.output / "curves.png")
            print(f"Learning curves: {args.output / 'curves.png'}")


def report(args: argparse.Namespace, model: EnsembleKD, data: SequenceData, weights: str, minutes: float) -> None:
    """Print the table of the test items, the ensemble's gain, and the recommendations of one user."""
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


def main(given: list[str] | None = None) -> None:
    """Read the flags and run."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--encoder", choices=DEFAULTS, default="sasrec")
    chosen, rest = first.parse_known_args(given)
    parser = flags(__doc__, **DEFAULTS[chosen.encoder])
    parser.add_argument("--encoder", choices=DEFAULTS, default=chosen.encoder)  # for --help alone
    args = parser.parse_args(rest)
    masked = MaskedItem(mask_ratio=args.mask_ratio, views=args.views, newest=args.newest)
    run(args, encoder(args), masked if args.encoder == "bert4rec" else NextItem(views=args.views))


if __name__ == "__main__":
    main()
