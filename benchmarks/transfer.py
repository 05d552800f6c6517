"""The study of what members should pass on: train what is missing of ``ATTEMPTS``, and write the table of all of them.

``python -m benchmarks.transfer --data-dir FOLDER`` may be stopped at any moment and called again. Settings are compared
by validation, seed 0; what wins there is tried with further seeds. ``--report-only`` trains nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.common import RESULTS, revision
from benchmarks.paper import store
from benchmarks.paper.analysis import Numbers, ndcg, paired_bootstrap
from benchmarks.paper.recipes import Run, load
from benchmarks.paper.train import train
from ensemble_kd import KD
from ensemble_kd.losses import Ambiguity, Gate, Loss, Part

BEST = "best.pt"
REPORT = Path(__file__).parent / "paper" / "TRANSFER.md"
Done = Mapping[str, store.Record]


@dataclass(frozen=True)
class Attempt(Run):
    """A run with a name, and with what may be passed on besides."""

    label: str = "independent"
    ambiguity: float = 0.0
    part: Part = "all"
    gate: Gate = "open"

    def losses(self) -> Loss | Literal[0]:
        """KD as it is chosen, and ambiguity; no other term, so that nothing else differs."""
        kd = KD(temperature=self.kd_temperature, part=self.part, gate=self.gate)
        terms: list[Loss] = [weight * term for weight, term in ((self.kd, kd), (self.ambiguity, Ambiguity())) if weight]
        return sum(terms[1:], start=terms[0]) if terms else 0


ALONE: dict[str, Any] = {"ap": 0.0, "icl": 0.0, "ccl": 0.0, "kd": 0.0, "kd_temperature": 1.0, "precision": "float32"}
BASES: dict[str, dict[str, Any]] = {
    "SASRec": {"d_model": 64, "dropout": 0.2, "epochs": 6},
    "GRU4Rec": {"d_model": 64, "dropout": 0.2, "epochs": 6, "lr": 4e-3},  # half of its epochs, at twice the usual rate
}
LATE: dict[str, Any] = {"transfer_from": 0.2, "transfer_full": 0.5}  # members that know nothing yet teach nothing


def attempt(encoder: str, label: str, longer: float = 1.0, **changes: Any) -> Attempt:
    """An attempt by an encoder's base, ``longer`` times as long."""
    made = Attempt("Beauty", encoder, label=label, **{**ALONE, **BASES[encoder], **changes})
    return replace(made, epochs=round(longer * made.epochs))


# The most telling first. A formula that keeps members from overfitting has to be tried for longer, too.
CHOICES: list[tuple[str, float, dict[str, Any]]] = [
    ("independent", 1, {}),
    ("Ambiguity of -0.5", 1, {"ambiguity": -0.5}),
    ("KD(part='target') of 1", 1, {"kd": 1.0, "part": "target", **LATE}),
    ("Ambiguity of 0.5", 1, {"ambiguity": 0.5, **LATE}),
    ("KD(part='target') of 3", 1, {"kd": 3.0, "part": "target", **LATE}),
    ("KD of 1, longer", 1.5, {"kd": 1.0, **LATE}),
    ("independent, longer", 1.5, {}),
    ("Ambiguity of 0.5, longer", 1.5, {"ambiguity": 0.5, **LATE}),
    ("KD(part='target') of 3, longer", 1.5, {"kd": 3.0, "part": "target", **LATE}),
    ("KD(gate='better') of 1, longer", 1.5, {"kd": 1.0, "gate": "better", **LATE}),
    ("Ambiguity of -0.25", 1, {"ambiguity": -0.25}),
    ("independent, shorter", 2 / 3, {}),
]
ATTEMPTS: list[Attempt] = []
for _start in range(0, len(CHOICES), 4):
    for _encoder in BASES:
        ATTEMPTS += [attempt(_encoder, label, longer, **more) for label, longer, more in CHOICES[_start : _start + 4]]


