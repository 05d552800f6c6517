"""Search for faults: ``python -m tests.faults --all``, or some of ``kills files calls threads``.

Prints what was counted and every fault found, and ends with 1 if there is one. ``--quick`` is the slice for every day.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from tests.faults import calls, damage, kills, threads

# search, its size in full, its size with --quick
SEARCHES = {
    "calls": (calls.run, 4000, 400),
    "threads": (threads.run, 2000, 60),
    "files": (damage.run, 1100, 130),
    "kills": (kills.run, 300, 6),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(SEARCHES)}")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--quick", action="store_true", help="a small part of each")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--count", type=int, help="size of the search in place of its own")
    args = parser.parse_args(arguments)
    unknown = set(args.names) - SEARCHES.keys()
    if unknown or not (args.names or args.all):
        parser.error(f"pass --all or some of {', '.join(SEARCHES)}")
    found = 0
    for name, (search, whole, quick) in SEARCHES.items():
        if not (args.all or name in args.names):
            continue
        started = time.monotonic()
        outcome = search(args.count or (quick if args.quick else whole), args.seed)
        found += len(outcome.faults)
        print(f"{outcome}\n  ({time.monotonic() - started:.0f} s)", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
