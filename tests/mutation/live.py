"""Put a change into functions that are already imported, wherever they are in use by now."""

from __future__ import annotations

import ast
import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType

from tests.mutation.changes import Change, changed_tree

Key = tuple[str, int, int]


def put(path: Path, change: Change) -> None:
    """Give the functions of a module, and those within them, the code that they have with the change made.

    Raises:
        ValueError: a function that reads variables of the one around it reads others with the change.
    """
    source = path.read_text(encoding="utf-8")
    before, after = ast.parse(source), changed_tree(source, change)
    keys = {code: key for key, code in _codes(compile(before, str(path), "exec", dont_inherit=True))}
    codes = dict(_codes(compile(after, str(path), "exec", dont_inherit=True)))
    known = {
        (name, line): (old, new)
        for (name, line, old), (_, _, new) in zip(_arguments(before), _arguments(after), strict=True)
        if ast.dump(old) != ast.dump(new)
    }
    for function in [each for each in gc.get_objects() if type(each) is FunctionType]:
        old = function.__code__
        if old.co_filename == str(path) and keys[old] in codes:
            function.__code__ = codes[keys[old]]
            if (arguments := known.get(keys[old][:2])) is not None:
                _set_defaults(function, *arguments)


def _set_defaults(function: FunctionType, before: ast.arguments, after: ast.arguments) -> None:
    def value(old: ast.expr, new: ast.expr, kept: object) -> object:
        if ast.dump(old) == ast.dump(new):
            return kept
        return eval(compile(ast.Expression(new), "default", "eval"), function.__globals__)

    pairs = zip(before.defaults, after.defaults, function.__defaults__ or (), strict=True)
    function.__defaults__ = tuple(value(*pair) for pair in pairs) or None
    named = function.__kwdefaults__ or {}
    for argument, old, new in zip(before.kwonlyargs, before.kw_defaults, after.kw_defaults, strict=True):
        if old is not None and new is not None:
            named[argument.arg] = value(old, new, named[argument.arg])


def _arguments(tree: ast.Module) -> Iterator[tuple[str, int, ast.arguments]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name, min([node.lineno, *(each.lineno for each in node.decorator_list)]), node.args


def _codes(module: CodeType) -> Iterator[tuple[Key, CodeType]]:
    """Every code object within a module's, by name, line, and number among those of this name and line."""
    seen: Counter[tuple[str, int]] = Counter()
    todo = [module]
    while todo:
        code = todo.pop(0)
        place = code.co_name, code.co_firstlineno
        yield (*place, seen[place]), code
        seen[place] += 1
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
