"""The pages of the documentation: their code runs, in order, from the page itself, and prints what the page shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.snippets import PICTURE, agrees, run, snippets

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if snippets(page.read_text(encoding="utf-8")))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
NEEDS = {
    "other-models": ["transformers"],
    "serving": ["onnxruntime", "faiss", "fastapi", "httpx"],
    "first-ensemble": ["matplotlib"],
    "calibration": ["matplotlib"],
    "hub": ["huggingface_hub", "safetensors"],
}


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_prints_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in NEEDS.get(page.stem, []):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    monkeypatch.chdir(tmp_path)
    for snippet, printed in run(page):
        if snippet.shown is not None:
            assert agrees(printed, snippet.shown), f"{page.name}:{snippet.line} prints\n{printed}"
    for name in PICTURE.findall(page.read_text(encoding="utf-8")):
        assert (tmp_path / name).exists(), "the page makes its pictures"
        assert (page.parent / name).exists()


def test_the_tutorials_are_among_them() -> None:
    assert {"first-ensemble", "own-encoder", "dataframe", "student", "serving", "several-processes"} <= {
        page.stem for page in PAGES
    }


def test_the_figures_are_what_the_script_draws() -> None:
    draw = script(DOCS / "figures" / "draw.py")
    figures = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "figures").glob("*.svg")}
    assert figures == {name: figure().svg() for name, figure in draw.FIGURES.items()}


def test_every_loss_has_its_figure() -> None:
    method = (DOCS / "explanation" / "method.md").read_text(encoding="utf-8")
    assert [name for name in ("mip", "ap", "icl", "ccl", "kd") if f"figures/{name}.svg" not in method] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert settings.source.startswith("USERS, EPOCHS = ")
    settings.source = "USERS, EPOCHS = 60, 1"  # few steps
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}, timeout=600).execute()
    shown = [kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert "image/png" in shown
