"""What members should pass on: each formula beside independent members, SASRec and GRU4Rec on Beauty.

``python -m benchmarks.transfer --data-dir FOLDER`` may be stopped at any moment and called again. Three networks of
``presets.recipe`` are trained by ``fit`` with nothing else given. What is looked for helps both encoders. So each
formula is tried with GRU4Rec at a middle strength; if validation of the ensemble is better by it than with independent
members, also at two more, and whatever helped, with SASRec. A teacher may do what dropout did, so that KD is tried with
less dropout, too, and beside it independent members with as little. It may also do what averaged weights do, so that KD
is tried with a rate that falls in place of them, over as many epochs as independent members take, and twice as many.
Members that teach each other from the beginning grow alike, so that KD is tried of members trained apart, too, and
students: three new members that learn from the ensemble of three trained before, or of these and the three of the other
encoder, which knows more. What is best on validation of both, seed 0, is tried with fresh seeds. What
``benchmarks.defaults`` has trained is not trained again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import RESULTS
from benchmarks.paper.recipes import load
from benchmarks.trials import FORMULAS, Record, Trial, append, members, overlap, paired, read, score, train

REPORT = Path(__file__).parent.parent / "docs" / "results" / "transfer.md"
ENCODERS = ("GRU4Rec", "SASRec")  # the first takes less time
STRENGTHS: dict[str, tuple[float, float, float]] = {  # the first is tried first
    "target": (3.0, 1.0, 10.0),
    "ambiguity": (-0.5, -0.25, -0.75),
    "distillation": (0.5, 0.25, 1.0),
    "spliced": (1.0, 0.3, 3.0),
    "KD": (1.0, 0.3, 3.0),
    "better": (1.0, 0.3, 3.0),
    "ema": (1.0, 0.3, 3.0),
    "students": (10.0, 3.0, 30.0),
    "mixed": (10.0, 3.0, 30.0),
}
LEARNERS = {"students": ", students", "mixed": ", students of both encoders"}
LESS = 0.1  # dropout, where the recipes have 0.3
SHORT, LONG = 10, 20  # epochs of a falling rate; independent members are best after 6 to 10, of either encoder
LATE = 6  # epoch from which members that differ already, and are near their best, teach each other


class Setting(NamedTuple):
    """What is compared, for either encoder; of strength 0, independent members."""

    formula: str = "KD"
    strength: float = 0.0
    dropout: float | None = None  # in place of the recipe's
    cosine: int = 0  # epochs of a falling rate; 0: averaged weights, as by default
    start: int | None = None  # epoch from which the formula counts; None: the second


BESIDES = (
    Setting("spliced", 1.0, LESS),
    Setting("KD", 1.0, LESS),
    Setting(dropout=LESS),
    Setting("KD", 1.0, start=LATE),
    Setting("KD", 1.0, cosine=SHORT),
    Setting("KD", 1.0, cosine=LONG),
    Setting(cosine=SHORT),
)
Done = Mapping[Trial, Record]


def attempt(encoder: str, *setting: Any, seed: int = 0, **more: Any) -> Trial:
    """Three members of an encoder; ``setting`` and ``more``: those of a ``Setting``."""
    found = Setting(*setting, **more)
    return Trial(
        "Beauty", encoder, 3, kd=found.strength, formula=found.formula, dropout=found.dropout, cosine=found.cosine,
        start=found.start, seed=seed,
    )  # fmt: skip


def settings() -> list[Setting]:
    """Return all that is compared with independent members by default."""
    usual = [Setting(formula, strength) for formula, strengths in STRENGTHS.items() for strength in strengths]
    return [*usual, *BESIDES]


def finished(records: Sequence[Record]) -> Done:
    """Return the record of each attempt, the first one of several."""
    return {Trial(**r["trial"]): r for r in reversed(records) if "trial" in r}


def gain(done: Done, trial: Trial) -> float | None:
    """Return by how much validation of the ensemble is above that of independent members; None: not known yet."""
    alone = attempt(trial.encoder, seed=trial.seed)
    if trial not in done or alone not in done:
        return None
    return float(max(done[trial]["valid"]) - max(done[alone]["valid"]))


def helps(done: Done, trial: Trial) -> bool:
    """True if an attempt is known to be better than independent members."""
    found = gain(done, trial)
    return found is not None and found > 0


def winner(done: Done) -> Setting | None:
    """Return the setting whose worse gain of the two encoders is the greatest; None: none helps both."""
    worse: dict[Setting, float] = {}
    for setting in settings():
        gains = [gain(done, attempt(encoder, *setting)) for encoder in ENCODERS]
        known = [each for each in gains if each is not None and each > 0]
        if len(known) == len(ENCODERS):
            worse[setting] = min(known)
    return max(worse, key=lambda found: worse[found]) if worse else None


def wanted(done: Done, seeds: int) -> Iterator[Trial]:
    """All attempts that what is done asks for, the most telling first."""
    quick, slow = ENCODERS
    yield from (attempt(encoder) for encoder in ENCODERS)
    for formula, (middle, *_) in STRENGTHS.items():
        yield attempt(quick, formula, middle)
    yield from (attempt(encoder, *each) for each in BESIDES for encoder in ENCODERS)
    for formula, (middle, *more) in STRENGTHS.items():
        tried = [middle, *more] if helps(done, attempt(quick, formula, middle)) else []
        for strength in tried:
            yield attempt(quick, formula, strength)
            if helps(done, attempt(quick, formula, strength)):
                yield attempt(slow, formula, strength)
    best = winner(done)
    for seed in range(1, seeds if best else 1):
        for encoder in ENCODERS:
            yield from (attempt(encoder, seed=seed), attempt(encoder, *(best or ()), seed=seed))


def line(setting: Setting, records: Sequence[Record], alone: Mapping[int, Record]) -> str:
    """A row of the table: means over seeds, and tests paired by user against independent members of the same seeds."""
    own = {r["trial"]["seed"]: r for r in records}
    losses = f"`{setting.strength:g} * {FORMULAS[setting.formula]!r}`" if setting.strength else "independent"
    losses += "" if setting.dropout is None else f", dropout {setting.dropout:g}"
    losses += LEARNERS.get(setting.formula, "") if setting.strength else ""
    losses += f", the rate falls over {setting.cosine} epochs" if setting.cosine else ""
    losses += f", from epoch {setting.start} on" if setting.start else ""
    cells = [losses, str(len(records))]
    cells += [f"{statistics.mean(r['best_epoch'] + 1 for r in records):.0f}"]
    cells += [f"{statistics.mean(r['minutes'] for r in records):.0f}"]
    cells += [f"{statistics.mean(max(r['valid']) for r in records):.4f}"]
    for of_members in (True, False):
        cells.append(f"{statistics.mean((members if of_members else score)(r) for r in records):.4f}")
        test = None if setting == Setting() else paired(own, alone, members=of_members)
        cells.append("" if test is None else f"{test.difference:+.4f} (p = {test.p:.4f})")
    cells.append(f"{statistics.mean(map(overlap, records)):.3f}")
    return f"| {' | '.join(cells)} |"


def beside(own: Sequence[Record], records: Sequence[Record], encoder: str) -> dict[int, Record]:
    """Return independent members by seed, of those that ran more than once the ones of the same make of machine.

    On another one numbers differ in the last bit, and of two epochs that are nearly equal the other may be the best.
    """
    makes = {r["trial"]["seed"]: r["machine"]["processor"] for r in own}
    found: dict[int, Record] = {}
    for r in records:
        seed = r["trial"]["seed"]
        if seed not in makes or Trial(**r["trial"]) != attempt(encoder, seed=seed):
            continue
        if seed not in found or r["machine"]["processor"] == makes[seed]:
            found[seed] = r
    return found


def report(records: Sequence[Record], seeds: int) -> str:
    """All attempts in one table per encoder; what has not run is not there."""
    records = [r for r in records if "trial" in r]
    done = finished(records)
    lines = [
        "# What members should pass on",
        "",
        "*Written by `python -m benchmarks.transfer --report-only`.*",
        "",
        "Beauty, three networks of `presets.recipe`, `fit` with nothing else given but the losses. NDCG@10, history",
        "excluded; differences from independent members of the same seeds (and make of machine, if on two),",
        "p by a bootstrap paired by user. Formulas are chosen by validation; with one seed a difference on test is no",
        "claim. Overlap: of the users whose item is among the ten best of one of two members, the share for whom it is",
        "among those of both. Minutes of one thread, on machines that were shared with other runs. A formula is looked",
        "for that helps both encoders, so that SASRec is trained where GRU4Rec gained on validation. Dropout is the",
        f"recipe's, 0.3, but where {LESS} is named; and weights are averaged, as by default, but where a rate falls.",
        "Students learn from the ensemble of the independent members of the same seed, as by",
        "`distill(ensemble, encoder_fn, data, n=3, spliced=False)`; students of both encoders from the independent",
        "SASRec and GRU4Rec in one ensemble, by `join` and `calibrate`. Their minutes come on top of their teachers'.",
        "",
    ]
    for encoder in ENCODERS:
        alone = {
            seed: done[attempt(encoder, seed=seed)] for seed in range(seeds) if attempt(encoder, seed=seed) in done
        }
        if not alone:
            continue
        lines += [
            f"## {encoder}",
            "",
            "| losses | seeds | best epoch | minutes | validation | members | against independent | ensemble |"
            " against independent | overlap |",
            "| --- " * 10 + "|",
            line(Setting(), list(alone.values()), alone),
        ]
        for setting in settings():
            tried = [attempt(encoder, *setting, seed=seed) for seed in range(seeds)]
            if found := [done[trial] for trial in tried if trial in done]:
                lines.append(line(setting, found, beside(found, records, encoder)))
        lines.append("")
    missing = [trial for trial in wanted(done, seeds) if trial not in done]
    lines += [f"Attempts that are still to run: {len(missing)}.", ""]
    machines = sorted({f"{r['machine']['processor']}, torch {r['machine']['torch']}" for r in done.values()})
    return "\n".join([*lines, *[f"- {text}" for text in machines]]).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    p.add_argument("--data-dir", type=Path, help="folder of Beauty.txt")
    p.add_argument("--results", type=Path, default=RESULTS / "transfer.jsonl", help="JSON lines")
    p.add_argument("--known", type=Path, default=RESULTS / "defaults.jsonl", help="of benchmarks.defaults, read only")
    p.add_argument("--output", type=Path, default=Path("runs/transfer"), help="folder of checkpoints and logs")
    p.add_argument("--report", type=Path, default=REPORT)
    p.add_argument("--encoders", nargs="+", default=ENCODERS, choices=ENCODERS, help="train these, maybe beside others")
    p.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    p.add_argument("--seeds", type=int, default=4, help="of what wins on validation of seed 0; 1: none but that")
    p.add_argument("--report-only", action="store_true", help="train nothing")
    args, started = p.parse_args(arguments), time.monotonic()
    if args.data_dir is None and not args.report_only:
        p.error("--data-dir is needed, but for --report-only")
    while not args.report_only and time.monotonic() - started < 60 * args.minutes:
        done = finished([*read(args.known), *read(args.results)])
        open_ones = (each for each in wanted(done, args.seeds) if each not in done and each.encoder in args.encoders)
        trial = next(open_ones, None)
        if trial is None:
            break
        print(trial.key, flush=True)
        record = train(trial, load(trial.dataset, args.data_dir), args.output / trial.key)
        append(args.results, record)
        print(f"  {record['test']['ensemble']}, {record['minutes']} minutes", flush=True)
    args.report.write_text(report([*read(args.known), *read(args.results)], args.seeds), encoding="utf-8")
    print(args.report)


if __name__ == "__main__":
    main()
