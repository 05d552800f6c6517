"""Runs of ``fit`` with nothing else given but for what is compared, and what is kept of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.common import environment, revision
from benchmarks.paper import store
from benchmarks.paper.analysis import Numbers, Test, ndcg, paired_bootstrap
from benchmarks.paper.recipes import ENCODERS
from ensemble_kd import KD, EnsembleKD, fit
from ensemble_kd.distillation import FromTeacher
from ensemble_kd.ensemble import join
from ensemble_kd.evaluation import calibrate, evaluate
from ensemble_kd.losses import Ambiguity, Loss
from ensemble_kd.presets import Recipe, recipe
from ensemble_kd.training import Cosine, Ramp

METRIC = "NDCG@10"
BEST, LAST = "best.pt", "last.pt"
ANEW = 100  # seeds of students are so much higher than their teacher's
FORMULAS: dict[str, Loss] = {
    "KD": KD(temperature=1.0),
    "target": KD(temperature=1.0, part="target"),
    "better": KD(temperature=1.0, gate="better"),
    "spliced": KD(temperature=1.0, on="spliced"),
    "ema": KD(temperature=1.0, teacher="ema"),
    "distillation": Ambiguity(),
    "ambiguity": Ambiguity(),
    "students": KD(temperature=1.0),
    "mixed": KD(temperature=1.0),
}
# Formulas of new members that learn from an ensemble trained before them: of their own encoder, or of several.
STUDENTS: Mapping[str, tuple[str, ...]] = {"students": (), "mixed": ("SASRec", "GRU4Rec")}
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """One call of ``fit``, with nothing else given but for what is not its default here."""

    dataset: str
    encoder: str
    n: int = 1
    kd: float = 0.0  # weight of the formula, from the second epoch on and whole from the fifth
    start: int | None = None  # in place of the second epoch
    dropout: float | None = None  # in place of the recipe's
    classifier: str | None = None  # in place of the recipe's
    cosine: int = 0  # epochs of a falling rate, which have to be known; 0: the default
    lr: float = 2e-3
    seed: int = 0
    formula: str = "KD"  # of FORMULAS

    @property
    def key(self) -> str:
        """The name of its folder."""
        values = {name: value for name, value in asdict(self).items() if name not in ("dataset", "encoder", "formula")}
        more = "".join(f"-{name}{value}" for name, value in values.items() if value is not None)
        return f"{self.dataset}-{self.encoder}{more}{'' if self.formula == 'KD' else f'-{self.formula}'}"

    def recipe(self, data: Any) -> Recipe:
        """Return the encoder and its settings."""
        found = recipe(data, ENCODERS[self.encoder])  # type: ignore[arg-type]
        changes = {} if self.dropout is None else {"dropout": self.dropout}
        return replace(found, settings={**found.settings, **changes})

    def model(self, data: Any) -> EnsembleKD:
        """Return the untrained model."""
        losses: Loss | Literal[0] = self.kd * FORMULAS[self.formula] if self.kd else 0
        more = {} if self.classifier is None else {"classifier": self.classifier}
        seed = self.seed + (ANEW if self.formula in STUDENTS else 0)
        return self.recipe(data).ensemble(self.n, losses=losses, seed=seed, **more)  # type: ignore[arg-type]

    @property
    def teachers(self) -> list[Trial]:
        """The independent members whose ensemble teaches, where the formula is one of ``STUDENTS``."""
        encoders = STUDENTS[self.formula] or (self.encoder,)
        return [Trial(self.dataset, encoder, self.n, seed=self.seed) for encoder in encoders]

    def options(self) -> dict[str, Any]:
        """Return what ``fit`` is given."""
        rate: dict[str, Any] = {"epochs": self.cosine, "schedule": Cosine(warmup=0.5), "lr": self.lr}
        start = 2 if self.start is None else self.start
        transfer: dict[str, Any] = {"transfer": Ramp(start, start + 3, unit="epochs")}
        ramp = self.kd and self.formula not in STUDENTS  # what was trained before may teach from the beginning
        return {**(rate if self.cosine else {}), **(transfer if ramp else {})}


def train(trial: Trial, data: Any, folder: Path) -> Record:
    """Train, test, and keep the best weights; teachers of which none are kept beside this folder are trained first."""
    options = {"output_dir": folder, "resume": True, "progress": False, **trial.options()}
    model = trial.model(data)
    if trial.formula in STUDENTS:
        taught = FromTeacher(_teacher(trial, data, folder.parent), spliced=False)
        run = fit(model, data, seed=ANEW + trial.seed, loss=taught, **options)
    else:
        run = fit(model, data, seed=trial.seed, **options)
    (folder / LAST).unlink()
    return {"trial": asdict(trial), **tested(model, data), **_course(run.history, run.best_epoch)}


def _teacher(trial: Trial, data: Any, folder: Path) -> EnsembleKD:
    """Return the ensemble that teaches; of several encoders, weighted on validation."""
    models = [at_hand(each, data, folder) for each in trial.teachers]
    if len(models) == 1:
        return models[0]
    teacher = join(models)
    calibrate(teacher, data, "valid")
    return teacher


def at_hand(trial: Trial, data: Any, folder: Path) -> EnsembleKD:
    """Return the trained model; it is trained first if none is kept in the folder."""
    own = folder / trial.key
    if not (own / BEST).exists() or (own / LAST).exists():
        train(trial, data, own)
    return trained(trial, data, folder)


def _course(history: Sequence[Any], best: int) -> dict[str, Any]:
    """Return validation by epoch, the best, and minutes: of a usual epoch, since a run may be paused."""
    valid = [round(entry["valid"]["ensemble"][METRIC], 5) for entry in history]
    seconds = len(history) * statistics.median(entry["train_s"] + entry["valid_s"] for entry in history)
    return {"valid": valid, "best_epoch": best, "minutes": round(seconds / 60, 1)}


def tested(model: EnsembleKD, data: Any) -> dict[str, Any]:
    """Return metrics by scorer, and each user's ranks."""
    test = evaluate(model, data, "test", exclude="history")
    return {
        "test": {scorer: {metric: round(v, 5) for metric, v in row.items()} for scorer, row in test.rows.items()},
        "protocol": test.protocol,
        "ranks": {scorer: store.pack(ranks) for scorer, ranks in test.ranks.items()},
        "machine": environment(),
        "revision": revision(),
    }