def read(path: Path) -> dict[str, store.Record]:
    """Finished attempts by key."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {Attempt(**record["run"]).key: record for record in map(json.loads, lines)}


def winners(done: Done, encoder: str) -> list[Attempt]:
    """The attempts of seed 0 whose ensemble or members have the best validation, and the best independent one."""
    tried = [Attempt(**r["run"]) for r in done.values() if r["run"]["encoder"] == encoder and r["run"]["seed"] == 0]
    valid = {a.key: max(done[a.key]["valid"]) for a in tried}
    alone = [a for a in tried if a.losses() == 0]
    with_transfer = [a for a in tried if a.losses() != 0]
    return [max(group, key=lambda a: valid[a.key]) for group in (alone, with_transfer) if group]


def wanted(done: Done, seeds: int, encoders: Sequence[str]) -> Iterator[Attempt]:
    """The attempts, and further seeds of what won."""
    yield from (a for a in ATTEMPTS if a.encoder in encoders)
    for seed in range(1, seeds):
        for encoder in encoders:
            yield from (replace(a, seed=seed) for a in winners(done, encoder))


def by_user(record: store.Record, *, members: bool) -> Numbers:
    """NDCG@10 of each user: the ensemble's, or the members' mean."""
    scorers = [s for s in record["ranks"] if (s != "ensemble") == members]
    return np.mean([ndcg(store.unpack(record["ranks"][s])) for s in scorers], axis=0)  # type: ignore[no-any-return]


def line(records: Sequence[store.Record], base: Sequence[store.Record]) -> str:
    """A row of the table: means over seeds, and paired tests by user against independent members of the same seeds."""
    seeds = {r["run"]["seed"]: r for r in base}
    pairs = [(r, seeds[r["run"]["seed"]]) for r in records if r["run"]["seed"] in seeds]
    cells = [records[0]["run"]["label"], str(len(records)), f"{records[0]['run']['epochs']}"]
    cells += [f"{statistics.mean(r['best_epoch'] + 1 for r in records):.0f}"]
    cells += [f"{statistics.mean(r['wall_s'] for r in records) / 60:.0f}"]
    cells += [f"{statistics.mean(max(r['valid']) for r in records):.4f}"]
    for members in (True, False):
        cells.append(f"{statistics.mean(float(by_user(r, members=members).mean()) for r in records):.4f}")
        if pairs and records[0] is not base[0]:
            both = [np.stack([by_user(pair[i], members=members) for pair in pairs]) for i in (0, 1)]
            test = paired_bootstrap(*both)
            cells.append(f"{test.difference:+.4f} (p {test.p:.3f})")
        else:
            cells.append("")
    for name in ("jaccard@10", "ambiguity"):
        cells.append(f"{statistics.mean(r['members'][name] for r in records):.3f}")
    return f"| {' | '.join(cells)} |"


HEADER = [
    "| attempt | seeds | epochs | best | minutes | validation | members | against independent | ensemble | "
    "against independent | overlap | ambiguity |",
    "|" + "---|" * 12,
]


def report(done: Done) -> str:
    """All attempts in one table per encoder; what has not run is not there."""
    lines = [
        "# What members should pass on",
        "",
        "Written by `python -m benchmarks.transfer`. Beauty, three members, d = 64, float32, no AP, ICL or CCL. Test",
        "NDCG@10 with `exclude='history'`, weights of the epoch with the best validation NDCG@10. Independent is",
        "the one whose number of epochs is best on validation. p: paired bootstrap over users. Overlap is Jaccard's of",
        "the top 10, ambiguity in nats per member. Minutes are the clock's, on a machine that others used, too.",
        "",
    ]
    for encoder in BASES:
        own = [r for r in done.values() if r["run"]["encoder"] == encoder]
        if not own:
            continue
        base = winners(done, encoder)[0]
        groups: dict[Attempt, list[store.Record]] = {}
        for r in own:
            groups.setdefault(replace(Attempt(**r["run"]), seed=0), []).append(r)
        lines += [f"## {encoder}", "", *HEADER]
        lines += [line(records, groups[replace(base, seed=0)]) for records in groups.values()]
        lines.append("")
    machines = sorted({f"{r['machine']['processor']}, torch {r['machine']['torch']}" for r in done.values()})
    return "\n".join([*lines, *[f"- {text}" for text in machines]]).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    p.add_argument("--data-dir", type=Path, help="folder of Beauty.txt and its attributes")
    p.add_argument("--results", type=Path, default=RESULTS / "transfer.jsonl", help="JSON lines")
    p.add_argument("--output", type=Path, default=Path("runs/transfer"), help="folder of checkpoints and logs")
    p.add_argument("--report", type=Path, default=REPORT)
    p.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    p.add_argument("--seeds", type=int, default=4, help="of what wins on validation of seed 0; 1: none but that")
    p.add_argument("--encoders", nargs="+", choices=list(BASES), default=list(BASES), help="train these alone")
    p.add_argument("--report-only", action="store_true")
    args, code, started = p.parse_args(arguments), revision(), time.monotonic()
    if args.data_dir is None and not args.report_only:
        p.error("--data-dir is needed, but for --report-only")
    while not args.report_only and time.monotonic() - started < 60 * args.minutes:
        done = read(args.results)
        todo = [a for a in wanted(done, args.seeds, args.encoders) if a.key not in done]
        if not todo:
            break
        run = todo[0]
        print(f"{len(done)} done; now {run.encoder}, {run.label}, seed {run.seed}", flush=True)
        record = train(run, load(run.dataset, args.data_dir), args.output / run.key, code=code)
        store.append(args.results, run, record)
        for checkpoint in (args.output / run.key).rglob("*.pt"):
            if run.losses() != 0 or checkpoint.name != BEST:  # independent members may meet in a mixed ensemble
                checkpoint.unlink()
        args.report.write_text(report(read(args.results)), encoding="utf-8")
        print(f"  {record['test']['ensemble']} in {record['wall_s']:.0f} s", flush=True)
    args.report.write_text(report(read(args.results)), encoding="utf-8")
    print(args.report)


if __name__ == "__main__":
    main()
