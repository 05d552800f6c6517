"""The paper's claims, each a comparison of two rows, and what the finished runs say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.paper.analysis import Numbers, Test, ndcg, paired_bootstrap
from benchmarks.paper.store import Record, unpack
from benchmarks.paper.tables import STRONGEST, Table

LEVEL = 0.05
SEEDS, AGREEING = 3, 0.8  # that a verdict needs, and the share of them that has to say the same


@dataclass(frozen=True)
class Claim:
    """That one row is better than another; ``members``: that the members are, each alone.

    ``alone``: that one row's members, each alone, are better than the other's ensemble.
    """

    text: str
    table: str
    better: str
    worse: str
    members: bool = False
    alone: bool = False


def claims(tables: Sequence[Table]) -> list[Claim]:
    """The paper's claims, as far as these tables have the rows."""
    four, labels = "table4", {(table.name, row.label) for table in tables for row in table.rows}
    made = [
        Claim("An ensemble without transfer beats one network", four, "(5) independent", "(6) one network"),
        Claim("EMKD beats one network", four, "(1) EMKD (3)", "(6) one network"),
        Claim("Transfer by the authors' weights makes the ensemble better", four, "(1) EMKD (3)", "(5) independent"),
        Claim(
            "Transfer by the authors' weights makes each member better", four, "(1) EMKD (3)", "(5) independent", True
        ),
        *[
            Claim(f"Strong KD, twice as long, beats {what}{', each member' * members}", "best", STRONGEST, row, members)
            for what, row in (
                ("independent, as long as is best for it", "independent, as long as is best for it"),
                ("independent, as long", "independent, twice as long"),
                ("KD of 0.3", "KD of 0.3, twice as long"),
            )
            for members in (False, True)
        ],
        Claim(
            "With strong KD one member alone beats three independent networks",
            "best",
            STRONGEST,
            "independent, as long as is best for it",
            alone=True,
        ),
        Claim("ICL and CCL alone make the ensemble better", four, "(4) without KD", "(5) independent"),
        Claim("ICL matters", four, "(1) EMKD (3)", "(2) without ICL"),
        Claim("CCL matters", four, "(1) EMKD (3)", "(3) without CCL"),
        Claim("KD matters", four, "(1) EMKD (3)", "(4) without KD"),
        Claim("AP matters", four, "(1) EMKD (3)", "(9) without AP"),
        Claim("Three members beat two", four, "(1) EMKD (3)", "(7) EMKD (2)"),
        Claim("Four members beat three", four, "(8) EMKD (4)", "(1) EMKD (3)"),
        *[
            Claim(f"Two independent {e} beat one", "table1", f"{e}, two", f"{e}, one")
            for e in ("GRU4Rec", "Caser", "SASRec")
        ],
        *[
            Claim(f"EMKD improves {e}", "figure4", f"{e}, EMKD (3)", f"{e}, one")
            for e in ("GRU4Rec", "Caser", "SASRec", "BERT4Rec")
        ],
        *[
            Claim(f"Transfer makes an ensemble of {e} better", "figure4", f"{e}, EMKD (3)", f"{e}, independent (3)")
            for e in ("GRU4Rec", "Caser", "BERT4Rec")
        ],
        *[
            Claim(f"Strong KD improves three {e}{t}", "elsewhere", f"{e}, KD of 1{t}", f"{e}, independent{t}")
            for e in ("GRU4Rec", "Caser", "SASRec", "BERT4Rec")
            for t in ("", ", twice as long")
        ],
        Claim(
            "Three networks beat one three times as wide", "controls", "three, independent", "one, three times as wide"
        ),
        Claim(
            "Three networks beat one trained three times as long",
            "controls",
            "three, independent",
            "one, three times as long",
        ),
        Claim("Training in float32 beats training in bfloat16", "switches", "float32", "bfloat16"),
    ]
    return [c for c in made if (c.table, c.better) in labels and (c.table, c.worse) in labels]


@cache
def _gains(packed: tuple[str, ...]) -> Numbers:
    """Each user's NDCG@10, mean over these scorers."""
    return np.mean([ndcg(unpack(text)) for text in packed], axis=0)  # type: ignore[no-any-return]


def _by_user(record: Record, *, members: bool) -> Numbers:
    scorers = [s for s in record["ranks"] if (s != "ensemble") == members]
    return _gains(tuple(record["ranks"][scorer] for scorer in scorers))


def tested(claim: Claim, tables: Sequence[Table], done: Mapping[str, Record]) -> Test | None:
    """The comparison over the seeds that both rows have; None where there are none."""
    rows = {row.label: row for table in tables if table.name == claim.table for row in table.rows}
    pairs = [
        (done[a.key], done[b.key])
        for a, b in zip(rows[claim.better].runs, rows[claim.worse].runs, strict=False)
        if a.key in done and b.key in done
    ]
    if not pairs:
        return None
    first = np.stack([_by_user(a, members=claim.members or claim.alone) for a, _ in pairs])
    second = np.stack([_by_user(b, members=claim.members) for _, b in pairs])
    return paired_bootstrap(first, second)


def verdict(test: Test) -> str:
    """Return a verdict on the claim from the difference; four of five seeds must agree.

    Examples:
        >>> verdict(Test(0.1, 0.0, 0.2, 0.5, 3, 3)), verdict(Test(-0.1, -0.2, -0.01, 0.02, 0, 3))
        ('not settled', 'does not hold')
    """
    agreeing = test.wins if test.difference > 0 else test.seeds - test.wins
    if test.p >= LEVEL or agreeing < AGREEING * test.seeds:
        return "not settled"
    return "holds" if test.difference > 0 else "does not hold"
