"""What ``fit(model, data)`` reaches with nothing else given, and what more networks add on Beauty.

``python -m benchmarks.defaults --data-dir FOLDER`` may be stopped at any moment and called again: finished runs are
kept, an unfinished one goes on from its last checkpoint. Each of the first runs is one network with the settings of
``presets.recipe``. On Beauty there are three SASRec besides, alone and with KD, and of the same seeds a mixed ensemble:
two of the three SASRec and the GRU4Rec of the first runs, weighted by ``calibrate``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.common import RESULTS, environment, revision
from benchmarks.paper import store
from benchmarks.paper.analysis import Numbers, ndcg, paired_bootstrap
from benchmarks.paper.recipes import ENCODERS, Run, load
from ensemble_kd import KD, EnsembleKD, fit
from ensemble_kd.ensemble import join
from ensemble_kd.evaluation import calibrate, evaluate
from ensemble_kd.losses import Loss
from ensemble_kd.presets import recipe
from ensemble_kd.training import Cosine, Ramp

PAGE = Path(__file__).parent.parent / "docs" / "results" / "defaults.md"
METRIC = "NDCG@10"
BEST = "best.pt"
FIRST = (
    ("Beauty", "SASRec"),
    ("Beauty", "GRU4Rec"),
    ("Beauty", "Caser"),
    ("Beauty", "BERT4Rec"),
    ("LastFM", "SASRec"),
    ("ML-1M", "SASRec"),
)
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """One call of ``fit``, with nothing else given but for what is not its default here."""

    dataset: str
    encoder: str
    n: int = 1
    kd: float = 0.0  # weight of KD at temperature 1, from the second epoch on and whole from the fifth
    dropout: float | None = None  # in place of the recipe's
    classifier: str | None = None  # in place of the recipe's
    cosine: int = 0  # epochs of a falling rate, which have to be known; 0: the default
    lr: float = 2e-3
    seed: int = 0

    @property
    def key(self) -> str:
        """The name of its folder."""
        values = {name: value for name, value in asdict(self).items() if name not in ("dataset", "encoder")}
        more = "".join(f"-{name}{value}" for name, value in values.items() if value is not None)
        return f"{self.dataset}-{self.encoder}{more}"

    def model(self, data: Any) -> EnsembleKD:
        """Return the untrained model."""
        found = recipe(data, ENCODERS[self.encoder])  # type: ignore[arg-type]
        changes = {} if self.dropout is None else {"dropout": self.dropout}
        found = replace(found, settings={**found.settings, **changes})
        losses: Loss | Literal[0] = self.kd * KD(temperature=1.0) if self.kd else 0
        more = {} if self.classifier is None else {"classifier": self.classifier}
        return found.ensemble(self.n, losses=losses, seed=self.seed, **more)  # type: ignore[arg-type]

    def options(self) -> dict[str, Any]:
        """Return what ``fit`` is given."""
        rate: dict[str, Any] = {"epochs": self.cosine, "schedule": Cosine(warmup=0.5), "lr": self.lr}
        transfer: dict[str, Any] = {"transfer": Ramp(2, 5, unit="epochs")}
        return {**(rate if self.cosine else {}), **(transfer if self.kd else {})}


# LastFM has no best settings that are known, so these are tried: one network each, the best by validation.
TUNED = [
    Trial("LastFM", "SASRec", dropout=dropout, cosine=cosine, lr=lr)
    for cosine in (10, 20)
    for dropout, lr in ((0.3, 2e-3), (0.5, 2e-3), (0.5, 1e-3))
]
THREE = [Trial("Beauty", "SASRec", 3), Trial("Beauty", "SASRec", 3, kd=1.0)]
DENSE = Trial("ML-1M", "SASRec", 3)


def wanted(seeds: Sequence[int]) -> Iterator[Trial]:
    """All runs, the cheapest first; each seed of Beauty's ensembles and of their partner."""
    for seed in seeds:
        yield from (replace(each, seed=seed) for each in (Trial("Beauty", "GRU4Rec"), *THREE))
    for dataset, encoder in FIRST:
        yield Trial(dataset, encoder)
    yield from TUNED
    yield DENSE


def train(trial: Trial, data: Any, folder: Path) -> Record:
    """Train, test, and keep the best weights."""
    model = trial.model(data)
    found = fit(model, data, seed=trial.seed, output_dir=folder, resume=True, progress=False, **trial.options())
    (folder / "last.pt").unlink()
    return {"trial": asdict(trial), **tested(model, data), **_course(found.history, found.best_epoch)}


