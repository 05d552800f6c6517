"""Graphs and files for other engines give the model's own answers, and files that hold code are refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ensemble_kd import (
    AP,
    CCL,
    KD,
    EnsembleKD,
    EnsembleKDError,
    MaskedItem,
    NextItem,
)
from ensemble_kd.data import synthetic
from ensemble_kd.encoders import BERT4Rec, Caser, GRU4Rec, SASRec
from ensemble_kd.export import (
    Scorer,
    load,
    save,
    to_onnx,
    to_program,
)
from ensemble_kd.losses.terms import terms_by_name

V, LENGTH = 60, 9
DATA = synthetic(num_users=40, num_items=100)
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "BERT4Rec": lambda: BERT4Rec(V, d_model=8, max_len=LENGTH, init_std=0.3),
    "SASRec": lambda: SASRec(V, d_model=8, max_len=LENGTH, init_std=0.3),
    "GRU4Rec": lambda: GRU4Rec(V, d_model=8, max_len=LENGTH),
    "Caser": lambda: Caser(V, d_model=8, max_len=LENGTH),
}


def ensemble(name: str, n: int = 3) -> EnsembleKD:
    model = EnsembleKD(ENCODERS[name], n, classifier="tied" if name == "SASRec" else "linear")
    with torch.no_grad():
        model.item_classifier.bias.normal_()
    return model.eval()


def inputs(b: int, length: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, V + 1, (b, length), generator=g)
    for row in range(b):
        ids[row, : int(torch.randint(length, (), generator=g))] = 0
    return ids


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
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = ensemble(name)
    for part in (model, model.member(0)):
        session = onnxruntime.InferenceSession(to_onnx(part, tmp_path / "model.onnx"))
        for shape in SHAPES:
            ids = inputs(*shape, seed=3)
            (scores,) = session.run(["scores"], {"item_ids": ids.numpy()})
            torch.testing.assert_close(torch.from_numpy(scores), part(ids), rtol=0, atol=1e-5)
    top = onnxruntime.InferenceSession(to_onnx(model, tmp_path / "top.onnx", k=5))
    ids = inputs(4, 6)
    scores, items = top.run(["scores", "items"], {"item_ids": ids.numpy()})
    expected = model.recommend(ids, k=5, exclude_seen=False)
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


# --------------------------------------------------------------------------------------------- weights without code


@pytest.mark.parametrize("name", ENCODERS)
def test_a_saved_model_is_the_model(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = ensemble(name)
    again = load(save(model, tmp_path / "kept"), ENCODERS[name]).eval()
    assert sorted(os.listdir(tmp_path / "kept")) == ["config.json", "model.safetensors"]
    assert (again.objective, again.losses, again.classifier) == (model.objective, model.losses, model.classifier)
    for (key, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(a, b)
    ids = inputs(4, 6)
    assert torch.equal(again(ids), model(ids))


def test_losses_objective_and_attributes(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    losses = 0.5 * AP() + 0.1 * CCL(temperature=0.7, pool="mean") + 2.0 * KD(scale_by_temperature_squared=True)
    objective = MaskedItem(mask_ratio=0.4, views=3, newest=None)

    def encoder() -> nn.Module:
        return BERT4Rec(100, d_model=4, max_len=9)

    model = EnsembleKD(encoder, 2, objective=objective, losses=losses, item_attributes=DATA.item_attributes)
    whole = load(save(model, tmp_path), encoder, item_attributes=DATA.item_attributes)
    assert whole.objective == objective
    assert terms_by_name(whole.losses) == terms_by_name(model.losses)
    assert torch.equal(whole.attribute_classifier.weight, model.attribute_classifier.weight)  # type: ignore[arg-type]
    served = load(tmp_path, encoder)
    assert list(terms_by_name(served.losses)) == [name for name in terms_by_name(whole.losses) if name != "ap"]
    ids = DATA.inputs("test", 8)
    assert torch.equal(served.eval()(ids), model.eval()(ids))


def test_tied_weights_of_an_encoder_stand_once(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")

    class Tied(SASRec):
        def __init__(self) -> None:
            super().__init__(V, d_model=4, max_len=5)
            self.decoder = nn.Linear(4, V + 2, bias=False)
            self.decoder.weight = self.item_embedding.weight

    model = EnsembleKD(Tied, 2)
    save(model, tmp_path)
    stored = safetensors.load_file(tmp_path / "model.safetensors")
    assert ("encoder.decoder.weight" in stored) != ("encoder.item_embedding.weight" in stored)
    again = load(tmp_path, Tied)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


class Trap:
    """What unpickles into a file of its own making."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (Path.touch, (self.path,))  # type: ignore[return-value]


def test_files_with_code_and_damaged_files_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    folder, sprung = save(ensemble("SASRec"), tmp_path / "kept"), tmp_path / "sprung"
    weights = (folder / "model.safetensors").read_bytes()
    for content in (pickle.dumps(Trap(sprung)), weights[: len(weights) // 2], b""):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(EnsembleKDError, match=r"load: expected a whole model\.safetensors"):
            load(folder, ENCODERS["SASRec"])
    torch.save({"model": Trap(sprung)}, folder / "model.safetensors")
    with pytest.raises(EnsembleKDError, match=r"load: expected a whole model\.safetensors"):
        load(folder, ENCODERS["SASRec"])
    assert not sprung.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(EnsembleKDError, match="formats, which may hold code, are not opened"):
        load(folder, ENCODERS["SASRec"])


def test_configurations_that_are_not_ours(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    folder = save(ensemble("SASRec"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for text, message in (
        ("{", r"load: expected a config\.json of save\(\)"),
        (json.dumps(config | {"format": 7}), "load: expected format 1, got 7"),
        (json.dumps(config | {"objective": None}), r"load: expected objective=\.\.\."),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(EnsembleKDError, match=message):
            load(folder, ENCODERS["SASRec"])
    assert load(folder, ENCODERS["SASRec"], objective=NextItem()).objective == NextItem()


def test_another_encoder_is_named(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    folder = save(ensemble("SASRec"), tmp_path)
    with pytest.raises(EnsembleKDError, match=r"encoder\.position_embedding: \(3, 9, 8\) saved, \(3, 5, 8\) here"):
        load(folder, lambda: SASRec(V, d_model=8, max_len=5))
    with pytest.raises(EnsembleKDError, match="not in the model"):
        load(folder, lambda: SASRec(V, d_model=8, max_len=LENGTH, num_layers=1))


@pytest.mark.slow
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
