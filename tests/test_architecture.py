"""Who imports whom, what the package exports, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ensemble_kd

PACKAGE = Path(ensemble_kd.__file__).parent
# What each module of the package may import from it; "data." stands for the package data and all that is in it.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "functional": {"errors"},
    "fused": {"errors", "functional"},
    "fused_attributes": {"errors"},
    "fused_distillation": {"errors", "fused"},
    "losses": {"errors", "functional"},
    "sampling": {"errors", "functional", "fused"},
    "objectives": {"errors", "functional", "sampling"},
    "stacking": {"errors", "functional"},
    "rows": {"errors", "stacking"},
    "packing": {"functional"},
    "metrics": {"errors", "functional"},
    "contract": {"errors", "stacking"},
    "heads": {"errors", "stacking"},
    "distributed": {"errors"},
    "data_parallel": {"distributed", "ensemble"},
    "sharding": {"errors", "distributed", "ensemble"},
    "ensemble": {
        "errors",
        "functional",
        "fused",
        "fused_attributes",
        "losses",
        "sampling",
        "objectives",
        "stacking",
        "rows",
        "packing",
        "metrics",
        "contract",
        "heads",
        "distributed",
        "serving",
    },
    "checkpoints": {"errors", "ensemble"},
    "evaluation": {"errors", "ensemble", "metrics", "sharding", "data."},
    "schedules": {"errors"},
    "settings": {"errors", "ensemble", "evaluation", "schedules", "data."},
    "runlog": {"settings"},
    "training": {
        "errors",
        "data_parallel",
        "distributed",
        "ensemble",
        "losses",
        "objectives",
        "sharding",
        "stacking",
        "rows",
        "checkpoints",
        "evaluation",
        "schedules",
        "settings",
        "runlog",
        "data.",
    },
    "distillation": {
        "errors",
        "ensemble",
        "fused",
        "fused_distillation",
        "losses",
        "objectives",
        "serving",
        "settings",
        "training",
        "data.",
    },
    "presets": {"contract", "losses", "objectives", "schedules"},
    "serving": {"errors", "metrics"},
    "weights": {"errors", "checkpoints", "contract", "ensemble", "losses", "objectives"},
    "export": {"errors", "checkpoints", "ensemble"},
    "conformance": {"errors", "objectives", "stacking", "contract", "ensemble"},
    "testing": {"errors", "stacking", "contract", "conformance"},
    "adapters": {"errors"},
    "data.": {"errors", "data."},
    "encoders.": {"errors", "encoders."},
}
# Top-level distributions that a module may import at all; extras are imported inside the functions that need them.
RUNTIME = {"torch", "einops", "numpy", "typing_extensions"}


def modules() -> dict[str, Path]:
    """Dotted names below the package, without the package's own ``__init__``."""
    named = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            named[name + "." if parts[-1] == "__init__" else name] = path
    return named


def imports(path: Path, *, everywhere: bool) -> list[str]:
    """The absolute dotted names that a file imports; ``everywhere``: inside functions too, else when it is loaded."""
    package = ["ensemble_kd", *path.relative_to(PACKAGE).parent.parts]
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if not everywhere and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # "from ensemble_kd import fused" names a module, "from ensemble_kd.fused import ..." a thing in one.
            below = [f"{source}.{alias.name}" for alias in node.names]
            found.extend(name if is_module(name) else source for name in below)
        for child in ast.iter_child_nodes(node):
            if everywhere or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name.startswith("ensemble_kd.") and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())


def rule(name: str) -> str:
    """The key of ``MAY_IMPORT`` under which a module falls."""
    return name.split(".")[0] + "." if "." in name else name


@pytest.mark.parametrize("name", modules())
def test_imports_point_one_way(name: str) -> None:
    assert rule(name) in MAY_IMPORT, "a new module: say in MAY_IMPORT what it may import"
    for imported in imports(modules()[name], everywhere=True):
        top, _, below = imported.partition(".")
        if top == "ensemble_kd":
            assert below, f"{name} imports the whole package"
            key = below.split(".")[0]
            key = key + "." if (PACKAGE / key).is_dir() else key
            assert key in MAY_IMPORT[rule(name)], f"{name} imports {imported}"


def test_the_import_rules_hold_no_circle() -> None:
    remaining = {name: allowed - {name} for name, allowed in MAY_IMPORT.items()}
    while remaining:
        free = {name for name, allowed in remaining.items() if not allowed & remaining.keys()}
        assert free, f"a circle among {sorted(remaining)}"
        remaining = {name: allowed for name, allowed in remaining.items() if name not in free}


def test_the_parser_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import torch.nn\nfrom . import fused\nfrom .errors import E\n"
        "if TYPE_CHECKING:\n    import polars\n"
        "def f():\n    from ensemble_kd import losses\n"
    )
    (tmp_path / "ensemble_kd").mkdir()
    for name in ("fused", "errors", "losses"):
        (tmp_path / "ensemble_kd" / f"{name}.py").touch()
    path = tmp_path / "ensemble_kd" / "x.py"
    path.write_text(code, encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "ensemble_kd")
    loaded = ["torch.nn", "ensemble_kd.fused", "ensemble_kd.errors"]
    assert imports(path, everywhere=False) == loaded
    assert imports(path, everywhere=True) == [*loaded, "polars", "ensemble_kd.losses"]


@pytest.mark.parametrize("name", modules())
def test_modules_load_runtime_dependencies_alone(name: str) -> None:
    tops = {imported.partition(".")[0] for imported in imports(modules()[name], everywhere=False)}
    assert tops <= RUNTIME | {"ensemble_kd"} | sys.stdlib_module_names


def test_public_names() -> None:
    assert sorted(ensemble_kd.__all__) == [
        "AP",
        "CCL",
        "EnsembleKD",
        "EnsembleKDError",
        "ICL",
        "KD",
        "MaskedItem",
        "NextItem",
        "Recommendations",
        "Step",
        "fit",
    ]
    assert all(hasattr(ensemble_kd, name) for name in ensemble_kd.__all__)


def test_init_only_names_things() -> None:
    path = PACKAGE / "__init__.py"
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 40
    docstring, *body = ast.parse(source).body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, ast.ImportFrom | ast.Assign) for node in body)


IMPORT = """
import sys
import torch, einops, numpy, typing_extensions
import torch._dynamo  # what torch loads for its compiler is its own affair
before = set(sys.modules)
import ensemble_kd
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
assert not torch.cuda.is_initialized()
"""


def test_import_brings_in_nothing_else() -> None:
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", IMPORT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "ensemble_kd" in run.stdout.split()
    assert set(run.stdout.split()) <= RUNTIME | {"ensemble_kd"}  # numpy loads parts of itself late
    assert run.stderr == ""
