"""A model goes to the Hub and comes back the same; a card says what the run was; nothing of a repository is run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ensemble_kd
from ensemble_kd import EnsembleKD, EnsembleKDError, fit
from ensemble_kd.data import SequenceData, Vocabulary, synthetic
from ensemble_kd.encoders import SASRec
from ensemble_kd.evaluation import Evaluation, evaluate
from ensemble_kd.export import Card, from_pretrained, push_to_hub, save_pretrained
from ensemble_kd.training import FitResult
from tests.export.hub_server import TOKEN, running

hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
V, LENGTH = 90, 8
Run = tuple[EnsembleKD, SequenceData, FitResult, Evaluation]


def encoder() -> SASRec:
    return SASRec(V, d_model=4, max_len=LENGTH)


@pytest.fixture(scope="module")
def run() -> Run:
    data = synthetic(num_users=40, num_items=V)
    model = EnsembleKD(encoder, 2, vocabulary=Vocabulary(f"item {i}" for i in range(1, V + 1)))
    result = fit(model, data, epochs=2, batch_size=64, progress=False)
    return model.eval(), data, result, evaluate(model, data, "test")


def test_a_folder_is_the_model(run: Run, tmp_path: Path) -> None:
    model, data, _, _ = run
    folder = save_pretrained(model, tmp_path / "tiny")
    again = from_pretrained(folder, encoder)
    ids = data.inputs("test", LENGTH)
    assert torch.equal(again(ids), model(ids))
    assert again.vocabulary == model.vocabulary
    assert not again.training
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (settings["n"], settings["num_items"], settings["max_len"]) == (2, V, LENGTH)


def test_a_card_is_made_from_the_run(run: Run) -> None:
    model, data, result, test = run
    made = Card(data, "Made-up users", result, test, license="mit", text="Of a test.").markdown(model, "me/tiny-emkd")
    head, body = hub.ModelCard(made).data.to_dict(), hub.ModelCard(made).text
    assert (head["library_name"], head["license"]) == ("ensemble_kd", "mit")
    (index,) = head["model-index"]
    assert index["name"] == "tiny-emkd"
    (found,) = index["results"]
    assert found["dataset"] == {"name": "Made-up users", "type": "made-up-users"}
    assert {each["name"]: each["value"] for each in found["metrics"]} == {
        name: round(value, 4) for name, value in test.rows["ensemble"].items()
    }
    rows = dict(line[2:-2].split(" | ", 1) for line in body.splitlines() if re.fullmatch(r"\| .* \| .* \|", line))
    assert rows["users"] == "40"
    assert rows["interactions"] == f"{data.num_interactions:,}"
    assert rows["items"] == str(V)
    assert rows["objective"] == f"`{model.objective!r}`"
    assert rows["losses"] == f"`{model.losses!r}`"
    assert rows["member 1"] == " | ".join(f"{value:.4f}" for value in test.rows["member 1"].values())
    assert rows["epochs"] == f"2; the weights are those of epoch {result.best_epoch + 1}"
    assert rows["precision"] == result.precision
    assert (rows["torch"], rows["ensemble_kd"]) == (str(torch.__version__), ensemble_kd.__version__)
    assert test.protocol in body
    assert "Of a test." in body
    assert 'from_pretrained("me/tiny-emkd", encoder_fn)' in body


def test_a_card_of_nothing_has_no_empty_part(run: Run) -> None:
    made = Card().markdown(run[0], "tiny")
    assert [line for line in made.splitlines() if line.startswith("## ")] == ["## Use", "## Model", "## Versions"]
    assert "model-index" not in made


def test_a_card_of_another_run_is_refused(run: Run) -> None:
    model, _, _, test = run
    with pytest.raises(EnsembleKDError, match="Card: expected data of 90 items, as the model, got 80"):
        Card(synthetic(num_users=9, num_items=80)).markdown(model, "tiny")
    rows = {name: row for name, row in test.rows.items() if name != "member 1"}
    with pytest.raises(EnsembleKDError, match="of the 2 members of this model, got one of 1"):
        Card(evaluation=Evaluation(test.protocol, rows, {})).markdown(model, "tiny")


def test_your_own_words_are_not_lost(run: Run, tmp_path: Path) -> None:
    save_pretrained(run[0], tmp_path, card=Card(text="First."))
    save_pretrained(run[0], tmp_path, card=Card(text="Second."))
    assert "Second." in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text("# Mine", encoding="utf-8")
    with pytest.raises(EnsembleKDError, match=r"no README\.md of yours"):
        save_pretrained(run[0], tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# Mine"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnsembleKDError, match=r"a folder with model\.safetensors"):
        from_pretrained(tmp_path, encoder)


def test_a_folder_is_verified(run: Run, tmp_path: Path) -> None:
    weights = save_pretrained(run[0], tmp_path) / "model.safetensors"
    with pytest.raises(EnsembleKDError, match="expected the encoder that was saved"):
        from_pretrained(tmp_path, lambda: SASRec(V, d_model=4, max_len=LENGTH, num_heads=2))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(EnsembleKDError, match="The file is damaged"):
        from_pretrained(tmp_path, encoder)


def test_without_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # type: ignore[arg-type]
    for call in (lambda: save_pretrained(run[0], tmp_path / "a"), lambda: push_to_hub(run[0], "me/tiny")):
        with pytest.raises(EnsembleKDError, match=r"ensemble_kd\[hub\]"):
            call()
    with pytest.raises(EnsembleKDError, match=r"ensemble_kd\[hub\]"):
        from_pretrained("me/tiny", encoder)
    assert not (tmp_path / "a").exists()


CLIENT = """
import os, sys
import torch
from ensemble_kd import EnsembleKD, EnsembleKDError
from ensemble_kd.encoders import SASRec
from ensemble_kd.export import Card, from_pretrained, push_to_hub

