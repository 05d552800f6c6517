"""Train and measure RecBole, RecTools, RePlay and this library on the same files.

``python -m benchmarks.peers --data-dir DIR``. Each run has a process, an environment and one thread of its own, in
turn, and as many minutes of CPU for training as every other. A run that is there already is not done again, and one
that fails does not keep the others from theirs. The page is written last.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.peers import page, records
from benchmarks.peers.environments import ENVIRONMENTS, OURS, make, python
from benchmarks.peers.jobs import DATASETS, JOBS, SYNTHETIC, Job, by_name
from ensemble_kd.data import read_text, synthetic


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    p.add_argument("--data-dir", type=Path, help="folder of Beauty.txt and ML-1M.txt")
    p.add_argument("--datasets", nargs="+", choices=DATASETS, default=["Beauty"])
    p.add_argument("--only", nargs="+", default=[], metavar="NAME", help="runs of this name, or with it in theirs")
    p.add_argument("--minutes", type=float, default=20.0, help="of CPU, for the training of each run (20)")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument(
        "--environments", type=Path, default=Path("runs/peers/environments"), help="made if they are missing"
    )
    p.add_argument("--output", type=Path, default=Path("runs/peers"), help="folder of the runs")
    p.add_argument(
        "--results",
        type=Path,
        default=records.PATH,
        help="JSON lines; the page of others than the committed ones is written beside them",
    )
    p.add_argument("--page-only", action="store_true", help="train nothing")
    p.add_argument("--smoke", action="store_true", help="made-up data and small networks; the page goes to --output")
    args = p.parse_args(arguments)
    if args.smoke:
        args.datasets, args.results = [SYNTHETIC], args.output / "peers.jsonl"
    elif args.data_dir is None and not args.page_only:
        p.error("--data-dir is needed, but for --smoke and --page-only")
    args.jobs = chosen(args.only)
    if not args.jobs:
        p.error(f"no run has {' or '.join(args.only)} in its name: {', '.join(job.name for job in JOBS)}")
    return args


def chosen(names: Sequence[str]) -> list[Job]:
    """Return the jobs of these names, or those that have a name in theirs; all without names."""
    known = {job.name for job in JOBS}
    return [job for job in JOBS if not names or any(n == job.name or (n not in known and n in job.name) for n in names)]


def data_file(args: argparse.Namespace, dataset: str) -> Path:
    """Return the text file that every library reads; made-up data is written first."""
    if dataset != SYNTHETIC:
        return Path(args.data_dir, f"{dataset}.txt")
    path = Path(args.output, "synthetic.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = synthetic(num_users=200, num_items=100)
    (items, offsets), last = data.history("test"), data.target("test")
    lines = []
    for user, target in enumerate(last.tolist()):
        seen = items[offsets[user] : offsets[user + 1]].tolist()
        lines.append(" ".join(map(str, [user + 1, *seen, target])))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(job: Job, data: Path, args: argparse.Namespace, *, dataset: str, seed: int, minutes: float) -> Path:
    """Run a job in its environment, unless its folder has its results already, and return the folder.

    Raises:
        RuntimeError: the runner failed; its output is in the folder.
    """
    folder: Path = args.output.resolve() / job.key(dataset, seed, minutes)
    given = job.write(folder, data=data, dataset=dataset, minutes=minutes, seed=seed, small=args.smoke)
    if (folder / "account.json").exists():
        return folder
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    variables = {**os.environ, **one, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    if OURS in job.name:
        variables["PYTHONPATH"] = str(ROOT.parent)  # the working tree, which may be newer than what was installed
    command = [
        str(python(args.environments.resolve(), job.library)),
        str(job.runner),
        str(given),
    ]
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(command, cwd=folder, env=variables, stdout=log, stderr=log, check=False)
    if done.returncode:
        raise RuntimeError(f"{job.name} ended with {done.returncode}; see {folder / 'log.txt'}")
    return folder


def train(job: Job, data: Path, args: argparse.Namespace, *, dataset: str, seed: int) -> list[Path]:
    """Run a job, or the three runs whose scores it averages, in as many minutes, and return their folders."""
    if job.average is None:
        return [run(job, data, args, dataset=dataset, seed=seed, minutes=args.minutes)]
    part, minutes = by_name(job.average), args.minutes / 3
    return [run(part, data, args, dataset=dataset, seed=s, minutes=minutes) for s in range(3 * seed, 3 * seed + 3)]


def installed(jobs: Sequence[Job], folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the accounts of the environments that jobs need, and what went wrong with the others."""
    accounts, failed = {}, []
    for each in ENVIRONMENTS:
        if each.name in {job.library for job in jobs}:
            try:
                accounts[each.name] = make(each, folder)
            except RuntimeError as error:
                failed.append(f"{each.name} is left out: {error}")
                print(failed[-1], flush=True)
    return accounts, failed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the page. What fails is left out, and named when all the rest is done."""
    args = parse(arguments)
    accounts, failed = ({}, []) if args.page_only else installed(args.jobs, args.environments.resolve())
    for dataset in args.datasets if accounts else []:
        path = data_file(args, dataset)
        data = read_text(path)
        for job in [job for job in args.jobs if dataset in job.datasets and job.library in accounts]:
            for seed in args.seeds:
                done = {(e["name"], e["dataset"], e["seed"], e["minutes"]) for e in records.read(args.results)}
                if (job.name, dataset, seed, args.minutes) in done:
                    continue
                print(f"{dataset}, {job.name}, seed {seed}", flush=True)
                try:
                    folders = train(job, path, args, dataset=dataset, seed=seed)
                except RuntimeError as error:
                    failed.append(f"{dataset}, seed {seed}: {error}")
                    print(f"  {error}", flush=True)
                    continue
                found = records.record(
                    job, folders, data, accounts[job.library], dataset=dataset, seed=seed, minutes=args.minutes
                )
                records.append(records.with_batches(found, records.read(args.results)), args.results)
                print(f"  {found['test']}, best after {found['best']['cpu_s'] / 60:.1f} minutes", flush=True)
    folder = page.FOLDER if args.results == records.PATH else args.results.parent
    print(page.write(folder, records.read(args.results)))
    if failed:
        raise SystemExit("\n".join(["Not everything was run; the same command tries again.", *failed]))


if __name__ == "__main__":
    main()
