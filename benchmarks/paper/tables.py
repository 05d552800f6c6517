"""The runs that each table and figure of the paper needs, and runs beyond it; the most informative first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.paper import published
from benchmarks.paper.recipes import INDEPENDENT, Run, Scale, recipe

TRANSFORMERS = ("SASRec", "BERT4Rec")
AUTOREGRESSIVE = ("GRU4Rec", "Caser", "SASRec")
FOUR = (*AUTOREGRESSIVE, "BERT4Rec")
LATE: dict[str, Any] = {"transfer_from": 0.2, "transfer_full": 0.5}
STRONGEST = "EMKD: KD of 1, twice as long"  # the row of "best" that claims stand on
STRONG: dict[str, Any] = {"kd": 1.0, "kd_temperature": 1.0, **LATE}  # the weight, and once members are formed


@dataclass(frozen=True)
class Row:
    """A line of a table: what it shows, its run for each seed, and what the paper has there."""

    label: str
    runs: tuple[Run, ...]
    published: float | None = None


@dataclass(frozen=True)
class Table:
    """A table or a figure on one dataset."""

    name: str  # for --only
    title: str
    dataset: str
    rows: tuple[Row, ...]


def base(scale: Scale) -> str:
    """The encoder of Table 4, Figure 3 and the controls: the paper's; where that takes hours a run, a faster one."""
    return "BERT4Rec" if scale == "paper" else "SASRec"


