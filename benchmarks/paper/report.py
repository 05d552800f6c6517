"""REPORT.md and its plots, from finished runs alone; what has not run, and claims with few seeds, are left out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.paper.analysis import AGGREGATES
from benchmarks.paper.claims import SEEDS, claims, tested, verdict
from benchmarks.paper.recipes import INDEPENDENT, Run
from benchmarks.paper.store import Record
from benchmarks.paper.tables import Row, Table, plain

Done = Mapping[str, Record]
METRIC = "NDCG@10"
GAINS, COST = "### Where transfer's gain goes", "### Cost"


def write(folder: Path, scale: str, tables: Sequence[Table], done: Done) -> Path:
    """REPORT.md in ``folder``, with plots where matplotlib is installed; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {run.key for table in tables for row in table.rows for run in row.runs}
    finished = [done[key] for key in wanted if key in done]
    lines = [
        f"# The paper's study, scale `{scale}`",
        "",
        f"Written by `python -m benchmarks.paper --scale {scale}` from {len(finished)} finished runs of {len(wanted)}.",
        "",
        *_protocol(finished),
    ]
    for dataset in dict.fromkeys(table.dataset for table in tables):
        own = [table for table in tables if table.dataset == dataset]
        lines += [f"## {dataset}", "", *_claims(own, done)]
        for table in own:
            if len({run.key for row in table.rows for run in row.runs if run.key in done}) > 1:
                lines += [f"### {table.title}", "", *_table(table, done), *_plot(table, done, folder)]
        lines += [*_members(own, done), *_transfer(own, done), *_curves(own, done, folder), *_cost(own, done)]
    path = folder / "REPORT.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


def _protocol(finished: Sequence[Record]) -> list[str]:
    said = sorted({record["protocol"] for record in finished})
    machines = sorted({f"{r['machine']['processor']}, torch {r['machine']['torch']}" for r in finished})
    return [
        "Test NDCG@10 of the ensemble (of the network, where it is one), mean over seeds ± their standard deviation;",
        'weights of the epoch with the best NDCG@10 on "validation", by which settings are compared, not by test.',
        '"members" is the mean over an ensemble\'s members on test.',
        '"window" is the protocol of the authors\' code, where only the items that the encoder reads are left out.',
        "The paper's numbers are as printed, with d = 256 and its own preprocessing: compare ratios, not values.",
        "p: paired bootstrap over users (10,000 resamples) of the difference's mean over the seeds that both have.",
        "Rates fall over a number of epochs that was chosen on validation, and products are in bfloat16 where a row",
        "does not say otherwise. `fit` by itself does neither: [what the defaults reach](defaults.md).",
        "",
        *[f"- {text}" for text in said],
        *[f"- {text}" for text in machines],
        "",
    ]


# ------------------------------------------------------------------------------------------------------------- tables


def _records(row: Row, done: Done) -> list[Record]:
    return [done[run.key] for run in row.runs if run.key in done]


def _ensembles(records: Sequence[Record]) -> list[float]:
    return [record["test"]["ensemble"][METRIC] for record in records]


