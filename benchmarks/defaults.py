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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.paper.recipes import Run, load
from benchmarks.trials import (
    METRIC,
    Record,
    Trial,
    append,
    members,
    paired,
    read,
    score,
    spread,
    tested,
    train,
    trained,
)
from ensemble_kd.ensemble import join
from ensemble_kd.evaluation import calibrate, evaluate

PAGE = Path(__file__).parent.parent / "docs" / "results" / "defaults.md"
FIRST = (
    ("Beauty", "SASRec"),
    ("Beauty", "GRU4Rec"),
    ("Beauty", "Caser"),
    ("Beauty", "BERT4Rec"),
    ("LastFM", "SASRec"),
    ("ML-1M", "SASRec"),
)

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
    best = joined("two SASRec and a GRU4Rec", 1.0)
    pairs.append(("The calibrated mixed ensemble with KD beats three independent SASRec", best, alone(0.0), False))
    lines = [
        "| claim | difference (95 %), paired by user | p | seeds where it holds |",
        "| --- | ---: | ---: | ---: |",
    ]
    for claim, first, second, of_members in pairs:
        if (t := paired(first, second, members=of_members)) is not None:
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