def _course(history: Sequence[Any], best: int) -> dict[str, Any]:
    """Return validation by epoch, the best, and minutes of training and validation, before and after a stop, too."""
    valid = [round(entry["valid"]["ensemble"][METRIC], 5) for entry in history]
    seconds = sum(entry["train_s"] + entry["valid_s"] for entry in history)
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


def mixed(seed: int, kd: float, data: Any, folder: Path) -> Iterator[Record]:
    """Yield the three SASRec and the mixed three of a seed, each with uniform and with calibrated weights."""
    three = trained(replace(THREE[0], kd=kd, seed=seed), data, folder)
    gru = trained(Trial("Beauty", "GRU4Rec", seed=seed), data, folder)
    joined = join([three.member(0), three.member(1), gru])
    for name, model in (("three SASRec", three), ("two SASRec and a GRU4Rec", joined)):
        for weights in ("uniform", "calibrated"):
            found = None if weights == "uniform" else calibrate(model, data, "valid")
            valid = evaluate(model, data, "valid", exclude="history").rows["ensemble"][METRIC]
            about = {"mixed": name, "weights": weights, "kd": kd, "seed": seed, "valid": [round(valid, 5)]}
            yield {**about, "shares": found and [round(float(x), 3) for x in found.weights], **tested(model, data)}


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