class Study:
    """The tables of one scale on one dataset."""

    def __init__(self, scale: Scale, dataset: str) -> None:
        self.scale, self.dataset, self.base = scale, dataset, base(scale)
        self.twice: dict[str, Any] = {"epochs": 2 * recipe(scale, dataset, self.base)["epochs"]}
        self.main = {"smoke": 1, "cpu": 3, "paper": 5}[scale]  # seeds

    def run(self, encoder: str, n: int, seed: int = 0, **changes: Any) -> Run:
        """A run by the recipe; one network has nobody to learn from, so what it cannot use does not name it."""
        made = Run(self.dataset, encoder, n, seed, **{**recipe(self.scale, self.dataset, encoder), **changes})
        if n == 1:
            made = replace(made, ccl=0.0, kd=0.0)
        return plain(made)

    def row(
        self, label: str, encoder: str, n: int, *, paper: float | None = None, seeds: int | None = None, **changes: Any
    ) -> Row:
        count = self.main if seeds is None else seeds
        return Row(label, tuple(self.run(encoder, n, seed, **changes) for seed in range(count)), paper)

    def table_1(self) -> Table:
        numbers, rows = published.TABLE_1.get(self.dataset, {}), []
        for encoder in AUTOREGRESSIVE:
            one, two = numbers.get(encoder, (None, None))
            rows.append(self.row(f"{encoder}, one", encoder, 1, paper=one, seeds=1, **INDEPENDENT))
            rows.append(self.row(f"{encoder}, two", encoder, 2, paper=two, seeds=1, **INDEPENDENT))
        return Table("table1", "Table 1: one network, and two trained independently", self.dataset, tuple(rows))

    def table_3(self) -> Table:
        numbers = published.TABLE_3.get(self.dataset, {})
        rows = [self.row(e, e, 1, paper=numbers.get(e), seeds=1, **INDEPENDENT) for e in FOUR]
        rows.append(self.row("EMKD", self.base, 3, paper=numbers.get("EMKD")))
        return Table("table3", "Table 3: four encoders, and EMKD", self.dataset, tuple(rows))

    def table_4(self) -> Table:
        numbers = published.TABLE_4.get(self.dataset, {})
        five = 5 if self.main == 3 else self.main  # of the rows that the claims about transfer stand on
        without: list[tuple[str, int, int, dict[str, Any]]] = [
            ("(1) EMKD (3)", 3, five, {}),
            ("(5) independent", 3, five, INDEPENDENT),
            ("(4) without KD", 3, five, {"kd": 0.0}),
            ("(6) one network", 1, self.main, INDEPENDENT),
            ("(9) without AP", 3, self.main, {"ap": 0.0}),
            ("(7) EMKD (2)", 2, self.main, {}),
            ("(3) without CCL", 3, self.main, {"ccl": 0.0}),
            ("(2) without ICL", 3, self.main, {"icl": 0.0}),
            ("(8) EMKD (4)", 4, self.main, {}),
        ]
        rows = [
            self.row(label, self.base, n, paper=numbers.get(label), seeds=seeds, **changes)
            for label, n, seeds, changes in without
        ]
        return Table("table4", f"Table 4: what each part adds ({self.base})", self.dataset, tuple(rows))

    def table_5(self) -> Table:
        numbers = published.TABLE_5.get(self.dataset, {})
        deep = TRANSFORMERS if self.scale == "paper" else (self.base,)
        labels = [(f"{encoder}, {layers} layers", encoder, layers) for encoder in deep for layers in (2, 4, 6)]
        rows = [
            self.row(label, encoder, 1, paper=numbers.get(label), seeds=1, num_layers=layers, **INDEPENDENT)
            for label, encoder, layers in labels
        ]
        rows += [self.row(f"EMKD ({n})", self.base, n, seeds=1) for n in (2, 3)]
        return Table("table5", "Table 5: deeper single networks", self.dataset, tuple(rows))

    def figure_3(self) -> Table:
        usual = self.run(self.base, 3)
        sweeps: dict[str, tuple[tuple[str, ...], Sequence[float]]] = {
            "views": (("views",), (1, 2, 4) if self.scale != "paper" else (1, 2, 4, 8)),
            "temperature": (("temperature", "kd_temperature"), (0.1, 0.3, 1.0, 3.0)),
            "lambda": (("icl", "ccl"), (0.001, 0.01, 0.1)),
            "mu": (("kd",), (0.001, 0.01, 0.1, 1.0)),
            "d": (("d_model",), (32, 64, 128) if self.scale != "paper" else (64, 128, 256, 512)),
        }
        rows = [
            Row(f"{name} = {value:g}", (plain(replace(usual, **{f: value for f in fields})),))  # type: ignore[arg-type]
            for name, (fields, values) in sweeps.items()
            for value in values
        ]
        return Table("figure3", f"Figure 3: one setting at a time ({self.base})", self.dataset, tuple(rows))

    def figure_4(self) -> Table:
        rows = []
        for e in FOUR:
            rows.append(self.row(f"{e}, one", e, 1, seeds=1, **INDEPENDENT))
            rows.append(self.row(f"{e}, EMKD (3)", e, 3, seeds=1))
            rows.append(self.row(f"{e}, independent (3)", e, 3, seeds=1, **INDEPENDENT))  # beyond the paper
            rows += [self.row(f"{e}, EMKD ({n})", e, n, seeds=1) for n in (2, 4)]
        return Table("figure4", "Figure 4: EMKD on four encoders", self.dataset, tuple(rows))

    def controls(self) -> Table:
        usual = self.run(self.base, 1)
        rows = [
            self.row("one network", self.base, 1, **INDEPENDENT),
            self.row("one, three times as wide", self.base, 1, seeds=1, d_model=3 * usual.d_model, **INDEPENDENT),
            self.row("one, three times as long", self.base, 1, seeds=1, epochs=3 * usual.epochs, **INDEPENDENT),
            self.row("three, independent", self.base, 3, **INDEPENDENT),
        ]
        return Table("controls", "As much computation, otherwise spent", self.dataset, tuple(rows))

    def attempts(self) -> Table:
        longer = {"dropout": 0.5, "epochs": 9}
        third, thrice = {**STRONG, "kd": 0.3}, {"epochs": 3 * self.run(self.base, 3).epochs}
        start = {"transfer_from": 0.0, "transfer_full": 0.0}
        tried: dict[str, dict[str, Any]] = {
            "EMKD, weights of the authors' code": {},
            "independent": INDEPENDENT,
            "ICL and CCL of 0.03": {"icl": 0.03, "ccl": 0.03},
            "ICL and CCL of 0.1, from 20 to 50 % of the run on": {"icl": 0.1, "ccl": 0.1, **LATE},
            "KD of 0.3 at temperature 1, from 20 to 50 % of the run on": third,
            "KD of 0.3, twice as long": {**third, **self.twice},
            "KD of 0.3, twice as long, without ICL and CCL": {**third, **self.twice, "icl": 0.0, "ccl": 0.0},
            "KD of 1, twice as long": {**STRONG, **self.twice},
            "KD of 1, twice as long, from the start": {**STRONG, **self.twice, **start},
            "KD of 1, three times as long": {**STRONG, **thrice},
            "KD of 3, twice as long": {**STRONG, **self.twice, "kd": 3.0},
            "KD of 3, three times as long": {**STRONG, **thrice, "kd": 3.0},
            "dropout 0.5, 9 epochs: EMKD": longer,
            "dropout 0.5, 9 epochs: independent": {**longer, **INDEPENDENT},
            "three students of three independent": {**INDEPENDENT, "student_epochs": self.run(self.base, 3).epochs},
        }
        rows = [self.row(label, self.base, 3, seeds=1, **changes) for label, changes in tried.items()]
        return Table("attempts", "What was tried to make transfer help", self.dataset, tuple(rows))

    def best(self) -> Table:
        rows = [
            self.row(STRONGEST, self.base, 3, seeds=5, **STRONG, **self.twice),
            self.row("KD of 0.3, twice as long", self.base, 3, seeds=5, **{**STRONG, "kd": 0.3}, **self.twice),
            self.row("independent, twice as long", self.base, 3, **INDEPENDENT, **self.twice),
            self.row("independent, as long as is best for it", self.base, 3, seeds=5, **INDEPENDENT),
            self.row("one network, as long as is best for it", self.base, 1, **INDEPENDENT),
        ]
        return Table("best", "The best that we know: strong KD, and longer training", self.dataset, tuple(rows))

    def elsewhere(self) -> Table:
        rows = []
        for e in (each for each in FOUR if each != self.base):
            twice = {"epochs": 2 * recipe(self.scale, self.dataset, e)["epochs"]}
            rows.append(self.row(f"{e}, KD of 1", e, 3, seeds=1, **STRONG))
            rows.append(self.row(f"{e}, independent", e, 3, seeds=1, **INDEPENDENT))
            rows.append(self.row(f"{e}, KD of 1, twice as long", e, 3, seeds=1, **STRONG, **twice))
            rows.append(self.row(f"{e}, independent, twice as long", e, 3, seeds=1, **INDEPENDENT, **twice))
            rows.append(self.row(f"{e}, KD of 0.3, twice as long", e, 3, seeds=1, **{**STRONG, "kd": 0.3}, **twice))
        return Table("elsewhere", "Strong KD elsewhere", self.dataset, tuple(rows))

    def switches(self) -> Table:
        changes: dict[str, dict[str, Any]] = {
            "bfloat16": {},
            "float32": {"precision": "float32"},
            "negatives = 1024": {"negatives": 1024 if self.scale != "smoke" else 32},
        }
        rows = [self.row(label, self.base, 1, **INDEPENDENT, **change) for label, change in changes.items()]
        return Table("switches", "What speed costs in accuracy: one network", self.dataset, tuple(rows))

    def tables(self) -> list[Table]:
        beyond = [self.attempts(), self.controls(), self.switches()]
        if self.scale == "cpu":
            beyond[1:1] = [self.best(), self.elsewhere()]
        papers = [self.table_4(), self.table_1(), self.figure_4(), self.table_3()]
        return [*papers, *beyond, self.figure_3(), self.table_5()]


