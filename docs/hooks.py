"""Pages that are made while the site is built, so that they cannot differ from the code: examples, reference, study."""

from __future__ import annotations

import ast
import posixpath
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ensemble_kd"
PAPER = ROOT / "benchmarks" / "paper"
INTERNAL = {"internal"}  # rooms for the library alone


def names(path: Path) -> list[str]:
    """Return the public names of a module: ``__all__``, or what it defines at the top without an underscore."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[str] = []
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=elements)):
                return [element.value for element in elements if isinstance(element, ast.Constant)]
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) if not name.startswith("_"):
                found.append(name)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                if not name.startswith("_"):
                    found.append(name)
            case _:
                pass
    return found


def rooms() -> dict[str, Path]:
    """Return the public rooms of the package, by name."""
    folders = {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem: path for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")}
    return {name: path for name, path in sorted({**folders, **modules}.items()) if name not in INTERNAL}


def reference() -> dict[str, str]:
    """Return a page per room, with an entry per public name."""
    pages, lines = {}, []
    for room, path in rooms().items():
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        entries = "\n\n".join(f"::: ensemble_kd.{room}.{name}" for name in names(path))
        pages[f"reference/{room}.md"] = f"# ensemble_kd.{room}\n\n{summary}\n\n{entries}\n"
        lines.append(f"| [`ensemble_kd.{room}`]({room}.md) | {' '.join(summary.split())} |")
    top = ", ".join(f"`{name}`" for name in names(PACKAGE / "__init__.py"))
    pages["reference/index.md"] = (
        f"# Reference\n\n`ensemble_kd` itself offers {top}. Each has its entry in its room:\n\n"
        "| room | content |\n|---|---|\n" + "\n".join(lines) + "\n"
    )
    return pages


def examples() -> dict[str, str]:
    """Return a page per example, with its code."""
    pages, lines = {}, []
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text(encoding="utf-8")
        summary = (ast.get_docstring(ast.parse(code)) or "").split("\n\n")[0]
        pages[f"examples/{path.stem}.md"] = f"# {path.name}\n\n```py\n{code}```\n"
        lines.append(f"| [{path.name}]({path.stem}.md) | {' '.join(summary.split()).replace('``', '`')} |")
    head = "# Examples\n\nEach is one file that trains on made-up data, so that it runs as it is.\n\n"
    head += "| file | what it shows |\n|---|---|\n"
    pages["examples/index.md"] = head + "\n".join(lines) + "\n"
    return pages


def study() -> str:
    """Return the page of the study, as its program wrote it."""
    return (PAPER / "REPORT.md").read_text(encoding="utf-8")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the drawing of ARCHITECTURE.md where a page asks for it."""
    drawing = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("```")[1]
    return markdown.replace("<!-- drawing -->", f"```text{drawing}```")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the pictures of the study."""
    for name, text in {**reference(), **examples(), "results/study.md": study()}.items():
        files.append(File.generated(config, name, content=text))
    for picture in [*PAPER.glob("*.png"), ROOT / "benchmarks" / "results" / "speed.png"]:
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_config(config: Any) -> Any:
    """Put the pages that are made here into the table of contents."""
    made = {"examples/": examples(), "reference/": reference()}
    for entry in config.nav:
        for title, target in list(entry.items()):
            if isinstance(target, str) and target in made:
                pages = sorted(made[target], key=lambda name: (not name.endswith("index.md"), name))
                entry[title] = [
                    name if name.endswith("index.md") else {posixpath.basename(name).removesuffix(".md"): name}
                    for name in pages
                ]
    return config
