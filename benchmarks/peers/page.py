"""The page about the peers, from the records alone: ``docs/results/peers.md`` and its curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import ROOT
from benchmarks.paper.analysis import ndcg, paired_bootstrap
from benchmarks.paper.store import unpack
from benchmarks.peers.records import Record, with_batches

FOLDER = ROOT.parent / "docs" / "results"
OURS = "ensemble_kd SASRec"
NARROW = f"{OURS}, width 64"  # as wide as the peers' networks
SHORT = f"{NARROW}, 50 items"  # and with the peers' targets, where the recipe reads more
NAME = "peers.md"
Row = Sequence[object]

HEAD = """\
# Side by side with RecBole, RecTools and RePlay

*Written by `python -m benchmarks.peers --page-only` from `benchmarks/results/peers.jsonl`. Do not edit it.*

Every library reads the same text file and the same leave-one-out split, in an environment of its own, and trains by
its own means with settings that it publishes. The evaluation is ours for all of them: the scores of all items are taken
from the trained model and ranked with `exclude="history"`. Validation picks the state that is tested, and the test is
ranked once. Every run has one thread and the same minutes of CPU for training; validation does not count. It takes
place at every sixth of the budget and after every epoch, by the NDCG@10 of the same 2,048 users.
"""
FOOT = """\
## How to run it

```bash
python -m benchmarks.peers --data-dir FOLDER --minutes 20 --datasets Beauty ML-1M
```

installs each library from its registry into an environment of its own (pinned in `benchmarks/peers/requirements`),
trains what is missing, and writes this page. `--only "RecTools BERT4Rec"` trains one of them, `--seeds 0 1 2` more of
each.

- *Settings* are those that the library's own repository publishes. RecBole's search has .0003 as the best rate for
  SASRec on Amazon-Books (NDCG@10 .1131 there); .001 (.1110 there) stands here, because it learns faster within minutes.
  RecTools' own benchmark uses networks 256 wide that read 100 items; the 64 wide ones of its training guide stand here.
  RePlay's defaults are 192 wide; 64 stand here. RecBole 1.2.1 switches torch's anomaly detection on when its models are
  imported, which takes a third of the time of its own steps; it is off here.
- *Lines a user writes* are those of the functions that the runners (`benchmarks/peers/runners`) call user code: data,
  model, training. The clock and the measurements are not counted.
- *A request* is one user's, by the library's own way to recommend ten items: for RecTools `model.recommend`, which
  looks the user up in a data frame; for RecBole the steps of `full_sort_topk` from the user's items; for RePlay the
  logits of its model's `forward` from the user's items; here `model.recommend`.
