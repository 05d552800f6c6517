"""The README: short, with code that runs as pasted and prints what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.snippets import agrees, run, snippets

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(TEXT.split()) <= 900


def test_the_first_python_is_near_the_top_and_short() -> None:
    first = snippets(TEXT)[0]
    assert first.line <= 40
    assert sum(bool(line.strip()) for line in first.code.splitlines()) <= 8


@pytest.mark.slow
def test_its_code_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = 0
    for snippet, printed in run(README):
        if snippet.shown is not None:
            assert agrees(printed, snippet.shown), printed
            shown += 1
    assert shown == 2


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#\s]+)", TEXT)
    assert len(links) > 20
    assert [link for link in links if "://" not in link and not (README.parent / link).exists()] == []


def test_an_output_agrees_or_not() -> None:
    assert agrees("epoch 1\nmember 0  0.25\nensemble  -1,204.50", "...\nensemble  0.49")
    assert agrees("a [1, 2]", "a [3]")
    assert not agrees("member 0  0.25", "ensemble  0.25")
    assert not agrees("a\nb", "b")
    assert not agrees("", "b")


def test_the_front_page_has_the_same_figures() -> None:
    """The table of the README, row by row."""
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "| ." in line.replace("**", "")]
    front = (README.parent / "docs" / "index.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 6
    assert [row for row in rows if row not in front] == []
