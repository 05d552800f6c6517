"""A saved model is the model, another encoder is refused, and no damaged or foreign file is taken for one."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ensemble_kd import (
    AP,
    CCL,
    KD,
    EnsembleKD,
    EnsembleKDError,
    MaskedItem,
    NextItem,
)
from ensemble_kd.data import ItemAttributes, synthetic
from ensemble_kd.encoders import BERT4Rec, SASRec
from ensemble_kd.export import load, save
from ensemble_kd.losses import Ambiguity, terms_by_name
from tests.export.models import ENCODERS, LENGTH, V, ensemble, inputs

pytest.importorskip("safetensors", reason="safetensors is not installed")
NAME = "model.safetensors"
DATA = synthetic(num_users=40, num_items=100)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_saved_model_is_the_model(name: str, tmp_path: Path) -> None:
    model = ensemble(name)
    again = load(save(model, tmp_path / "made" / NAME), ENCODERS[name])
    assert os.listdir(tmp_path / "made") == [NAME]
    assert (again.objective, again.losses, again.classifier) == (model.objective, model.losses, model.classifier)
    for (key, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(a, b)
    ids = inputs(4, 6)
    assert torch.equal(again(ids), model(ids))
    assert not again.training  # so that two calls agree


def test_losses_objective_and_attributes(tmp_path: Path) -> None:
    kd = 2.0 * KD(scale_by_temperature_squared=True)
    losses = 0.5 * AP() + 0.1 * CCL(temperature=0.7, pool="mean") + kd + -0.5 * Ambiguity()
    objective = MaskedItem(mask_ratio=0.4, views=3, newest=None)

    def encoder() -> nn.Module:
        return BERT4Rec(100, d_model=4, max_len=9)

    model = EnsembleKD(encoder, 2, objective=objective, losses=losses, item_attributes=DATA.item_attributes)
    whole = load(save(model, tmp_path / NAME), encoder, item_attributes=DATA.item_attributes)
    assert whole.objective == objective
    assert terms_by_name(whole.losses) == terms_by_name(model.losses)
    assert torch.equal(whole.attribute_classifier.weight, model.attribute_classifier.weight)  # type: ignore[arg-type]
    served = load(tmp_path / NAME, encoder)
    assert list(terms_by_name(served.losses)) == [name for name in terms_by_name(whole.losses) if name != "ap"]
    ids = DATA.inputs("test", 8)
    assert torch.equal(served.eval()(ids), model.eval()(ids))


def test_a_single_attribute_is_saved_as_well(tmp_path: Path) -> None:
    attributes = ItemAttributes.from_dict({1: [1], 3: [1]}, num_items=9)

    def encoder() -> nn.Module:
        return SASRec(9, d_model=4, max_len=5)

    model = EnsembleKD(encoder, 2, item_attributes=attributes)
    again = load(save(model, tmp_path / NAME), encoder, item_attributes=attributes)
    assert terms_by_name(again.losses) == terms_by_name(model.losses)
    assert torch.equal(again.attribute_classifier.weight, model.attribute_classifier.weight)  # type: ignore[arg-type]


def test_tied_weights_of_an_encoder_stand_once(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")

    class Tied(SASRec):
        def __init__(self) -> None:
            super().__init__(V, d_model=4, max_len=5)
            self.decoder = nn.Linear(4, V + 2, bias=False)
            self.decoder.weight = self.item_embedding.weight

    model = EnsembleKD(Tied, 2)
    save(model, tmp_path / NAME)
    stored = safetensors.load_file(tmp_path / NAME)
    assert ("encoder.decoder.weight" in stored) != ("encoder.item_embedding.weight" in stored)
    again = load(tmp_path / NAME, Tied)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (Path.touch, (self.path,))  # type: ignore[return-value]


def test_files_with_code_are_refused(tmp_path: Path) -> None:
    path, sprung = save(ensemble("SASRec"), tmp_path / NAME), tmp_path / "sprung"
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(EnsembleKDError, match=r"load: expected a whole file of save\(\)"):
        load(path, ENCODERS["SASRec"])
    torch.save({"model": Trap(sprung)}, path)
    with pytest.raises(EnsembleKDError, match="which may have code in them, are not opened"):
        load(path, ENCODERS["SASRec"])
    assert not sprung.exists()
    path.unlink()
    for missing in (path, tmp_path):
        with pytest.raises(EnsembleKDError, match=r"load: expected a whole file of save\(\)"):
            load(missing, ENCODERS["SASRec"])


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Single bits all over the file, and cuts. A flip that leaves every value as it was may load."""
    model = EnsembleKD(lambda: SASRec(6, d_model=2, num_layers=1, max_len=3), n=1).eval()
    path = save(model, tmp_path / NAME)
    content, scores = path.read_bytes(), model(torch.tensor([[1, 2]]))
    damaged = [content[:cut] for cut in range(0, len(content), len(content) // 40)] + [content + b"0"]
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 1 << (place // 3 % 8)
        damaged.append(bytes(changed))
    refused = 0
    for one in damaged:
        path.write_bytes(one)
        try:
            again = load(path, lambda: SASRec(6, d_model=2, num_layers=1, max_len=3))
        except EnsembleKDError:
            refused += 1
            continue
        assert torch.equal(again(torch.tensor([[1, 2]])), scores)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert len(damaged) - refused <= 0.02 * len(damaged), (len(damaged), refused)


def test_a_save_that_fails_leaves_the_older_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(ensemble("SASRec"), tmp_path / NAME)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(EnsembleKDError, match="No space left on device"):
            save(ensemble("SASRec", n=2), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [NAME]
    with pytest.raises(EnsembleKDError, match="save: expected the path of a file"):
        save(ensemble("SASRec"), tmp_path)


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ensemble_kd.export.configuration.FORMAT", 7)
        path = save(ensemble("SASRec"), tmp_path / NAME)
    with pytest.raises(EnsembleKDError, match=r"load: expected format 1 in .*, got 7"):
        load(path, ENCODERS["SASRec"])


def test_an_objective_of_the_users_own_is_asked_for(tmp_path: Path) -> None:
    class Own(NextItem):
        pass

    path = save(EnsembleKD(ENCODERS["SASRec"], 2, objective=Own()), tmp_path / NAME)
    with pytest.raises(EnsembleKDError, match=r"load: expected objective=\.\.\."):
        load(path, ENCODERS["SASRec"])
    assert type(load(path, ENCODERS["SASRec"], objective=Own()).objective) is Own


def test_another_encoder_is_named(tmp_path: Path) -> None:
    path = save(ensemble("SASRec"), tmp_path / NAME)
    with pytest.raises(EnsembleKDError, match=r"encoder\.position_embedding: \(3, 9, 8\) saved, \(3, 5, 8\) here"):
        load(path, lambda: SASRec(V, d_model=8, max_len=5))
    with pytest.raises(EnsembleKDError, match="not in the model"):
        load(path, lambda: SASRec(V, d_model=8, max_len=LENGTH, num_layers=1))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"scale_embedding": False}, r"member 0: scale=2\.8\d* saved, scale=1\.0 here"),
        ({"num_heads": 2}, r"member 0\.blocks\.0\.attention: num_heads=1 saved, num_heads=2 here"),
        ({"dropout": 0.5}, r"member 0: dropout=0\.2 saved, dropout=0\.5 here; .*and 10 more"),
    ],
)
def test_settings_that_no_weight_shows_are_compared(settings: dict[str, object], text: str, tmp_path: Path) -> None:
    """Weights of the same shapes, and yet other items for nearly every user."""
    path = save(ensemble("SASRec"), tmp_path / NAME)

    def other() -> nn.Module:
        return SASRec(V, d_model=8, max_len=LENGTH, **settings)  # type: ignore[arg-type]

    with pytest.raises(EnsembleKDError, match=rf"load: expected the encoder that was saved, got {text}"):
        load(path, other)
    assert load(path, other, check_settings=False).num_items == V


def test_weights_keep_their_precision(tmp_path: Path) -> None:
    model = ensemble("SASRec").double()
    again = load(save(model, tmp_path / NAME), ENCODERS["SASRec"])
    assert again.device.type == "cpu"
    assert again(inputs(4, 6)).dtype == torch.float64
    assert torch.equal(again(inputs(4, 6)), model(inputs(4, 6)))


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnsembleKDError, match=r"save: expected safetensors.*pip install 'ensemble_kd\[export\]'"):
        save(ensemble("SASRec", n=1), tmp_path / NAME)
    with pytest.raises(EnsembleKDError, match=r"load: expected safetensors.*pip install 'ensemble_kd\[export\]'"):
        load(tmp_path / NAME, ENCODERS["SASRec"])
