"""Who imports whom, what the package exports, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import ensemble_kd
from tests.imports import faults, imports, public, reaches, rooms

PACKAGE = Path(ensemble_kd.__file__).parent
ROOT = Path(__file__).parents[1]

# A module imports its own room and what rooms of lower levels name. So rooms of one level never import one another.
LEVELS = """
errors
internal
functional metrics data encoders
losses objectives stacking distributed serving
ensemble
evaluation growing recommending
training
distillation export plots presets testing
__main__
"""
INTERNAL = {"internal"}  # for the library alone
# Top-level distributions that a module may import at all; extras are imported inside the functions that need them.
RUNTIME = {"torch", "einops", "numpy", "typing_extensions"}
USERS = sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def levels(text: str) -> list[set[str]]:
    return [set(line.split()) for line in text.strip().splitlines()]


def test_imports_point_down() -> None:
    assert faults(PACKAGE, levels(LEVELS)) == []


def test_the_drawing_is_the_same_list() -> None:
    drawing = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("```")[1]
    drawn: list[set[str]] = []
    for line in drawing.strip().splitlines():
        number, name = line[:3].strip(), line[3:].split()[0]
        if number:
            assert int(number) == len(drawn)
            drawn.append(set())
        drawn[-1].add(name.rstrip("/").removesuffix(".py"))
    assert drawn == levels(LEVELS)


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_and_benchmarks_use_what_is_public(path: Path) -> None:
    used = list(reaches(path, PACKAGE))
    assert [fault for fault in used if fault[2]] == []
    assert {room for _, room, _ in used} & INTERNAL == set()


def test_modules_load_runtime_dependencies_alone() -> None:
    """And every one of the four is used."""
    tops = {
        found.source.partition(".")[0]
        for path in PACKAGE.rglob("*.py")
        for found in imports(path, PACKAGE)
        if not found.late
    }
    assert tops - sys.stdlib_module_names == RUNTIME | {"ensemble_kd"}


def test_inits_only_name_things() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        docstring, *body = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr)
        assert all(isinstance(node, ast.ImportFrom | ast.Assign) for node in body), path
        imported = {found.name for found in imports(path, PACKAGE)}
        assert public(path.parent) - imported <= {"__version__"}, path


def test_the_version_is_the_distributions() -> None:
    """``__version__`` is the one place where it stands; an old editable install differs until it is made anew."""
    assert version("ensemble_kd") == ensemble_kd.__version__


IMPORT = """
import sys
import torch, einops, numpy, typing_extensions
before = set(sys.modules)
import ensemble_kd
new = set(sys.modules) - before
print(*sorted({name.partition(".")[0] for name in new} - sys.stdlib_module_names))
assert not torch.cuda.is_initialized()
assert "torch._dynamo" not in new  # torch's compiler takes as long to load as the rest of torch
"""


@pytest.mark.slow
def test_import_brings_in_nothing_else() -> None:
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", IMPORT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "ensemble_kd" in run.stdout.split()
    assert set(run.stdout.split()) <= RUNTIME | {"ensemble_kd"}  # numpy loads parts of itself late
    assert run.stderr == ""


# ------------------------------------------------------------------------------------------- tests of the test itself

HOUSE = {
    "__init__.py": "from pkg.top import Top\n\n__all__ = ['Top']",
    "base.py": "import torch\n\nclass Error: ...\n\ndef _hidden(): ...",
    "left/__init__.py": "from pkg.left.inner import left\n\n__all__ = ['left']",
    "left/inner.py": "from pkg.base import Error\nfrom pkg import base\nleft = base.Error\nother = 1\n_private = 2",
    "left/second.py": "from pkg.left.inner import _private, other",
    "right.py": "from .base import Error\nright = 1",
    "top.py": "def late():\n    from pkg.left import left\nfrom pkg.right import right\nclass Top: ...",
}
STOREYS = "base\nleft right\ntop"


def house(folder: Path, **changed: str) -> Path:
    """A small package that follows the rules, with the given lines added to files of it."""
    for name, text in HOUSE.items():
        path = folder / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n" + changed.get(name.removesuffix(".py").replace("/", "_"), ""), encoding="utf-8")
    return folder / "pkg"


def test_a_house_in_order_has_no_fault(tmp_path: Path) -> None:
    assert faults(house(tmp_path), levels(STOREYS)) == []
    assert rooms(tmp_path / "pkg").keys() == {"base", "left", "right", "top"}


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("right", "from pkg.left import left", "right.py:3 imports left, which stands beside it on level 1"),
        ("right", "from pkg import left", "right.py:3 imports left, which stands beside it on level 1"),
        (
            "right",
            "if TYPE_CHECKING:\n    from .left import left",
            "right.py:4 imports left, which stands beside it",
        ),
        ("base", "def f():\n    from pkg.top import Top", "base.py:7 imports top of the higher level 2"),
        ("top", "from pkg.base import _hidden", "top.py:5 uses the private name base._hidden"),
        ("top", "from pkg import base as b\nb._hidden()", "top.py:6 uses the private name base._hidden"),
        ("top", "from pkg.left import other", "top.py:5 uses left.other, which the room does not name"),
        (
            "top",
            "from pkg.left.inner import left",
            "top.py:5 imports left from pkg.left.inner, past the",
        ),
        ("top", "from pkg import Top", "top.py:5 imports pkg.Top as a whole"),
        ("top", "import pkg.left.inner", "top.py:5 imports pkg.left.inner. as a whole"),
    ],
)
def test_a_forbidden_import_is_named(file: str, line: str, fault: str, tmp_path: Path) -> None:
    found = faults(house(tmp_path, **{file: line}), levels(STOREYS))
    assert len(found) == 1
    assert found[0].startswith(fault)


@pytest.mark.parametrize(
    ("storeys", "fault"),
    [
        ("base\nleft right\ntop cellar", "unused permission: there is no cellar"),
        ("base\nleft right\nattic\ntop", "unused permission: there is no attic"),
        ("base\nleft\nright\ntop", "unused permission: level 2 imports nothing of level 1"),
        ("base\nleft\ntop", "right stands on no level"),
    ],
)
def test_a_permission_that_nothing_uses_is_named(storeys: str, fault: str, tmp_path: Path) -> None:
    assert fault in faults(house(tmp_path), levels(storeys))