- *Many users* are 2,048, in blocks of 512.
- *Peak memory* is the process's, with the library itself and the data.
"""
WARNING = """\
**Read the budget first.** Minutes of one thread show how far each library gets on a laptop, and nothing about what its
network reaches in the end. Where a run ended within its first epochs, its accuracy says that it is slow, and not that
its network is weak.
"""


def cpu_s_of_epoch(each: Record) -> float | None:
    """Return CPU seconds of an epoch: the mean of whole ones, or by the share of one that was done; None: unknown.

    Examples:
        >>> cpu_s_of_epoch({"epoch_cpu_s": [4.0, 2.0]})
        3.0
        >>> training = {"seconds_of_training": {"cpu": 60.0}, "curve": [{"steps": 30}], "batches": 120}
        >>> cpu_s_of_epoch({"epoch_cpu_s": [], **training})
        240.0
    """
    if each["epoch_cpu_s"]:
        return float(np.mean(each["epoch_cpu_s"]))
    if not each.get("batches") or not each["curve"]:
        return None
    return float(each["seconds_of_training"]["cpu"] / each["curve"][-1]["steps"] * each["batches"])


def epochs_done(each: Record) -> float:
    """Return the passes over the data within the budget, with the share of the last."""
    return (
        float(each["curve"][-1]["steps"] / each["batches"])
        if each.get("batches") and each["curve"]
        else float(each["epochs"])
    )


class Measure(NamedTuple):
    """A number of a record that is compared: its words, whether more is better, and why a peer may be ahead.

    ``of_size``: it grows with the network's width and the length of what it reads. ``of_machine``: numbers of two
    makes of machine say nothing about two libraries.
    """

    words: str
    of: Callable[[Record], float | None]
    more: bool
    digits: int
    reason: str
    of_size: bool = False
    of_machine: bool = False


MEASURES = (
    Measure("test NDCG@10", lambda e: e["test"]["NDCG@10"], True, 4, "it learned more within the budget"),
    Measure("test HR@10", lambda e: e["test"]["HR@10"], True, 4, "it learned more within the budget"),
    Measure(
        "CPU seconds an epoch",
        cpu_s_of_epoch,
        False,
        1,
        "its feed-forward net is smaller (RePlay's has d in place of 4 d), or it scores sampled items in place of all",
        True,
        True,
    ),
    Measure(
        "peak memory of training, MiB",
        lambda e: e["peak_mib"],
        False,
        0,
        "",
        True,
    ),
    Measure(
        "CPU milliseconds a request",
        lambda e: e["serving"]["request_cpu_ms"],
        False,
        2,
        "ours has positions by distance, and checks what it is given",
        True,
        True,
    ),
    Measure(
        "users a CPU second, recommending to many",
        lambda e: e["serving"]["users_per_cpu_s"],
        True,
        0,
        "ours has positions by distance",
        True,
        True,
    ),
    Measure("lines that a user writes", lambda e: e["lines"], False, 0, "its data class reads the table as it is"),
    Measure("MiB installed, without torch", lambda e: _without_torch(e), False, 0, "it needs less"),
    Measure(
        "seconds of installation",
        lambda e: e["installed"]["seconds"],
        False,
        0,
        "it needs less, or a busy machine",
        of_machine=True,
    ),
)


def _without_torch(each: Record) -> float:
    return float(each["installed"]["mib"] - each["installed"]["torch_mib"])


def markdown(head: Row, rows: Sequence[Row]) -> str:
    """Return a table; the first column stands left, numbers right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def one_of_ours(found: Sequence[Record]) -> Record | None:
    """Return the run of one network of ours that the others are compared with; None: there is none."""
    by_name = {each["name"]: each for each in found}
    return by_name.get(OURS) or by_name.get(NARROW)


def summary(found: Sequence[Record]) -> str:
    """Return a sentence: what one network of ours and the best of each peer have within the budget."""
    mine = [each for each in found if each["name"] in (NARROW, OURS)]
    peers = [each for each in found if "ensemble_kd" not in each["name"]]
    best = [max((e for e in peers if e["library"] == name), key=lambda e: e["test"]["NDCG@10"])
            for name in dict.fromkeys(each["library"] for each in peers)]  # fmt: skip
    said = [
        f"{each['name']} {each['test']['NDCG@10']:.4f} (best validation after {each['best']['cpu_s'] / 60:.1f} minutes,"
        f" {epochs_done(each):.1f} epochs{ended(each)})"
        for each in (*mine[:1], *best)
    ]
    return f"NDCG@10 on test: {'; '.join(said)}.\n" if mine and best else ""


def ended(each: Record) -> str:
    """Return words for a run of ``fit`` that ended by itself within the budget."""
    used = each["seconds_of_training"]["cpu"] / 60
    return f"; it ended by itself after {used:.1f}" if used < 0.95 * each["minutes"] else ""


def accuracy(found: Sequence[Record], everything: Sequence[Record]) -> str:
    """Return the table of accuracy, each paired by user with one network of ours."""
    ours = one_of_ours(found)
    rows: list[Row] = []
    for each in sorted(found, key=lambda each: -each["test"]["NDCG@10"]):
        against = ""
        if ours is not None and each is not ours:
            against = difference([each], [ours])
        best, minutes = each["best"], teacher_minutes(each, everything)
        also = f" + {minutes:.1f} of the teacher" if minutes else ""
        rows.append(
            (
                each["name"],
                f"{each['test']['NDCG@10']:.4f}",
                f"{each['test']['HR@10']:.4f}",
                against,
                f"{epochs_done(each):.2f}",
                f"{best['cpu_s'] / 60:.1f}{also}",
                f"{best['wall_s'] / 60:.1f}",
            )
        )
    head = (
        "",
        "NDCG@10",
        "HR@10",
        f"NDCG@10 against {ours['name'] if ours else OURS} (95 %)",
        "epochs in the budget",
        "CPU minutes to the best validation",
        "wall-clock minutes",
    )
    return markdown(head, rows)


def difference(own: Sequence[Record], others: Sequence[Record]) -> str:
    """Return by how much runs are better than others of the same seeds, paired by user."""
    test = paired_bootstrap(*(np.stack([ndcg(unpack(e["ranks"])) for e in group]) for group in (own, others)))
    return f"{test.difference:+.4f} ({test.low:+.4f} to {test.high:+.4f}), p = {test.p:.4f}"


