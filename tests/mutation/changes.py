"""The changes: operators, comparisons, constants, conditions, returns and statements of a module's functions."""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[type[ast.AST], type[Any]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Add,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Change:
    """One place of a module, and what stands there instead."""

    function: str
    line: int
    index: int  # of the place, in the order of ``places``
    variant: int

    def key(self, file: str, source: str) -> str:
        """A name that does not change with the lines above: the first line of the module that differs, and how."""
        pairs = zip(_plain(source), changed(source, self).splitlines(), strict=False)
        before, after = next((a, b) for a, b in pairs if a != b)
        return f"{file} {self.function}: {before.strip()} -> {after.strip()}"


@functools.lru_cache
def _plain(source: str) -> list[str]:
    return ast.unparse(ast.parse(source)).splitlines()


def changes(source: str) -> list[Change]:
    """List every change of a module."""
    found = []
    for index, (node, function) in enumerate(places(ast.parse(source))):
        for variant, _ in enumerate(variants(node)):
            found.append(Change(function, node.lineno, index, variant))
    return found


def changed(source: str, change: Change) -> str:
    """Return the module with the change made."""
    return ast.unparse(changed_tree(source, change))


def changed_tree(source: str, change: Change) -> ast.Module:
    """Return the module with the change made, its lines numbered as before."""
    tree = ast.parse(source)
    node, _ = list(places(tree))[change.index]
    new = list(variants(node))[change.variant]
    _Put(node, new).visit(tree)
    return ast.fix_missing_locations(tree)


class _Put(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


def places(tree: ast.Module) -> Iterator[tuple[Any, str]]:
    """Yield the nodes of functions that may change, with the name of the function. Texts of errors are left alone."""
    yield from _within(tree, "", False)


def _within(node: ast.AST, name: str, runs: bool) -> Iterator[tuple[Any, str]]:
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr | ast.Assert):
                continue
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from _within(child, f"{name}.{child.name}".lstrip("."), isinstance(child, ast.FunctionDef))
                continue
            if runs:
                yield child, name
            yield from _within(child, name, runs)


def variants(node: Any) -> Iterator[Any]:
    """Yield what a node may become; nothing for most kinds."""
    new = copy.deepcopy(node)
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            new.op = OPERATORS[type(op)]()
            yield new
        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            new.ops = [OPERATORS[type(op)]()]
            yield new
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield new.operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(2 * value + 1)
        case ast.If() if not _refuses(node):
            new.test = ast.UnaryOp(ast.Not(), new.test)
            yield ast.If(new.test, new.body, new.orelse)
        case ast.IfExp():
            yield ast.IfExp(new.test, new.orelse, new.body)
        case ast.Return(value=ast.expr()) if not isinstance(node.value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.AugAssign(op=op) if type(op) in OPERATORS:
            new.op = OPERATORS[type(op)]()
            yield new


def _refuses(node: ast.If) -> bool:
    """A condition that only leads to an error: its parts are changed one by one."""
    return isinstance(node.body[-1], ast.Raise) and not isinstance(node.test, ast.Name)
