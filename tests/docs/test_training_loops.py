"""What docs/how-to/training-loops.md shows of other libraries' loops, where they are installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.snippets import snippets

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "training-loops.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the Trainer's own
def test_the_trainer_of_hugging_face_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r"## Hugging Face's Trainer\n.*?```py\n(.*?)```", text, re.DOTALL)
    assert found is not None
    namespace: dict[str, object] = {"__name__": "__main__"}
    check = """
from ensemble_kd.evaluation import evaluate
before = {name: value.clone() for name, value in model.state_dict().items()}
valid = evaluate(model, data, "valid").rows["ensemble"]["NDCG@10"]
"""
    for code in (snippets(text)[0].code, check, found[1]):
        exec(compile(code, PAGE.name, "exec"), namespace)
    after = """
changed = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
better = evaluate(model, data, "valid").rows["ensemble"]["NDCG@10"] > valid
"""
    exec(after, namespace)
    assert namespace["better"]
    assert any("item_classifier" in name for name in namespace["changed"])  # type: ignore[attr-defined]