def plain(run: Run) -> Run:
    """Settings that nothing reads go back to their defaults, so that equal runs have equal keys."""
    default = Run(run.dataset, run.encoder)
    if not run.icl and not run.ccl:
        run = replace(run, temperature=default.temperature)
    if not run.kd:
        run = replace(run, kd_temperature=default.kd_temperature)
    if not (run.icl or run.ccl or run.kd):
        run = replace(run, transfer_from=0.0, transfer_full=0.0)
    return run


def study(scale: Scale, datasets: Sequence[str], only: Sequence[str] = ()) -> list[Table]:
    """The tables of a scale, those of the first dataset first."""
    made = [table for dataset in datasets for table in Study(scale, dataset).tables()]
    return [table for table in made if not only or table.name in only]


# The most telling first. Where rows of a table have more seeds than others, a claim stands on them: all of theirs come
# before the others' first seed. BERT4Rec takes many times as long as the rest.
ORDER = (
    *("table4", "table1", "", "figure4", "attempts", "best", "elsewhere", "table3", "controls"),
    *("switches", "figure3", "table5"),
)


def runs(tables: Sequence[Table]) -> Iterator[Run]:
    """Their runs, each once, the most telling first."""
    first = tables[0].rows[0].runs[0]
    found = []
    for table in tables:
        fewest = min(len(row.runs) for row in table.rows)
        for row in table.rows:
            for seed, run in enumerate(row.runs):
                later = 0 if len(row.runs) > fewest else 1 + 4 * seed
                found.append((ORDER.index(table.name) + later + 2 * (run.masked > first.masked), seed, run))
    seen: set[str] = set()
    for *_, run in sorted(found, key=lambda place: place[:2]):
        if run.key not in seen:
            seen.add(run.key)
            yield run