def trained(trial: Trial, data: Any, folder: Path) -> EnsembleKD:
    """Return the model of a finished run."""
    model = trial.model(data)
    model.load_state_dict(torch.load(folder / trial.key / BEST, weights_only=True)["model"])
    return model.eval()


def read(path: Path) -> list[Record]:
    """Return all records."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append(path: Path, record: Record) -> None:
    """Add a record."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def of_users(record: Record, *, members: bool = False) -> Numbers:
    """NDCG@10 of each user: the ensemble's, or the mean of its members'."""
    scorers = [name for name in record["ranks"] if (name != "ensemble") == members]
    return np.mean([ndcg(store.unpack(record["ranks"][name])) for name in scorers], axis=0)  # type: ignore[no-any-return]


def paired(own: Mapping[int, Record], others: Mapping[int, Record], *, members: bool = False) -> Test | None:
    """Test records by seed against others of the same seeds, paired by user; None: they share no seed."""
    seeds = sorted(own.keys() & others.keys())
    if not seeds:
        return None
    return paired_bootstrap(
        *(np.stack([of_users(group[s], members=members) for s in seeds]) for group in (own, others))
    )


def overlap(record: Record, k: int = 10) -> float:
    """How alike the members are: of the users whose item one of a pair has among its k best, the share of both."""
    hits = [store.unpack(ranks) < k for name, ranks in record["ranks"].items() if name != "ensemble"]
    return statistics.mean(float((a & b).sum() / (a | b).sum()) for a, b in combinations(hits, 2))


def spread(values: Sequence[float]) -> str:
    """Print a mean, and the standard deviation of several."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f} ({len(values)})" if len(values) > 1 else f"{mean} (1)"


def score(record: Record) -> float:
    """The ensemble's NDCG@10 on test."""
    return float(record["test"]["ensemble"][METRIC])


def members(record: Record) -> float:
    """The mean of the members' NDCG@10 on test."""
    return statistics.mean(float(row[METRIC]) for name, row in record["test"].items() if name != "ensemble")