def around(found: Sequence[Record]) -> str:
    """Return sentences: what three networks of a peer have as encoders of ours, and trained by the peer one by one."""
    by_name, lines = {each["name"]: each for each in found}, []
    for peer in ("RecBole", "RecTools"):
        together, apart = (by_name.get(f"{peer} SASRec, three {how}") for how in ("under ensemble_kd", "separate"))
        if together and apart:
            (a, m), (b, n) = ((e["test"]["NDCG@10"], e["best"]["cpu_s"] / 60) for e in (together, apart))
            lines.append(
                f"Three networks of {peer} under `EnsembleKD` have {a:.4f} after {m:.1f} minutes, three that {peer}"
                f" trained, with their scores averaged, {b:.4f} after {n:.1f}: {difference([together], [apart])}."
            )
    return "\n".join(lines) + "\n" if lines else ""


def teacher_minutes(each: Record, everything: Sequence[Record]) -> float:
    """Return the CPU minutes of training of the run whose networks taught this one, 0 without."""
    teachers = [
        e
        for e in everything
        if e["name"] == each.get("after") and all(e[k] == each[k] for k in ("dataset", "seed", "minutes"))
    ]
    return float(teachers[0]["seconds_of_training"]["cpu"] / 60) if teachers else 0.0


def costs(found: Sequence[Record]) -> str:
    """Return the table of costs."""
    rows: list[Row] = []
    for each in found:
        seconds = cpu_s_of_epoch(each)
        of_one = "" if seconds is None else f"{seconds:.0f}" + ("" if each["epoch_cpu_s"] else " (from a part)")
        rows.append(
            (
                each["name"],
                f"{each['parameters']:,}",
                of_one,
                f"{each['peak_mib']:.0f}",
                f"{each['serving']['request_cpu_ms']:.2f}",
                f"{each['serving']['users_per_cpu_s']:.0f}",
                each["lines"],
            )
        )
    head = (
        "",
        "parameters",
        "CPU s an epoch",
        "peak MiB",
        "CPU ms a request",
        "users a CPU s",
        "lines a user writes",
    )
    return markdown(head, rows)


def installs(found: Sequence[Record]) -> str:
    """Return the table of what each library needs."""
    rows: list[Row] = []
    for each in {each["library"]: each for each in found}.values():
        account = each["installed"]
        name = f"{each['library']} {each['version']}"
        checked = "; ".join(account["pip_check"]) or "nothing"
        seconds = [one["installed"]["seconds"] for one in found if one["library"] == each["library"]]
        took = " to ".join(dict.fromkeys(f"{s:.0f}" for s in (min(seconds), max(seconds))))
        rows.append((name, account["packages"], f"{_without_torch(each):.0f}", took, f"`{checked}`"))
    return markdown(("", "packages", "MiB without torch", "seconds, by machine", "`pip check` says"), rows)


def settings(found: Sequence[Record]) -> str:
    """Return the settings of each run and where they stand."""
    rows = []
    for each in found:
        said = ", ".join(f"{name}={value}" for name, value in each["settings"].items())
        rows.append((each["name"], f"`{said}`" if said else "", each["source"]))
    return markdown(("", "settings", "from"), rows)


def likely(measure: Measure, ours: Record) -> str:
    """Return why a peer may be ahead of a run of ours."""
    wide, long = ours["name"] == OURS, ours["dataset"] == "ML-1M"
    parts = [measure.reason] if measure.reason else []
    if measure.of_size:
        parts += ["ours reads 200 items where the others read 50"] if long else []
        parts += ["ours is 128 wide where no width is named"] if wide else []
    return "; ".join(parts) or "not known"


def ahead(found: Sequence[Record]) -> list[str]:
    """Return a line for each number in which a peer is ahead of one network of ours, with the reason."""
    by_name = {each["name"]: each for each in found}
    ours, lines = one_of_ours(found), list[str]()
    if ours is None:
        return lines
    for measure in MEASURES:
        mine = measure.of(ours)
        for each in found:
            theirs = measure.of(each)
            if ours["library"] in each["name"] or mine is None or theirs is None:
                continue
            if measure.of_machine and place(each) != place(ours):
                continue
            if (theirs > mine) if measure.more else (theirs < mine):
                digits = measure.digits
                numbers = f"{mine:.{digits}f}"
                for name, said in ((NARROW, "width 64"), (SHORT, "width 64, 50 items")):
                    other = by_name.get(name)
                    if other and other is not ours and (value := measure.of(other)) is not None:
                        numbers += f" and {value:.{digits}f} ({said})"
                lines.append(
                    f"- {measure.words}: **{each['name']}** {theirs:.{digits}f}, ours {numbers}."
                    f" Likely reason: {likely(measure, ours)}."
                )
    return lines


