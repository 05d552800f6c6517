"""The tool that changes code, on code of a few lines."""

from __future__ import annotations

import ast

import pytest

from tests.mutation.__main__ import ROOT, files
from tests.mutation.changes import changed, changes
from tests.mutation.equivalent import EQUIVALENT

SOURCE = '''
LIMIT = 3
def f(x: int = 1) -> int:
    """Text."""
    if x < 2 and not LIMIT:
        x += 1
    g(x)
    if x > 9:
        raise ValueError(f"{x + 1}")
    return -x
'''


def test_every_change_is_another_program_and_texts_of_errors_stay() -> None:
    found = changes(SOURCE)
    results = [changed(SOURCE, change) for change in found]
    assert len(set(results)) == len(results)
    plain = ast.unparse(ast.parse(SOURCE))
    assert plain not in results
    assert all("LIMIT = 3" in result and "{x + 1}" in result and '"""Text."""' in result for result in results)
    after = {change.key("f.py", SOURCE).rpartition(" -> ")[2] for change in found}
    assert {
        "if x <= 2 and (not LIMIT):",
        "if x < 2 or not LIMIT:",
        "if x < 2 and LIMIT:",
        "if x < 3 and (not LIMIT):",
        "if not (x < 2 and (not LIMIT)):",
        "x -= 1",
        "x += 2",
        "pass",
        "if x >= 9:",
        "if x > 10:",
        "return x",
        "return None",
    } <= after


@pytest.mark.skipif(not (ROOT / "ensemble_kd" / "__init__.py").is_file(), reason="the files of a checkout")
def test_what_is_listed_as_equivalent_is_of_files_that_may_change() -> None:
    known = files()
    assert {key.partition(" ")[0] for key in EQUIVALENT} <= known.keys()
    assert all(reason for reason in EQUIVALENT.values())