def _members_means(records: Sequence[Record]) -> list[float]:
    return [
        statistics.mean(row[METRIC] for scorer, row in record["test"].items() if scorer != "ensemble")
        for record in records
    ]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, and how many.

    Examples:
        >>> spread([0.05]), spread([0.05, 0.06])
        ('.0500 (1)', '.0550 ± .0071 (2)')
    """
    mean = f"{statistics.mean(values):.4f}".lstrip("0")
    sd = f" ± {statistics.stdev(values):.4f}".replace("± 0", "± ") if len(values) > 1 else ""
    return f"{mean}{sd} ({len(values)})"


def _table(table: Table, done: Done) -> list[str]:
    lines = [
        "| | validation | members | ensemble (seeds) | over members | window | the paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (each for each in table.rows if _records(each, done)):
        records = _records(row, done)
        together, alone = _ensembles(records), _members_means(records)
        several = row.runs[0].n > 1
        cells = [
            row.label,
            spread([max(record["valid"]) for record in records]).partition(" ")[0],
            spread(alone).partition(" ")[0] if several else "",
            spread(together),
            f"{statistics.mean(together) / max(statistics.mean(alone), 1e-9) - 1:+.1%}" if several else "",
            f"{statistics.mean(r['window'] for r in records):.4f}".lstrip("0"),
            f"{row.published:.4f}".lstrip("0") if row.published is not None else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _claims(tables: Sequence[Table], done: Done) -> list[str]:
    lines = [
        "| claim | difference (95 %) | p | seeds where it holds | verdict |",
        "|---|---|---|---|---|",
    ]
    for claim in claims(tables):
        test = tested(claim, tables, done)
        if test is not None and test.seeds >= SEEDS:
            difference = f"{test.difference:+.4f} ({test.low:+.4f} … {test.high:+.4f})"
            cells = [claim.text, difference, f"{test.p:.4f}", f"{test.wins} of {test.seeds}", f"**{verdict(test)}**"]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""] if lines[2:] else ["No comparison has three seeds.", ""]


# ------------------------------------------------------------------------------------------------- members, and cost


def _members(tables: Sequence[Table], done: Done) -> list[str]:
    """How members differ and what averaging gains, for the ensembles of Table 4."""
    rows = [row for table in tables if table.name == "table4" for row in table.rows if row.runs[0].n > 1]
    rows = [row for row in rows if _records(row, done)]
    columns: dict[str, Callable[[Record], float]] = {
        "overlap of top 10": lambda r: r["members"]["jaccard@10"],
        "members' cross-entropy": lambda r: r["members"]["members_ce"],
        "ensemble's": lambda r: r["members"]["ensemble_ce"],
        "ambiguity": lambda r: r["members"]["ambiguity"],
        **{f"mean {how}": lambda r, how=how: r["members"][f"NDCG@10 of mean {how}"] for how in AGGREGATES},  # type: ignore[misc]
    }
    lines = [
        "### How members differ",
        "",
        "On test targets of 2,048 users. Members' mean cross-entropy is the ensemble's plus the ambiguity, exactly;",
        "overlap is Jaccard's. The last three are NDCG@10 by what is averaged over members.",
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for row in rows:
        records = _records(row, done)
        cells = [f"{statistics.mean(take(r) for r in records):.4f}" for take in columns.values()]
        lines.append(f"| {' | '.join([row.label, *cells])} |")
    return [*lines, ""] if rows else []


def _transfer(tables: Sequence[Table], done: Done) -> list[str]:
    """Each ensemble with transfer less the same without, as far as both are there: what members gain, what is lost."""
    columns: dict[str, Callable[[Record], float]] = {
        f"members' {METRIC}": lambda r: _members_means([r])[0],
        f"ensemble's {METRIC}": lambda r: _ensembles([r])[0],
        "overlap of top 10": lambda r: r["members"]["jaccard@10"],
        "members' cross-entropy": lambda r: r["members"]["members_ce"],
        "ambiguity": lambda r: r["members"]["ambiguity"],
        "ensemble's cross-entropy": lambda r: r["members"]["ensemble_ce"],
    }
    lines, seen = [], set()
    for row in (row for table in tables for row in table.rows):
        alone = [plain(replace(run, student_epochs=0, **INDEPENDENT)) for run in row.runs]
        pairs = [
            (done[run.key], done[other.key])
            for run, other in zip(row.runs, alone, strict=True)
            if run.n > 1 and run != other and run.key in done and other.key in done
        ]
        if pairs and row.runs[0].key not in seen:
            seen.add(row.runs[0].key)
            label = row.label if row.runs[0].encoder in row.label else f"{row.runs[0].encoder}, {row.label}"
            cells = [f"{statistics.mean(take(a) - take(b) for a, b in pairs):+.4f}" for take in columns.values()]
            lines.append(f"| {label} ({len(pairs)}) | {' | '.join(cells)} |")
    return [
        GAINS,
        "",
        "Each ensemble less the same one without transfer, each at its best epoch: mean over the seeds that both have",
        "(their number). What members gain in cross-entropy, less the ambiguity that is lost where they grow alike,",
        "is what the ensemble gains.",
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *lines,
        "",
    ]


def _cost(tables: Sequence[Table], done: Done) -> list[str]:
    lines = [COST, "", "| run | parameters | minutes of training | best epoch |", "|---|---|---|---|"]
    seen: set[str] = set()
    for table in tables:
        for row in table.rows:
            for run in row.runs[:1]:
                if run.key in done and run.key not in seen:
                    seen.add(run.key)
                    record = done[run.key]
                    minutes, epochs = sum(record["epoch_s"]) / 60, run.epochs + run.student_epochs
                    epoch = f"{record['best_epoch'] + 1} of {epochs}"
                    name = f"{run.encoder}: {row.label}"
                    lines.append(f"| {name} | {record['parameters'] / 1e6:.2f} M | {minutes:.1f} | {epoch} |")
    return [*lines, ""]


# -------------------------------------------------------------------------------------------------------------- plots


def _save(name: str, folder: Path, draw: Callable[..., None], what: str) -> list[str]:
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    draw(axes)
    figure.savefig(folder / f"{name}.png", dpi=120, metadata={"Software": None})  # the same file for the same numbers
    plt.close(figure)
    return [f"![{what}]({name}.png)", ""]


def _plot(table: Table, done: Done, folder: Path) -> list[str]:
    """Figure 3's and 4's points."""
    points = {row.label: statistics.mean(_ensembles(found)) for row in table.rows if (found := _records(row, done))}
    if table.name not in ("figure3", "figure4") or not points:
        return []

    def figure_3(axes: object) -> None:
        axes.barh(list(points), list(points.values()))  # type: ignore[attr-defined]
        axes.set(xlabel=f"test {METRIC}", xlim=(0.9 * min(points.values()), None))  # type: ignore[attr-defined]
        axes.invert_yaxis()  # type: ignore[attr-defined]

    def figure_4(axes: object) -> None:
        for encoder in dict.fromkeys(row.runs[0].encoder for row in table.rows):
            own = [row for row in table.rows if row.runs[0].encoder == encoder and row.label in points]
            found = sorted((row.runs[0].n, points[row.label]) for row in own if "independent" not in row.label)
            alone = [(row.runs[0].n, points[row.label]) for row in own if "independent" in row.label]
            if found:
                (line,) = axes.plot(*zip(*found, strict=True), marker="o", label=encoder)  # type: ignore[attr-defined]
                if alone:
                    axes.plot(*zip(*alone, strict=True), "x", color=line.get_color(), label=f"{encoder}, independent")  # type: ignore[attr-defined]
        axes.set(xlabel="members", ylabel=f"test {METRIC}", xticks=[1, 2, 3, 4])  # type: ignore[attr-defined]
        axes.legend()  # type: ignore[attr-defined]

    draw = figure_3 if table.name == "figure3" else figure_4
    return _save(f"{table.dataset}_{table.name}", folder, draw, table.title)


def _curves(tables: Sequence[Table], done: Done, folder: Path) -> list[str]:
    """Figure 5: validation over seconds of training, for one network, independent ones and EMKD."""
    rows = [row for table in tables if table.name == "table4" for row in table.rows]
    curves: dict[str, tuple[Run, Record]] = {
        row.label: (row.runs[0], done[row.runs[0].key])
        for row in rows
        if row.label.startswith(("(1)", "(5)", "(6)")) and row.runs[0].key in done
    }
    if not curves:
        return []

    def draw(axes: object) -> None:
        for label, (_, record) in curves.items():
            axes.plot(np.cumsum(record["epoch_s"]), record["valid"], marker=".", label=label)  # type: ignore[attr-defined]
        axes.set(xlabel="seconds of training", ylabel=f"validation {METRIC}")  # type: ignore[attr-defined]
        axes.legend()  # type: ignore[attr-defined]

    name = "Figure 5: accuracy over time"
    return [f"### {name}", "", *_save(f"{tables[0].dataset}_figure5", folder, draw, name)]
