"""Run benchmarks by name: ``python -m benchmarks NAME [NAME ...] [--quick]``, or ``all``; without a name, list them.

Each appends a JSON line to ``benchmarks/results/``. On a shared machine ``OMP_WAIT_POLICY=passive`` keeps the threads
from spinning at barriers.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import NAMES, common


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all works; nothing is saved")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--data-dir", type=Path, help="folder of Beauty.txt and Beauty_item2attributes.json")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.names if name not in {*NAMES, "all"}]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}: choose from all, {', '.join(NAMES)}")
    if args.data_dir is not None:
        if not (args.data_dir / "Beauty.txt").is_file():
            parser.error(f"no Beauty.txt in {args.data_dir}")
        os.environ[common.DATA_DIR] = str(args.data_dir.resolve())
    if not args.names:
        print("\n".join(f"{name:<11}{what}" for name, what in NAMES.items()))
    for name in NAMES if "all" in args.names else args.names:
        machine = {**common.environment(), "data": common.data_of_beauty()}  # the load of others, before ours
        start = time.monotonic()
        rows = importlib.import_module(f"benchmarks.{name}").run(args.quick)
        seconds = time.monotonic() - start
        print(f"{name}: {NAMES[name]} ({seconds:.0f} s)\n{common.table(rows)}")
        print(
            ", ".join(f"{key}: {value}" for key, value in machine.items()), f"revision: {common.revision()}\n", sep=", "
        )
        if not (args.quick or args.no_save):
            common.save(name, rows, seconds, machine)


if __name__ == "__main__":
    main()
