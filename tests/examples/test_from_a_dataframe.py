"""The tutorial's way from a DataFrame to a file of recommendations, run as it stands, with pandas and with polars."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from ensemble_kd.data import synthetic

ROOT = Path(__file__).parents[2]
LIBRARIES = ["pandas", "polars"]


def tutorial_code() -> str:
    blocks = re.findall(
        r"```py\n(.*?)```", (ROOT / "docs" / "tutorials" / "dataframe.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    (code,) = (block for block in blocks if "from_interactions" in block)
    return code


def interactions(library: Any) -> Any:
    data = synthetic(num_users=40, num_items=90)
    users = [u for u in range(40) for _ in range(int(data.offsets[u + 1] - data.offsets[u]))]
    columns = {"user_id": [f"user-{u}" for u in users], "item_id": [f"sku-{i}" for i in data.items.tolist()]}
    return library.DataFrame({**columns, "timestamp": list(range(len(users)))})


def test_the_way_takes_five_lines() -> None:
    lines = [line for line in tutorial_code().splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) == 5


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_tutorials_way(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, _ = pytest.importorskip(name), pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    table = interactions(library)
    write = table.to_parquet if name == "pandas" else table.write_parquet
    write("interactions.parquet")
    exec(tutorial_code().replace("pandas", name), {})
    found = library.read_parquet("recommendations.parquet")
    assert list(found.columns) == ["user_id", "item_id", "rank", "score"]
    assert len(found) == 40 * 10
    users, items, ranks = (found[column].to_list() for column in ("user_id", "item_id", "rank"))
    assert set(users) == set(table["user_id"].to_list())
    assert set(items) <= set(table["item_id"].to_list())
    assert ranks == list(range(1, 11)) * 40
    bought = set(zip(table["user_id"].to_list(), table["item_id"].to_list(), strict=True))
    assert not bought & set(zip(users, items, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_the_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(name)
    pytest.importorskip("pyarrow")
    flags = [f"--library={name}", "--users=60", "--items=90", "--epochs=1", f"--output={tmp_path}"]
    script = str(ROOT / "examples" / "from_a_dataframe.py")
    monkeypatch.setattr(sys, "argv", [script, *flags])
    runpy.run_path(script, run_name="__main__")
    *_, said, before, after = capsys.readouterr().out.splitlines()
    assert said == "2 items more. For user-0, then and now:"
    for line in (before, after):
        assert re.fullmatch(r"(sku-\w+, ){4}sku-\w+", line)
    assert (tmp_path / "recommendations.parquet").is_file()
