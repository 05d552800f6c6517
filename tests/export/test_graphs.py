"""Graphs for other engines give the model's own answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ensemble_kd import EnsembleKD, EnsembleKDError, NextItem
from ensemble_kd.export import Scorer, to_onnx, to_program
from ensemble_kd.internal import onnx_fixes_recurrent_batches
from tests.export.models import ENCODERS, LENGTH, V, ensemble, inputs

SHAPES = [(1, 1), (2, 3), (5, 4), (3, LENGTH - 1), (1, LENGTH + 3)]  # the last: more than the encoder reads


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_programs_of_torch_export(name: str, tmp_path: Path) -> None:
    """Saved and loaded, any batch and length up to the longest: the ensemble and a member."""
    model = ensemble(name)
    for i, part in enumerate((model, model.member(1))):
        torch.export.save(to_program(part), tmp_path / f"{i}.pt2")
        program = torch.export.load(tmp_path / f"{i}.pt2").module()
        for shape in SHAPES:
            ids = inputs(*shape)
            torch.testing.assert_close(program(ids), part(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_onnx_runtime_agrees(name: str, tmp_path: Path) -> None:
    """Any batch and length: the ensemble's scores."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = ensemble(name)
    if name == "GRU4Rec" and onnx_fixes_recurrent_batches():
        pytest.skip("torch 2.6 exports recurrent layers for one batch size, which to_onnx refuses")
    session = onnxruntime.InferenceSession(to_onnx(model, tmp_path / "model.onnx"))
    for shape in SHAPES:
        ids = inputs(*shape, seed=3)
        (scores,) = session.run(["scores"], {"item_ids": ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), model(ids), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_onnx_runtime_agrees_on_the_best_items(tmp_path: Path) -> None:
    """Of a member, whose encoder is the same part of the graph as in the ensemble's."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    one = ensemble("SASRec").member(0)
    session = onnxruntime.InferenceSession(to_onnx(one, tmp_path / "top.onnx", k=5))
    for shape in SHAPES:
        ids = inputs(*shape, seed=3)
        scores, items = session.run(["scores", "items"], {"item_ids": ids.numpy()})
        expected = one.recommend(ids, k=5, exclude_seen=False)
        assert items.tolist() == expected.items.tolist()
        torch.testing.assert_close(torch.from_numpy(scores), expected.scores, rtol=0, atol=1e-5)


def test_a_scorer_of_many_items() -> None:
    model = ensemble("SASRec", n=2)
    ids = inputs(3, 5)
    torch.testing.assert_close(Scorer(model)(ids), model(ids))
    scores, items = Scorer(model, k=3)(ids)
    assert items.tolist() == model.recommend(ids, k=3, exclude_seen=False).items.tolist()
    assert scores.shape == (3, 3)


def test_what_cannot_be_traced_is_said() -> None:
    class Branching(nn.Module):
        num_items = V

        def __init__(self) -> None:
            super().__init__()
            self.item_embedding = nn.Embedding(V + 2, 4)

        def forward(self, item_ids: Tensor) -> Tensor:
            return self.item_embedding(item_ids) * (1 if bool(item_ids.sum() > 3) else 2)  # type: ignore[no-any-return]

    model = EnsembleKD(Branching, 2, objective=NextItem(), backend="loop")
    with pytest.raises(EnsembleKDError, match=r"export: expected an encoder that torch\.export can trace"):
        to_program(model)


def test_an_encoder_of_any_length() -> None:
    class Mean(nn.Module):
        num_items = V

        def __init__(self) -> None:
            super().__init__()
            self.item_embedding = nn.Embedding(V + 2, 4, padding_idx=0)

        def forward(self, item_ids: Tensor) -> Tensor:
            return self.item_embedding(item_ids).sum(1) / (item_ids != 0).sum(1, keepdim=True)  # type: ignore[no-any-return]

    model = EnsembleKD(Mean, 2).eval()
    program = to_program(model).module()
    for shape in ((1, 2), (4, 30)):
        torch.testing.assert_close(program(inputs(*shape)), model(inputs(*shape)), rtol=1e-5, atol=1e-6)


def test_onnx_refuses_recurrent_layers_where_torch_fixes_their_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    monkeypatch.setattr("ensemble_kd.export.graphs.onnx_fixes_recurrent_batches", lambda: True)
    with pytest.raises(EnsembleKDError, match=r"^to_onnx: expected torch 2\.7 or newer, got "):
        to_onnx(ensemble("GRU4Rec", n=1), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_onnx_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("onnx", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(EnsembleKDError, match=rf"to_onnx: expected {module}, .*'ensemble_kd\[export\]'"):
                to_onnx(ensemble("SASRec", n=1), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_program_needs_torch_alone(tmp_path: Path) -> None:
    """Another process loads the program without this library."""
    model = ensemble("SASRec")
    torch.export.save(to_program(model), tmp_path / "model.pt2")
    ids = inputs(3, 5)
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import sys, torch; sys.modules['ensemble_kd'] = None\n"
        f"program = torch.export.load(r'{tmp_path / 'model.pt2'}').module()\n"
        f"torch.save(program(torch.load(r'{tmp_path / 'ids.pt'}')), r'{tmp_path / 'scores.pt'}')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "scores.pt"), model(ids), rtol=1e-5, atol=1e-6)
