"""An environment of its own per peer: ``python -m benchmarks.peers.environments FOLDER``.

A peer pins old releases of NumPy, pandas and others, so that none of them shares an environment with another or with
this library. What ``pip check`` says is kept beside the sizes, in words.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).parent / "requirements"
ACCOUNT = "environment.json"
OURS = "ensemble_kd"


@dataclass(frozen=True)
class Environment:
    """What is installed: requirement files, in order; those in ``no_deps`` without what they ask for."""

    name: str
    package: str  # whose version is recorded
    files: tuple[str, ...]
    no_deps: tuple[str, ...] = ()


ENVIRONMENTS = (
    Environment("recbole", "recbole", ("recbole.txt",), ("recbole-no-deps.txt",)),
    Environment("rectools", "RecTools", ("rectools.txt",)),
    Environment("replay", "replay-rec", ("replay.txt",)),
    Environment(OURS, OURS, ("ensemble_kd.txt",)),
)


def python(folder: Path, name: str) -> Path:
    """Return the interpreter of an environment below a folder."""
    return folder / name / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def size_mib(folder: Path) -> float:
    """Return the MiB of a folder's files; a file that is linked twice counts once."""
    seen, total = set(), 0
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        found = path.stat()
        if (found.st_dev, found.st_ino) not in seen:
            seen.add((found.st_dev, found.st_ino))
            total += found.st_size
    return total / 2**20


def pip(interpreter: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pip of an environment, from the folder of the requirement files."""
    command = [str(interpreter), "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REQUIREMENTS)


def make(environment: Environment, folder: Path) -> dict[str, Any]:
    """Install an environment below a folder, if it is not there, and return its account: versions, size, seconds.

    Raises:
        RuntimeError: pip failed; the message ends with what it printed last.
    """
    place = folder / environment.name
    account = place / ACCOUNT
    if account.exists():
        return dict(json.loads(account.read_text(encoding="utf-8")))
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    interpreter, started = python(folder, environment.name), time.monotonic()
    empty = size_mib(place)
    steps = [(name, ()) for name in environment.files] + [(name, ("--no-deps",)) for name in environment.no_deps]
    for name, options in steps:
        done = pip(interpreter, "install", "--no-input", *options, "-r", name)
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise RuntimeError(f"pip install -r {name} failed in {place}:\n{last}")
    seconds = time.monotonic() - started
    checked = pip(interpreter, "check")
    listed = json.loads(pip(interpreter, "list", "--format", "json").stdout)
    versions = {each["name"]: each["version"] for each in listed}
    found = {
        "name": environment.name,
        "version": versions.get(environment.package, versions.get(environment.package.replace("_", "-"), "")),
        "versions": versions,
        "packages": len(versions),
        "seconds": round(seconds, 1),
        "mib": round(size_mib(place) - empty, 1),
        "torch_mib": round(sum(size_mib(each) for each in place.glob("lib/python*/site-packages/torch")), 1),
        "pip_check": checked.stdout.strip().splitlines(),
        "python": sys.version.split()[0],
    }
    account.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.environments", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=[each.name for each in ENVIRONMENTS], metavar="NAME")
    args = parser.parse_args(arguments)
    for environment in ENVIRONMENTS:
        if args.only and environment.name not in args.only:
            continue
        found = make(environment, args.folder.resolve())
        print(
            f"{found['name']} {found['version']}: {found['packages']} packages, {found['mib']:.0f} MiB, "
            f"{found['seconds']:.0f} s; pip check: {'; '.join(found['pip_check'])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
