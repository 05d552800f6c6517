"""The site builds without a warning and needs no network; every public name has an entry in it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_public import SURFACE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUESTIONS = 16
LOADS = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("room", [room for room in SURFACE if not room.startswith("_") and room])
def test_every_public_name_has_an_entry(room: str, site: Path) -> None:
    page = (site / "reference" / f"{room}.html").read_text(encoding="utf-8")
    assert [name for name in SURFACE[room].split() if f'id="ensemble_kd.{room}.{name}"' not in page] == []


def test_the_names_of_the_package_are_listed(site: Path) -> None:
    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    assert [name for name in SURFACE[""].split() if f"<code>{name}</code>" not in page] == []


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {page: LOADS.findall(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}
    assert len(pages) > 40
    loaded = {url for urls in pages.values() for url in urls if 'rel="canonical"' not in url}
    assert loaded == set()
    styles = "".join(style.read_text(encoding="utf-8") for style in site.rglob("*.css"))
    assert re.findall(r"""url\(["']?https?:[^)]*""", styles) == []


def test_every_question_leads_to_an_answer(site: Path) -> None:
    text = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    questions = text.split("\n## ")[1:]
    assert len(questions) == QUESTIONS
    assert [q.splitlines()[0] for q in questions if "](" not in q and "README" not in q and "CITATION" not in q] == []
