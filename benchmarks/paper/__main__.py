"""The paper's study: train what is missing, and write the report.

``python -m benchmarks.paper --data-dir FOLDER --scale cpu`` may be stopped at any moment and called again: finished
runs are kept, an unfinished one goes on from its last checkpoint, and several processes may share the work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import RESULTS, revision
from benchmarks.paper import report, store
from benchmarks.paper.recipes import DATASETS, Run, load
from benchmarks.paper.tables import runs, study
from benchmarks.paper.train import train

HERE = Path(__file__).parent


def cost(run: Run) -> float:
    """Computation of a run in units of its own encoder's epochs, for the estimate alone."""
    epochs = run.epochs + 2 * run.student_epochs  # whose steps read spliced sequences, too
    return epochs * run.n * run.views * run.d_model / 64 * (run.num_layers / 2)


def remaining_s(todo: Sequence[Run], done: Mapping[str, store.Record]) -> float | None:
    """Seconds that the runs will take, by what a unit of cost took on the same data, or on any; None: nothing known."""
    rates: dict[tuple[str, str], list[float]] = {}
    for record in done.values():
        run = Run(**record["run"])
        rates.setdefault((run.dataset, run.encoder), []).append(record["wall_s"] / cost(run))
    if not rates:
        return None
    usual = statistics.median(rate for found in rates.values() for rate in found)
    return sum(cost(run) * statistics.median(rates.get((run.dataset, run.encoder), [usual])) for run in todo)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    p.add_argument("--data-dir", type=Path, help="folder of Beauty.txt, ML-1M.txt and their attributes; not for smoke")
    p.add_argument("--scale", choices=("smoke", "cpu", "paper"), default="cpu", help="minutes, hours, or a GPU's days")
    p.add_argument("--datasets", nargs="+", choices=DATASETS, help="default: Beauty, and ML-1M at scale paper")
    p.add_argument("--only", nargs="+", default=[], metavar="TABLE", help="table1 table3 table4 table5 figure3 ...")
    p.add_argument("--report-only", action="store_true", help="train nothing")
    p.add_argument("--minutes", type=float, help="begin no run after so many")
    p.add_argument("--results", type=Path, help="JSON lines; default: benchmarks/results/paper_SCALE.jsonl")
    p.add_argument("--output", type=Path, default=Path("runs/paper"), help="folder of checkpoints and logs")
    p.add_argument("--report", type=Path, help="folder of REPORT.md and its plots; default: benchmarks/paper")
    args = p.parse_args(arguments)
    if args.scale == "smoke":
        args.datasets = ["synthetic"]
        args.results, args.report = args.results or args.output / "results.jsonl", args.report or args.output
    elif args.data_dir is None and not args.report_only:
        p.error("--data-dir is needed, but for --scale smoke and --report-only")
    elif args.scale == "cpu" and args.datasets not in (None, ["Beauty"]):
        p.error("the settings of scale cpu are Beauty's; for other data: python -m benchmarks.defaults")
    args.datasets = args.datasets or (["Beauty", "ML-1M"] if args.scale == "paper" else ["Beauty"])
    args.results = args.results or RESULTS / f"paper_{args.scale}.jsonl"
    args.report = args.report or HERE
    names = [table.name for table in study(args.scale, args.datasets)]
    unknown = [name for name in args.only if name not in names]
    if unknown:
        p.error(f"no table {', '.join(unknown)}: choose from {', '.join(dict.fromkeys(names))}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args, code, started = parse(arguments), revision(), time.monotonic()  # the files may change under a long study
    tables = study(args.scale, args.datasets, args.only)
    wanted = list(runs(tables))
    for run in [] if args.report_only else wanted:
        done = store.read(args.results)
        todo = [other for other in wanted if other.key not in done]
        if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
            break
        folder = args.output / run.key
        with store.taken(folder) as mine:
            if run.key in store.read(args.results) or not mine:
                continue
            left = remaining_s(todo, done)
            estimate = "" if left is None else f", about {left / 3600:.1f} hours of one process left"
            print(f"run {len(wanted) - len(todo) + 1} of {len(wanted)}: {run.key}{estimate}", flush=True)
            record = train(run, load(run.dataset, args.data_dir), folder, code=code)
            store.append(args.results, run, record)
            for checkpoint in folder.rglob("*.pt"):  # what the results keep is enough, and a study has many runs
                checkpoint.unlink()
            print(f"  {record['test']['ensemble']} in {record['wall_s']:.0f} s", flush=True)
    path = report.write(args.report, args.scale, tables, store.read(args.results))
    print(path)


if __name__ == "__main__":
    main()