def best_known(dataset: str, encoder: str, records: Sequence[Record]) -> tuple[str, list[float]]:
    """Return the best settings by validation among runs whose length or schedule was chosen, and their tests.

    They are one network's, or the mean of three independent ones with the schedule that came before this one.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for line in (RESULTS / "paper_cpu.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        run = Run(**record["run"])
        earlier = run.schedule == "settle"
        if (run.dataset, run.encoder, run.negatives) == (dataset, encoder, None) and (run.n == 1 or earlier):
            what = f"d={run.d_model}, dropout {run.dropout:g}, {run.epochs} epochs, {run.precision}"
            found = (max(record["valid"]), members(record) if earlier else score(record))
            groups.setdefault(f"{what}, 200 items" if earlier else what, []).append(found)
    for record in records:
        if "trial" in record and record["trial"]["cosine"] and record["trial"]["dataset"] == dataset:
            trial = Trial(**record["trial"])
            what = f"dropout {trial.dropout:g}, {trial.cosine} epochs, lr {trial.lr:g}"
            groups.setdefault(what, []).append((max(record["valid"]), score(record)))
    if not groups:
        return "none", []
    what = max(groups, key=lambda name: statistics.mean(valid for valid, _ in groups[name]))
    return what, [test for _, test in groups[what]]


def page(records: Sequence[Record]) -> str:
    """Return the tables of what has run."""
    trials = {Trial(**r["trial"]): r for r in records if "trial" in r}
    lines = [
        "# What the defaults reach",
        "",
        "*Written by `python -m benchmarks.defaults --report-only` from `benchmarks/results/defaults.jsonl`.*",
        "",
        "## One network, nothing given",
        "",
        "`fit(model, data)` with an encoder of `presets.recipe`: no length, rate, batch or dropout is chosen by hand.",
        "The best known are one network's settings whose length, rate and dropout were chosen by validation there.",
        "NDCG@10 on test, history excluded, mean ± standard deviation over seeds (their number).",
        "Minutes of one thread, on a machine that was shared with other runs.",
        "",
        "| data | encoder | validation | test | epochs | minutes | best known | its settings | share |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for dataset, encoder in FIRST:
        own = [r for t, r in trials.items() if replace(t, seed=0) == Trial(dataset, encoder)]
        if not own:
            continue
        what, known = best_known(dataset, encoder, records)
        test = [score(r) for r in own]
        cells = [dataset, encoder, spread([max(r["valid"]) for r in own]), spread(test)]
        cells += [f"{statistics.mean(r['best_epoch'] + 1 for r in own):.0f}"]
        cells += [f"{statistics.mean(r['minutes'] for r in own):.0f}"]
        cells += [spread(known), what, f"{statistics.mean(test) / statistics.mean(known):.3f}"] if known else ["–"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Three networks",
        "",
        "| | validation | members | ensemble | epochs | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    names = ("Beauty, three SASRec, independent", "Beauty, three SASRec, KD of 1", "ML-1M, three SASRec, independent")
    for each, name in zip((*THREE, DENSE), names, strict=True):
        own = [r for t, r in trials.items() if replace(t, seed=0) == each]
        if own:
            cells = [name, spread([max(r["valid"]) for r in own]), spread([members(r) for r in own])]
            cells += [spread([score(r) for r in own]), f"{statistics.mean(r['best_epoch'] + 1 for r in own):.0f}"]
            cells += [f"{statistics.mean(r['minutes'] for r in own):.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## A mixed ensemble on Beauty",
        "",
        *_mixed_lines([r for r in records if "mixed" in r]),
        *_claims(records),
    ]
    machines = sorted({f"{r['machine']['processor']}, torch {r['machine']['torch']}" for r in records})
    protocols = sorted({r["protocol"] for r in records})
    return "\n".join([*lines, "", *[f"- {text}" for text in (*protocols, *machines)]]) + "\n"


def _mixed_lines(records: Sequence[Record]) -> list[str]:
    if not records:
        return []
    lines = [
        "The mixed ensemble has two of the three SASRec, and a GRU4Rec that was trained alone.",
        "",
        "| members | KD between SASRec | weights | validation | ensemble |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        groups.setdefault((r["mixed"], r["kd"], r["weights"]), []).append(r)
    for (name, kd, weights), own in sorted(groups.items(), key=lambda pair: (pair[0][1], pair[0][0], pair[0][2])):
        cells = [name, f"{kd:g}", weights, spread([max(r["valid"]) for r in own]), spread([score(r) for r in own])]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _claims(records: Sequence[Record]) -> list[str]:
    """Compare by user what has run with the same seeds."""

    trials = {Trial(**r["trial"]): r for r in records if "trial" in r}

    def alone(kd: float) -> dict[int, Record]:
        return {
            trial.seed: r for trial, r in trials.items() if replace(trial, seed=0) == Trial("Beauty", "SASRec", 3, kd)
        }

    def joined(name: str, kd: float) -> dict[int, Record]:
        found = (r for r in records if r.get("mixed") == name and r["kd"] == kd and r["weights"] == "calibrated")
        return {r["seed"]: r for r in found}

    pairs = [
        ("KD makes the ensemble better", alone(1.0), alone(0.0), False),
        ("KD makes each member better", alone(1.0), alone(0.0), True),
    ]
    for kd in (0.0, 1.0):
        of_one, of_two = joined("three SASRec", kd), joined("two SASRec and a GRU4Rec", kd)
        pairs.append((f"The mixed ensemble beats three SASRec, KD of {kd:g}, both calibrated", of_two, of_one, False))
    lines = [
        "| claim | difference (95 %), paired by user | p | seeds where it holds |",
        "| --- | ---: | ---: | ---: |",
    ]
    for claim, first, second, of_members in pairs:
        seeds = sorted(first.keys() & second.keys())
        if seeds:
            both = [np.stack([of_users(group[s], members=of_members) for s in seeds]) for group in (first, second)]
            t = paired_bootstrap(*both)
            difference = f"{t.difference:+.4f} ({t.low:+.4f} … {t.high:+.4f})"
            lines.append(f"| {claim} | {difference} | {t.p:.4f} | {t.wins} of {t.seeds} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__)
    p.add_argument("--data-dir", type=Path, help="folder of Beauty.txt, ML-1M.txt and LastFM.txt")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the ensembles on Beauty")
    p.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="runs whose folder's name begins so")
    p.add_argument("--results", type=Path, default=RESULTS / "defaults.jsonl", help="JSON lines")
    p.add_argument("--output", type=Path, default=Path("runs/defaults"), help="folder of checkpoints and logs")
    p.add_argument("--page", type=Path, default=PAGE)
    p.add_argument("--report-only", action="store_true", help="train nothing")
    args = p.parse_args(arguments)
    if args.data_dir is None and not args.report_only:
        p.error("--data-dir is needed, but for --report-only")
    for trial in [] if args.report_only else wanted(args.seeds):
        done = {Trial(**r["trial"]) for r in read(args.results) if "trial" in r}
        if trial in done or (args.only and not any(trial.key.startswith(text) for text in args.only)):
            continue
        print(trial.key, flush=True)
        record = train(trial, load(trial.dataset, args.data_dir), args.output / trial.key)
        append(args.results, record)
        print(f"  {record['test']['ensemble']}, {record['minutes']} minutes", flush=True)
    for seed in [] if args.report_only else args.seeds:
        for kd in (0.0, 1.0):
            records = read(args.results)
            done = {Trial(**r["trial"]) for r in records if "trial" in r}
            parts = {replace(THREE[0], kd=kd, seed=seed), Trial("Beauty", "GRU4Rec", seed=seed)}
            if parts <= done and not any((r["kd"], r["seed"]) == (kd, seed) for r in records if "mixed" in r):
                for record in list(mixed(seed, kd, load("Beauty", args.data_dir), args.output)):
                    append(args.results, record)
    args.page.write_text(page(read(args.results)), encoding="utf-8")
    print(args.page)


if __name__ == "__main__":
    main()
