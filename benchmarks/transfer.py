"""Does transfer between members help? SASRec, GRU4Rec and Caser on Beauty: one network, three without it, three with.

``python -m benchmarks.transfer --data-dir FOLDER [--only SASRec ...]`` trains what is not yet in
``results/transfer.jsonl``, appends a line for each run, and prints the table of all lines. A run that was stopped goes
on from its last checkpoint in ``--output``, so that the study may be stopped at any moment; processes of different
``--only``, ``--seeds`` or ``--variants`` may share it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.common import DATA_DIR, RESULTS, environment, revision
from ensemble_kd import AP, CCL, ICL, KD, EnsembleKD, NextItem, fit
from ensemble_kd.data import SequenceData, read_text
from ensemble_kd.encoders import Caser, GRU4Rec, SASRec
from ensemble_kd.evaluation import evaluate
from ensemble_kd.schedules import Cosine

FILE = RESULTS / "transfer.jsonl"
METRIC = "NDCG@10"
VARIANTS = ("one network", "independent", "transfer", "strong transfer")
ENCODERS: dict[str, Callable[..., nn.Module]] = {"SASRec": SASRec, "GRU4Rec": GRU4Rec, "Caser": Caser}
SEEDS = (0, 1)


@dataclass(frozen=True)
class Settings:
    """Everything that steers a run; its dictionary is the run's key in the results."""

    encoder: str
    variant: str
    seed: int
    dropout: float
    epochs: int = 9
    lr: float = 1e-3
    batch_size: int = 64
    d_model: int = 64
    window: int = 50
    ap: float = 0.2
    lambda_: float = 0.01  # of ICL + CCL
    mu: float = 0.001  # of KD
    temperature: float = 0.3  # of ICL and CCL
    kd_temperature: float = 0.3
    classifier: str = "tied"

    @property
    def name(self) -> str:
        return f"{self.encoder}-{self.variant.replace(' ', '-')}-{self.seed}"


def runs() -> Iterator[Settings]:
    """All runs, the most telling first. What differs between encoders was chosen on validation, by one network."""
    own: dict[str, dict[str, Any]] = {
        "SASRec": {"dropout": 0.5, "lr": 2e-3},
        "GRU4Rec": {"dropout": 0.4, "lr": 2e-3, "epochs": 7},
        "Caser": {"dropout": 0.4, "lr": 2e-3, "epochs": 5},
    }
    weights: dict[str, dict[str, Any]] = {
        "one network": {"lambda_": 0.0, "mu": 0.0},
        "independent": {"lambda_": 0.0, "mu": 0.0},
        "transfer": {},  # weights and temperatures of the authors' code
        "strong transfer": {"mu": 0.5, "kd_temperature": 1.0},  # as much as deep mutual learning: both teachers' mean
    }
    for seed in SEEDS:
        for encoder in ENCODERS:
            for variant in VARIANTS[:3]:
                yield Settings(encoder, variant, seed, **own[encoder], **weights[variant])
    yield Settings("SASRec", "strong transfer", 0, **own["SASRec"], **weights["strong transfer"])


def train(s: Settings, data: SequenceData, output: Path, code: str) -> dict[str, object]:
    """One run by revision ``code``: its settings, test metrics of every scorer, and when validation was best."""
    transfer = s.lambda_ * (ICL(temperature=s.temperature) + CCL(temperature=s.temperature))
    transfer += s.mu * KD(temperature=s.kd_temperature)
    model = EnsembleKD(
        lambda: ENCODERS[s.encoder](data.num_items, d_model=s.d_model, max_len=s.window, dropout=s.dropout),
        1 if s.variant == "one network" else 3,
        objective=NextItem(),
        losses=s.ap * AP() + transfer if s.lambda_ or s.mu else s.ap * AP(),
        item_attributes=data.item_attributes,
        classifier=s.classifier,
        seed=s.seed,
    )
    started = time.monotonic()
    found = fit(
        model,
        data,
        epochs=s.epochs,
        batch_size=s.batch_size,
        lr=s.lr,
        schedule=Cosine(warmup=0.5),
        window=s.window + 1,
        window_step=s.window,
        precision="bfloat16",
        output_dir=output / s.name,
        resume=True,
        progress=False,
        seed=s.seed,
    )
    curve = [entry["valid"]["ensemble"][METRIC] for entry in found.history]
    test = evaluate(model, data, "test", exclude="history")
    return {
        "settings": asdict(s),
        "protocol": test.protocol,
        "test": {
            scorer: {metric: round(value, 5) for metric, value in row.items()} for scorer, row in test.rows.items()
        },
        "best_epoch": found.best_epoch,
        "valid": [round(value, 5) for value in curve],
        "train_s": round(sum(entry["train_s"] for entry in found.history), 1),
        "wall_s": round(time.monotonic() - started, 1),
        "machine": environment(),
        "revision": code,
    }


def finished(path: Path = FILE) -> list[dict[str, Any]]:
    """The runs that are in the results."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown row for each encoder and variant: test NDCG@10, mean over seeds (and each seed's)."""

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})" if values else "-"

    lines = ["| encoder | variant | members' mean | ensemble | over one network |", "|---|---|---|---|---|"]
    for encoder in ENCODERS:
        scores: dict[str, list[float]] = {}
        for variant in VARIANTS:
            of = sorted(
                (r for r in results if (r["settings"]["encoder"], r["settings"]["variant"]) == (encoder, variant)),
                key=lambda r: r["settings"]["seed"],
            )
            scores[variant] = [r["test"]["ensemble"][METRIC] for r in of]
            members = [
                statistics.mean(row[METRIC] for scorer, row in r["test"].items() if scorer != "ensemble") for r in of
            ]
            scores[variant + ", members"] = members
        for variant in (v for v in VARIANTS if scores[v]):
            own, one = scores[variant], scores["one network"]
            gain = f"{statistics.mean(own) / statistics.mean(one) - 1:+.1%}" if own and one else "-"
            together = ["", ""] if variant == "one network" else [cell(own), gain]
            lines.append(f"| {' | '.join([encoder, variant, cell(scores[variant + ', members']), *together])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of Beauty.txt and its attributes")
    parser.add_argument("--only", nargs="+", choices=tuple(ENCODERS), default=list(ENCODERS), help="these encoders")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS), help="these seeds")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="these variants")
    parser.add_argument("--output", type=Path, default=Path("runs/transfer"), help="folder of checkpoints and logs")
    args, code = parser.parse_args(), revision()  # what this process has loaded; the files may change under it
    os.environ[DATA_DIR] = str(args.data_dir.resolve())
    data = read_text(args.data_dir / "Beauty.txt", args.data_dir / "Beauty_item2attributes.json")
    for settings in runs():
        if (
            settings.encoder not in args.only
            or settings.seed not in args.seeds
            or settings.variant not in args.variants
        ):
            continue
        if any(r["settings"] == asdict(settings) for r in finished()):
            continue
        print(settings, flush=True)
        line = json.dumps(train(settings, data, args.output, code)) + "\n"
        with FILE.open("a", encoding="utf-8") as file:  # one write, so that processes may share the file
            file.write(line)
        print(line, flush=True)
    print(table(finished()))


if __name__ == "__main__":
    main()
