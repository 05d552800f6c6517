"""The page on speed, from the last saved line of each benchmark: ``python -m benchmarks.summary``.

It writes between two markers, so that no figure there is anybody's handiwork, and draws ``results/speed.png``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import step
from benchmarks.common import RESULTS

PAGE = RESULTS.parents[1] / "docs" / "results" / "speed.md"
BEGIN, END = "<!-- speed: written by python -m benchmarks.summary -->", "<!-- speed: end -->"
Entry = Mapping[str, Any]


def last(name: str, folder: Path = RESULTS) -> Entry | None:
    """The newest saved line of a benchmark; None: it was never run in full."""
    path = folder / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else None


def pick(entry: Entry, **wanted: object) -> Entry:
    """The row that has these values."""
    return next(row for row in entry["rows"] if all(row.get(key) == value for key, value in wanted.items()))


def _loss(entry: Entry) -> list[str]:
    rows = [row for row in entry["rows"] if not str(row["variant"]).startswith("stored")]
    return [
        f"| item loss and KD, d = {row['d']}, {row['variant'].removeprefix('fused, ')} | {row['times_faster']:g} times "
        f"as fast as stored logits, {row['extra_mib']:g} MiB extra, {row['matmul_share']:.0%} of the matrix speed |"
        for row in rows
    ]


def _step(entry: Entry) -> list[str]:
    rows = [row for row in entry["rows"] if row["variant"] in step.VARIANTS[1:]]
    return [
        f"| training step, d = {row['d']}, {row['views']} views, {row['variant'].removeprefix('EnsembleKD, ')} | "
        f"{row['times_faster']:g} times as fast as the method as the paper writes it"
        + (
            f", {row['peak_mib'] / _reference(entry, row)['peak_mib']:.0%} of its memory |"
            if "peak_mib" in row
            else " |"
        )
        for row in rows
    ]


def _reference(entry: Entry, row: Entry) -> Entry:
    return pick(entry, d=row["d"], views=row["views"], times_faster=1.0)


def _members(entry: Entry) -> list[str]:
    rows = [(row, "") for row in entry["rows"] if row.get("auto") and row["n"] > 1]
    rows += [(row, ", compiled by torch.compile") for row in entry["rows"] if row["variant"] == "loop, compiled"]
    return [
        f"| {row['n']} members, d = {row['d']}{how} | {row['times_alone']:g} times one network alone, "
        f"{row['times_separate']:g} times {row['n']} separate modules |"
        for row, how in rows
    ] + [
        f"| {row['n']} members of {kinds.replace(' + ', ', ')} in one ensemble, d = {row['d']} | "
        f"{row['times_separate']:g} times three models of one member each, a whole step |"
        for row in entry["rows"]
        if (kinds := row["variant"].removesuffix(", mixed")) != row["variant"]
    ]


def _evaluate(entry: Entry) -> list[str]:
    most = max(row["users"] for row in entry["rows"])
    row = pick(entry, users=most, variant="count, float32")
    return [f"| ranking {most:,} users × {row['v']:,} items, 3 members | {row['median_ms'] / 1e3:.1f} s |"]


def _epoch(entry: Entry) -> list[str]:
    (row,) = entry["rows"]
    return [f"| an epoch of BERT4Rec on Beauty, n = 3, d = {row['d']}, {row['views']} views | {row['epoch_s']:.0f} s |"]


def _scaling(entry: Entry) -> list[str]:
    rows = [row for row in entry["rows"] if row["variant"] == "sampled"]
    most = max(rows, key=lambda row: row["v"])
    return [
        f"| a step with negatives = {most['negatives']} at {most['v']:,} items | {most['times_base']:g} times one at "
        f"{min(row['v'] for row in rows):,} items |"
    ]


def _serving(entry: Entry) -> list[str]:
    return [
        f"| {row['variant']} | {row['p50_ms']:g} ms a request (p99 {row['p99_ms']:g}), {row['requests_per_s']:,.0f} "
        "requests a second in batches |"
        for row in entry["rows"]
    ]


def _threads(entry: Entry) -> list[str]:
    return [
        f"| small requests of {row['threads']} threads on one model | {row['times_one_thread']:g} times as many "
        "a second as of one |"
        for row in entry["rows"]
        if row["threads"] > 1
    ]


SECTIONS: dict[str, Callable[[Entry], list[str]]] = {
    "loss": _loss,
    "step": _step,
    "step_wide": _step,
    "members": _members,
    "scaling": _scaling,
    "evaluate": _evaluate,
    "epoch": _epoch,
    "serving": _serving,
    "threads": _threads,
}


def section(folder: Path = RESULTS) -> str:
    """The Markdown between the markers."""
    lines, machines, revisions = ["| what | measured |", "|---|---|"], set(), set()
    for name, rows in SECTIONS.items():
        entry = last(name, folder)
        if entry is not None:
            lines += rows(entry)
            machine = entry["machine"]
            machines.add(f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}")
            revisions.add(entry["revision"])
    limits = last("limits", folder)
    if limits is not None:
        speeds = {row["limit"]: row for row in limits["rows"]}
        lines += [
            f"| {name} (what this machine can do) | {speeds[name]['best']:g} {speeds[name]['unit']} |"
            for name in ("product, inner 64, float32", "product, inner 64, bfloat16", "product, inner 256, bfloat16")
        ]
    told = f"Medians, both sides in turn, on {'; '.join(sorted(machines))}; revisions {', '.join(sorted(revisions))}."
    return "\n".join([*lines, "", told])


def rewritten(page: str, text: str) -> str:
    """Return the page with ``text`` between the markers.

    Examples:
        >>> rewritten(f"a\\n{BEGIN}\\nold\\n{END}\\nb", "new") == f"a\\n{BEGIN}\\nnew\\n{END}\\nb"
        True
    """
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def draw(path: Path, folder: Path = RESULTS) -> None:
    """Three panels: the loss, the cost of members, a step over the catalogue."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    loss, members, scaling = (last(name, folder) for name in ("loss", "members", "scaling"))
    if loss is not None:
        for d in sorted({row["d"] for row in loss["rows"]}):
            rows = [row for row in loss["rows"] if row["d"] == d and row["times_faster"] != 1]
            left.barh([f"{row['variant']}, d={d}" for row in rows], [row["times_faster"] for row in rows])
        left.set(xlabel="times as fast as stored logits")
    if members is not None:
        for backend in ("loop", "vmap", "separate"):
            rows = [row for row in members["rows"] if row["variant"] == backend and row["d"] == 64]
            middle.plot([row["n"] for row in rows], [row["times_alone"] for row in rows], marker="o", label=backend)
        middle.set(xlabel="members", ylabel="times one network alone")
        middle.legend()
    if scaling is not None:
        for variant in ("sampled", "full"):
            rows = [row for row in scaling["rows"] if row["variant"] == variant]
            right.plot([row["v"] for row in rows], [row["median_ms"] for row in rows], marker="o", label=variant)
        right.set(xlabel="items", ylabel="ms a step", xscale="log", yscale="log")
        right.legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), section()), encoding="utf-8")
    draw(RESULTS / "speed.png")
    print(section())


if __name__ == "__main__":
    main()
