"""SASRec and GRU4Rec in one ensemble on Beauty, independent or students: three members each, and what six know.

``python -m benchmarks.mixed --data-dir FOLDER`` may be stopped at any moment and called again. It takes the networks
that ``benchmarks.transfer`` has left in ``--output``, and trains those that are missing. Each ensemble is weighted by
``calibrate`` on validation, and compared by user with three SASRec of the same seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import RESULTS
from benchmarks.paper.recipes import load
from benchmarks.transfer import attempt
from benchmarks.trials import METRIC, Record, Trial, append, at_hand, paired, read, score, spread, tested
from ensemble_kd import EnsembleKD
from ensemble_kd.ensemble import join
from ensemble_kd.evaluation import calibrate, evaluate

PAGE = Path(__file__).parent.parent / "docs" / "results" / "mixed.md"


class Kind(NamedTuple):
    """Three members of one encoder, trained one way."""

    encoder: str
    formula: str = "KD"
    strength: float = 0.0

    def trial(self, seed: int) -> Trial:
        """Return the run that trains them."""
        return attempt(self.encoder, self.formula, self.strength, seed=seed)


S, G = Kind("SASRec"), Kind("GRU4Rec")
S_OWN, G_OWN = Kind("SASRec", "students", 10.0), Kind("GRU4Rec", "students", 10.0)
S_BOTH, G_BOTH = Kind("SASRec", "mixed", 10.0), Kind("GRU4Rec", "mixed", 10.0)
ALONE, TAUGHT = "three SASRec", "three SASRec, students of both encoders"
MIXES: Mapping[str, Mapping[Kind, int]] = {  # how many of each kind, the first ones
    ALONE: {S: 3},
    TAUGHT: {S_BOTH: 3},
    "two SASRec, a GRU4Rec": {S: 2, G: 1},
    "two SASRec, a student of three GRU4Rec": {S: 2, G_OWN: 1},
    "two students of three SASRec, a student of three GRU4Rec": {S_OWN: 2, G_OWN: 1},
    "two SASRec and a GRU4Rec, students of both encoders": {S_BOTH: 2, G_BOTH: 1},
    "a SASRec and two GRU4Rec, students of both encoders": {S_BOTH: 1, G_BOTH: 2},
    "three SASRec and three GRU4Rec": {S: 3, G: 3},
    "three SASRec and three GRU4Rec, students of both encoders": {S_BOTH: 3, G_BOTH: 3},
}


def measured(name: str, seed: int, data: Any, folder: Path) -> Record:
    """Join, weigh and test an ensemble of trained members."""
    members: list[EnsembleKD] = []
    for kind, count in MIXES[name].items():
        model = at_hand(kind.trial(seed), data, folder)
        members += [model.member(i) for i in range(count)]
    mixed = join(members)
    calibrate(mixed, data, "valid")
    valid = evaluate(mixed, data, "valid", exclude="history").rows["ensemble"][METRIC]
    shares = [round(float(weight), 3) for weight in mixed.weights]
    return {"mix": name, "seed": seed, "valid": [round(valid, 5)], "shares": shares, **tested(mixed, data)}


def page(records: Sequence[Record]) -> str:
    """Return a table of all ensembles, each compared with both of three SASRec."""
    known: dict[str, dict[int, Record]] = {}
    for r in records:
        known.setdefault(r["mix"], {})[r["seed"]] = r
    lines = [
        "# SASRec and GRU4Rec in one ensemble",
        "",
        "*Written by `python -m benchmarks.mixed --report-only`.*",
        "",
        "Beauty, `presets.recipe`, `fit` with nothing else given. Members were trained apart, joined by `join`, and",
        "weighted by `calibrate` on validation. Students learn with `10 * KD(temperature=1.0)` from three independent",
        "networks of their own encoder, or from the three SASRec and the three GRU4Rec together. NDCG@10, history",
        "excluded, mean ± standard deviation over seeds (their number); differences are paired by user and seed. With",
        "one seed a difference on test is no claim.",
        "",
        f"| members | validation | test | against {ALONE} | against {TAUGHT} |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in [each for each in MIXES if each in known]:
        own = known[name]
        cells = [name, spread([r["valid"][0] for r in own.values()]), spread([score(r) for r in own.values()])]
        cells += [against(own, known.get(other, {})) if other != name else "" for other in (ALONE, TAUGHT)]
        lines.append(f"| {' | '.join(cells)} |")
    protocols = sorted({r["protocol"] for r in records})
    machines = sorted({f"{r['machine']['processor']}, torch {r['machine']['torch']}" for r in records})
    return "\n".join([*lines, "", *[f"- {text}" for text in (*protocols, *machines)]]) + "\n"


def against(own: Mapping[int, Record], others: Mapping[int, Record]) -> str:
    """Return the difference of seeds that both have, with a bootstrap by user."""
    t = paired(own, others)
    return "" if t is None else f"{t.difference:+.4f} (p = {t.p:.4f}, in {t.wins} of {t.seeds})"


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.mixed", description=__doc__)
    p.add_argument("--data-dir", type=Path, help="folder of Beauty.txt")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--only", nargs="+", choices=MIXES, default=[], metavar="MEMBERS", help="ensembles of this name")
    p.add_argument("--results", type=Path, default=RESULTS / "mixed.jsonl", help="JSON lines")
    p.add_argument("--output", type=Path, default=Path("runs/transfer"), help="folder of checkpoints and logs")
    p.add_argument("--page", type=Path, default=PAGE)
    p.add_argument("--report-only", action="store_true", help="train nothing")
    args = p.parse_args(arguments)
    if args.data_dir is None and not args.report_only:
        p.error("--data-dir is needed, but for --report-only")
    for seed in [] if args.report_only else args.seeds:
        for name in args.only or MIXES:
            if any((r["mix"], r["seed"]) == (name, seed) for r in read(args.results)):
                continue
            record = measured(name, seed, load("Beauty", args.data_dir), args.output)
            append(args.results, record)
            print(f"{name}, seed {seed}: validation {record['valid'][0]}, test {score(record)}", flush=True)
    args.page.write_text(page(read(args.results)), encoding="utf-8")
    print(args.page)


if __name__ == "__main__":
    main()
