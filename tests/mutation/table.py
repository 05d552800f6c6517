"""The changes that were tried, as a page of Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

OUTCOMES = ("killed", "timed out", "equivalent", "survived")
HEAD = """# Changes of the code that a test must notice

`python -m tests.mutation` draws places of the library's code at random and changes each: an operator, a comparison, a
constant, a condition, a call that is left out. The tests of that part of the library then run on the changed code. A
change is *killed* if one of them fails, or *timed out* if they no longer end, which is noticed just as well. It is
*equivalent* if no test could notice it, for the reason below. Otherwise it *survived*.
"""


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return the page: counts by file, then the equivalent changes with their reasons, then the survivors."""
    lines = list({line["change"]: line for line in lines}.values())  # one that was drawn twice counts once
    seeds = sorted({line["seed"] for line in lines})
    revisions = list(dict.fromkeys(line["revision"] for line in lines))
    rows = [HEAD, f"Drawn with seeds {', '.join(map(str, seeds))}, at {', '.join(revisions)}.", ""]
    rows += [f"| file | drawn | {' | '.join(OUTCOMES)} |", f"|---|{'---|' * (len(OUTCOMES) + 1)}"]
    every: Counter[str] = Counter()
    for file in sorted({line["file"] for line in lines}):
        counts = Counter(line["outcome"] for line in lines if line["file"] == file)
        every += counts
        rows.append(_row(file, counts))
    rows += [_row("**all**", every), "", "## Equivalent", "", "| change | why no test can notice it |", "|---|---|"]
    for line in lines:
        if line["outcome"] == "equivalent":
            rows.append(f"| `{_cell(line['change'])}` | {_cell(line['reason'])} |")
    survivors = [f"- `{line['change']}`" for line in lines if line["outcome"] == "survived"]
    return [*rows, "", "## Survived", "", *(survivors or ["None."])]


def _row(name: str, counts: Counter[str]) -> str:
    return f"| {name} | {counts.total()} | {' | '.join(str(counts[outcome]) for outcome in OUTCOMES)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
