"""Reads a package's imports and says which of them break the rules of its levels. Runs nothing of what it reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """``from source import name``, or ``import source`` without a name; ``late``: in a function or for types alone."""

    line: int
    source: str
    name: str | None
    late: bool


def imports(path: Path, package: Path) -> Iterator[Import]:
    """Every import of a file, relative ones made absolute."""
    below = path.relative_to(package.parent).parent.parts if path.is_relative_to(package.parent) else ()

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, None, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = below[: len(below) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(node.lineno, source, alias.name, late) for alias in node.names)
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        late = late or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, late)

    return visit(ast.parse(path.read_text(encoding="utf-8")), late=False)


def rooms(package: Path) -> dict[str, list[Path]]:
    """The files of each room: a folder or a single file beside the package's ``__init__``."""
    found: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).parts[0].removesuffix(".py")
        found.setdefault(name, []).append(path)
    found.pop("__init__", None)
    return found


def public(package: Path, room: str = "") -> set[str]:
    """The names that a room offers: ``__all__``, or all that a room of one file defines without an underscore."""
    path = package / room / "__init__.py"
    single = not path.is_file()
    names: set[str] = set()
    for node in ast.parse((package / f"{room}.py" if single else path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound = {target.id for target in targets if isinstance(target, ast.Name)}
            if "__all__" in bound and node.value is not None:
                return set(ast.literal_eval(node.value))
            names |= bound
    return {name for name in names if single and not name.startswith("_")}


def attributes_of(path: Path, bound: dict[str, str]) -> Iterator[tuple[int, str, str]]:
    """(line, room, attribute) of every ``alias.attribute``, where ``bound`` names the room behind an alias."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            yield node.lineno, bound[node.value.id], node.attr


def aliases(path: Path, package: Path) -> dict[str, str]:
    """Names of a file that stand for a whole room: ``from package import room as alias``."""
    known = rooms(package)
    return {
        alias.asname or alias.name: alias.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == package.name and not node.level
        for alias in node.names
        if alias.name in known
    }


def reaches(path: Path, package: Path, own: str | None = None) -> Iterator[tuple[int, str, str]]:
    """(line, room, fault) of every use of another room; the fault is empty where the room offers what is used."""
    known = rooms(package)
    used: list[tuple[int, str, str]] = []
    for found in imports(path, package):
        top, _, rest = found.source.partition(".")
        if top != package.name:
            continue
        if not rest and found.name in known:
            yield found.line, found.name, ""
        elif not rest and own is None and found.name in public(package):
            pass  # what the package itself names, used from outside of it
        elif not rest or found.name is None:
            yield found.line, rest.partition(".")[0], f"imports {found.source}.{found.name or ''} as a whole"
        else:
            room, _, inside = rest.partition(".")
            if inside and room != own:
                yield found.line, room, f"imports {found.name} from {found.source}, past the room's __init__"
            else:
                used.append((found.line, room, found.name))
    for line, room, name in [*used, *attributes_of(path, aliases(path, package))]:
        if room == own or name in public(package, room):
            yield line, room, ""
        elif name.startswith("_"):
            yield line, room, f"uses the private name {room}.{name}"
        else:
            yield line, room, f"uses {room}.{name}, which the room does not name"


def faults(package: Path, levels: list[set[str]]) -> list[str]:
    """Every break of the rules: a module imports its own room and what rooms of lower levels name, and nothing else."""
    level = {room: number for number, names in enumerate(levels) for room in names}
    known = rooms(package)
    found = [f"{room} stands on no level" for room in known.keys() - level.keys()]
    found += [f"unused permission: there is no {room}" for room in level.keys() - known.keys()]
    below: set[int] = set()  # levels that the level above them imports
    for own, paths in known.items():
        for path in paths:
            for line, room, fault in reaches(path, package, own):
                where = f"{path.relative_to(package).as_posix()}:{line}"
                if fault:
                    found.append(f"{where} {fault}")
                if room == own or room not in level or own not in level:
                    continue
                if level[room] == level[own]:
                    found.append(f"{where} imports {room}, which stands beside it on level {level[own]}")
                elif level[room] > level[own]:
                    found.append(f"{where} imports {room} of the higher level {level[room]}")
                elif level[room] == level[own] - 1:
                    below.add(level[room])
    unused = sorted(set(range(len(levels) - 1)) - below)
    found += [f"unused permission: level {number + 1} imports nothing of level {number}" for number in unused]
    return sorted(set(found))