def refused(call, text):
    try:
        call()
    except EnsembleKDError as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)

encoder = lambda: SASRec(90, d_model=4, max_len=8)
model, other = EnsembleKD(encoder, 2).eval(), EnsembleKD(encoder, 2, seed=1).eval()
ids = torch.tensor([[0, 1, 2, 4]])
print(push_to_hub(model, "me/tiny", card=Card(text="One."), private=True, message="The first"))
print(push_to_hub(other, "me/tiny", card=Card(text="Two.")))
assert torch.equal(from_pretrained("me/tiny", encoder)(ids), other(ids))
first = from_pretrained("me/tiny", encoder, revision="0" * 39 + "1")
assert torch.equal(first(ids), model(ids))
assert torch.equal(from_pretrained("me/tiny", encoder, local_files_only=True)(ids), other(ids))
two_heads = lambda: SASRec(90, d_model=4, max_len=8, num_heads=2)
refused(lambda: from_pretrained("me/tiny", two_heads), "the encoder that was saved")
refused(lambda: from_pretrained("me/none", encoder), "a folder, or a repository with model.safetensors, got 'me/none'")
refused(lambda: from_pretrained("me/tiny", encoder, revision="no"), "a repository with model.safetensors")
refused(lambda: from_pretrained("no such name!", encoder), "a folder, or a repository")
refused(lambda: from_pretrained("me/other", encoder, local_files_only=True), "a folder, or a repository")
refused(lambda: push_to_hub(model, "me/tiny", token="another"), "a repository that can be written")
print("done")
"""


@pytest.mark.slow
def test_there_and_back(tmp_path: Path) -> None:
    """A process of its own, since huggingface_hub reads the address of its server when it is imported."""
    with running() as server:
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", CLIENT], env={**os.environ, **settings}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        first, second, last = done.stdout.split("\n")[:3]
        assert (first, second) == tuple(f"{server.url}/me/tiny/commit/{number:040x}" for number in (1, 2))
        assert last == "done"
        assert server.private["me/tiny"]
        assert server.messages == ["The first", "Upload an ensemble"]
        old, new = server.commits["me/tiny"]
        assert old.keys() == new.keys() == {"README.md", "config.json", "model.safetensors"}
        assert b"One." in old["README.md"]
        assert b"Two." in new["README.md"]
        assert b"# tiny" in new["README.md"]
        # One file is ever read: nothing of a repository can be run.
        assert {request.rpartition("/")[2] for request in server.requests} == {"model.safetensors"}