def speed(found: Sequence[Record]) -> str:
    """Return sentences: CPU seconds of an epoch of the peers over ours, at equal width and over all items.

    What ran on two makes of machine is not compared.
    """
    seconds = {each["name"]: s for each in found if (s := cpu_s_of_epoch(each)) is not None}
    places = {each["name"]: place(each) for each in found}

    def beside(one: str) -> dict[str, float]:
        known = (name for name in ("RecBole SASRec", "RecTools SASRec, softmax", "RePlay SASRec") if name in seconds)
        return {name: seconds[name] for name in known if one in seconds and places[name] == places[one]}

    lines = []
    if theirs := beside(NARROW):
        mine = seconds[NARROW]
        said = "; ".join(f"{name} {s:.0f} s ({s / mine:.1f} times as long)" for name, s in theirs.items())
        lines.append(
            f"SASRec 64 wide, with the full softmax over all items, takes {mine:.0f} s of CPU an epoch here, {said}."
            " RecBole cuts a row for each target, and so reads a history again for each of its items. RecTools and"
            " RePlay predict at every position in one pass, as this library does, but compute the padding of short"
            " histories, too."
        )
        if found[0]["dataset"] == "ML-1M":
            lines.append(
                "An epoch is not the same here: by its recipe this library reads 200 items and has each of the 982,089"
                " items with one before it for a target; by their published settings the others read 50 items, and"
                " RecTools and RePlay have the newest 50 of each user for targets, 266,086 in all."
            )
            equal = {name: s / seconds[SHORT] for name, s in beside(SHORT).items() if "RecBole" not in name}
            if equal:
                said = ", ".join(f"{name} {ratio:.1f} times" for name, ratio in equal.items())
                lines.append(
                    f"With the same 50 items and targets as theirs an epoch takes {seconds[SHORT]:.0f} s here: {said}"
                    " as long."
                )
    for peer, one in (("RecBole", "RecBole SASRec"), ("RecTools", "RecTools SASRec, softmax")):
        ensemble = f"{peer} SASRec, three under ensemble_kd"
        if one in seconds and ensemble in seconds and places[one] == places[ensemble]:
            three, single = seconds[ensemble], seconds[one]
            lines.append(
                f"Three networks of {peer} under `EnsembleKD` take {three:.0f} s of CPU an epoch, three trainings by"
                f" {peer} {3 * single:.0f} s: {100 * three / (3 * single):.0f} % of them. Most of it is `fit`, not the"
                " ensemble."
            )
    return "\n".join(lines) + "\n" if lines else ""


def place(each: Record) -> str:
    """Return where a run took place."""
    return f"{each['machine']['processor']}, one thread of {each['machine']['cores']}"


def machines(found: Sequence[Record], everything: Sequence[Record]) -> str:
    """Return where runs took place; if in several, what an epoch of one of ours takes in each, and which were where."""
    names: dict[str, list[str]] = {}
    for each in found:
        names.setdefault(place(each), []).append(each["name"])
    if len(names) == 1:
        return next(iter(names))
    said = list[str]()
    for where, of in sorted(names.items(), key=lambda entry: -len(entry[1])):
        alike = [
            e for e in everything if all(e[k] == found[0][k] for k in ("dataset", "minutes")) and place(e) == where
        ]
        known = [cpu_s_of_epoch(e) for e in alike if e["name"] == NARROW]
        epoch = f", {known[0]:.0f} s for an epoch of {NARROW}" if known and known[0] else ""
        said.append(f"{', '.join(of)} on {where}{epoch}" if said else f"{where}{epoch}")
    return "; but ".join(said)


