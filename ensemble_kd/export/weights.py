"""``save`` and ``load``: a model as safetensors with its configuration beside them. Loading runs no code of the files.

Needs safetensors (the extra ``export``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ensemble_kd.ensemble import Attributes, EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.files import replacing
from ensemble_kd.losses import (
    AP,
    CCL,
    ICL,
    KD,
    Loss,
    terms_by_name,
)
from ensemble_kd.objectives import MaskedItem, NextItem, Objective

FORMAT = 1
WEIGHTS, CONFIGURATION = "model.safetensors", "config.json"
OBJECTIVES: Mapping[str, Callable[..., Objective]] = {"MaskedItem": MaskedItem, "NextItem": NextItem}
TERMS: Mapping[str, Callable[..., Loss]] = {"AP": AP, "ICL": ICL, "CCL": CCL, "KD": KD}


def save(model: EnsembleKD, folder: str | PathLike[str]) -> Path:
    """Write ``model.safetensors`` and ``config.json`` to ``folder``, each whole or not at all.

    The encoder's own code and settings are not in them: ``load`` asks for the factory.

    Returns:
        The folder.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from ensemble_kd.encoders import SASRec
        >>> model = EnsembleKD(lambda: SASRec(9, d_model=4, max_len=5), n=2)
        >>> with TemporaryDirectory() as folder:
        ...     same = load(save(model, folder), lambda: SASRec(9, d_model=4, max_len=5))
        >>> ids = torch.tensor([[0, 1, 2]])
        >>> torch.equal(same.eval()(ids), model.eval()(ids))
        True
    """
    import safetensors.torch

    model.place.require_whole("save")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors, storages = {}, {}
    for name, tensor in model.state_dict().items():  # one file may not hold a tensor twice: tied ones stand once
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in storages:
            continue
        storages[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    with replacing(path / CONFIGURATION) as file:
        file.write((json.dumps(_configuration(model), indent=1) + "\n").encode())
    with replacing(path / WEIGHTS) as file:
        file.write(safetensors.torch.save(tensors, {"format": "pt"}))
    return path


def _configuration(model: EnsembleKD) -> dict[str, Any]:
    objective = type(model.objective).__name__
    known = objective in OBJECTIVES and is_dataclass(model.objective)
    return {
        "format": FORMAT,
        "n": len(model),
        "num_items": model.num_items,
        "max_len": model.max_len,
        "num_attributes": 0 if model.item_attributes is None else model.item_attributes.num_attributes,
        "classifier": model.classifier,
        "objective": {"name": objective, **asdict(model.objective)} if known else None,  # type: ignore[call-overload]
        "losses": [
            {"weight": weight, "name": type(term).__name__, **asdict(term)}  # type: ignore[call-overload]
            for weight, term in terms_by_name(model.losses).values()
        ],
    }


def load(
    folder: str | PathLike[str],
    encoder_fn: Callable[[], nn.Module],
    *,
    objective: Objective | None = None,
    item_attributes: Attributes | None = None,
    device: torch.device | str = "cpu",
) -> EnsembleKD:
    """The model that ``save`` wrote.

    Args:
        folder: of ``save``.
        encoder_fn: the factory that the model was built with.
        objective: needed where the model had one of your own; otherwise the saved one.
        item_attributes: to go on training with AP; without them AP and its classifier are left out.
        device: where the model goes.

    Raises:
        EnsembleKDError: files that are missing, damaged or something else, a pickle say, or another encoder's weights.
    """
    import safetensors
    import safetensors.torch

    path = Path(folder)
    config = _read_configuration(path / CONFIGURATION)
    try:
        tensors = safetensors.torch.load_file(path / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        fix = "Pass the folder that save() wrote; other formats, which may hold code, are not opened."
        raise EnsembleKDError("load", f"a whole {WEIGHTS}", f"{path / WEIGHTS} ({error})", fix) from error
    if objective is None:
        if config["objective"] is None:
            fix = "Pass the objective that the model was trained with."
            raise EnsembleKDError("load", "objective=...", "None, and a model with an objective of its own", fix)
        arguments = dict(config["objective"])
        objective = OBJECTIVES[arguments.pop("name")](**arguments)
    with_ap = item_attributes is not None and config["num_attributes"] > 0
    model = EnsembleKD(
        encoder_fn,
        config["n"],
        num_items=config["num_items"],
        max_len=config["max_len"],
        objective=objective,
        losses=_losses(config["losses"], with_ap=with_ap),
        item_attributes=item_attributes if with_ap else None,
        classifier=config["classifier"],
    )
    if not with_ap:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("attribute_classifier.")}
    _fill(model, tensors)
    return model.to(device)


def _read_configuration(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        known = config["format"] == FORMAT and {"n", "num_items", "objective", "losses"} <= config.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "Pass the folder that save() wrote."
        raise EnsembleKDError("load", f"a {CONFIGURATION} of save()", f"{path} ({error})", fix) from error
    if not known:
        fix = "Load it with the version of ensemble_kd that wrote it."
        raise EnsembleKDError("load", f"format {FORMAT}", config["format"], fix)
    return config  # type: ignore[no-any-return]


def _losses(terms: list[dict[str, Any]], *, with_ap: bool) -> Loss | Literal[0]:
    kept: list[Loss] = []
    for term in terms:
        arguments = dict(term)
        name, weight = arguments.pop("name"), arguments.pop("weight")
        if name != "AP" or with_ap:
            kept.append(weight * TERMS[name](**arguments))
    return sum(kept[1:], start=kept[0]) if kept else 0


def _fill(model: EnsembleKD, tensors: Mapping[str, torch.Tensor]) -> None:
    own = model.state_dict()
    storages = {t.data_ptr() for name, t in own.items() if name in tensors}
    missing = [name for name, t in own.items() if name not in tensors and t.data_ptr() not in storages]
    other = [name for name in tensors if name not in own]
    shapes = [
        f"{name}: {tuple(t.shape)} saved, {tuple(own[name].shape)} here"
        for name, t in tensors.items()
        if name in own and own[name].shape != t.shape
    ]
    if missing or other or shapes:
        told = [*shapes, *(f"{name}: not saved" for name in missing), *(f"{name}: not in the model" for name in other)]
        fix = "Pass the factory, and the attributes, that the model was built with."
        raise EnsembleKDError("load", "the encoder that was saved", "; ".join(told[:5]), fix)
    with torch.no_grad():
        for name, t in tensors.items():
            own[name].copy_(t)