def over_seeds(found: Sequence[Record]) -> str:
    """Return a table of what several seeds have in as many minutes, paired by user and seed with one of ours."""
    by_name: dict[str, dict[int, Record]] = {}
    for each in found:
        by_name.setdefault(each["name"], {})[each["seed"]] = each
    by_name = {name: of for name, of in by_name.items() if len(of) > 1}
    ours, rows = by_name.get(NARROW, {}), list[Row]()
    for name, of in sorted(
        by_name.items(), key=lambda entry: -np.mean([e["test"]["NDCG@10"] for e in entry[1].values()])
    ):
        values, both, against = [e["test"]["NDCG@10"] for e in of.values()], sorted(of.keys() & ours.keys()), ""
        if both and name != NARROW:
            against = difference([of[s] for s in both], [ours[s] for s in both])
        seeds = ", ".join(map(str, sorted(of)))
        rows.append((name, seeds, f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}", against))
    head = ("", "seeds", "NDCG@10, mean ± standard deviation", f"against {NARROW}, of the same seeds (95 %)")
    return markdown(head, rows) + "\n" if rows else ""


def agreed(found: Sequence[Record]) -> str:
    """Return how far each library's own recommendations are those of the vectors that are ranked."""
    known = [each["agreement"] for each in found if "agreement" in each]
    if not known:
        return ""
    return (
        "The ten items that a library itself recommends to each of 64 users were compared with the best ten by the"
        f" scores that are ranked. This was done in {len(known)} of {len(found)} runs; in the worst of them"
        f" {100 * min(known):.1f} % were the same.\n"
    )


def curves(folder: Path, dataset: str, found: Sequence[Record]) -> str:
    """Draw the validation over minutes of CPU, and return the line that shows it; "" if no run has a curve."""
    found = [each for each in found if each["curve"]]  # an average has none
    if not found:
        return ""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    styles = {"recbole": "--", "rectools": ":", "replay": "-.", "ensemble_kd": "-"}
    for each in found:
        minutes = [point["cpu_s"] / 60 for point in each["curve"]]
        values = [point["ndcg"] for point in each["curve"]]
        axes.plot(minutes, values, styles[each["library"]], marker="o", markersize=3, label=each["name"])
    axes.set(xlabel="minutes of CPU, one thread", ylabel="validation NDCG@10", title=dataset)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    name = f"peers-{dataset}.svg"
    with matplotlib.rc_context({"svg.hashsalt": "peers"}):
        figure.savefig(folder / name, metadata={"Date": None})
    pyplot.close(figure)
    return f"![Validation NDCG@10 over minutes of CPU]({name})\n"


def section(folder: Path, picture: str, found: Sequence[Record], everything: Sequence[Record]) -> list[str]:
    """Return the parts of the page about the runs of one dataset, budget and seed; ``picture``: the name of theirs."""
    first, losses = found[0], "\n".join(ahead(found)) or "In none of these numbers."
    return [
        f"## {first['dataset']}, {first['minutes']:g} minutes of CPU for each run, seed {first['seed']}\n",
        summary(found),
        accuracy(found, everything) + "\n",
        around(found),
        curves(folder, picture, found),
        costs(found) + "\n",
        speed(found),
        f"Protocol: {first['protocol']}. Machine: {machines(found, everything)}, shared with other work: CPU minutes"
        " count, not the clock on the wall. They grow somewhat, too, where others use the same core and its caches, so"
        " that small ratios between runs say nothing. The intervals are over users: one seed says nothing about the"
        " spread over seeds.\n",
        agreed(found),
        "### Settings\n",
        settings(found) + "\n",
        f"### Where a peer is ahead of one network of ours\n\n{losses}\n" if one_of_ours(found) else "",
    ]


def write(folder: Path, everything: Sequence[dict[str, Any]]) -> Path:
    """Write the page and its pictures into a folder, and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [HEAD, WARNING]
    everything = [with_batches(each, everything) for each in everything]
    groups: dict[tuple[str, float], dict[int, list[Record]]] = {}
    for each in everything:
        groups.setdefault((each["dataset"], each["minutes"]), {}).setdefault(each["seed"], []).append(each)
    order = list(dict.fromkeys(dataset for dataset, _ in groups))
    single = len(groups) == 1 and all(len(seeds) == 1 for seeds in groups.values())
    for dataset, minutes in sorted(groups, key=lambda key: (order.index(key[0]), -key[1])):  # the longest runs first
        seeds = groups[dataset, minutes]
        if table := over_seeds([each for found in seeds.values() for each in found]):
            parts += [f"## {dataset}, {minutes:g} minutes of CPU for each run, over seeds\n", table]
        for seed in sorted(seeds):
            picture = dataset if single else f"{dataset}-{minutes:g}-{seed}"
            parts += section(folder, picture, seeds[seed], everything)
    if everything:
        parts += ["## Installation\n", installs(everything) + "\n", FOOT]
    path = folder / NAME
    path.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return path
