"""``save`` and ``load``: a model as one safetensors file. Loading runs no code of the file.

Needs safetensors (the extra ``export``).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from ensemble_kd.data import Vocabulary
from ensemble_kd.ensemble import Attributes, EnsembleKD, check_attributes
from ensemble_kd.errors import EnsembleKDError, first_line, import_extra
from ensemble_kd.export.configuration import (
    check_encoder_settings,
    from_json,
    losses_of,
    objective_of,
    to_json,
)
from ensemble_kd.internal import file_path, flag, instance, make_folder, replacing, shown
from ensemble_kd.objectives import Objective

CONFIGURATION, CHECKSUM = "ensemble_kd", "checksum"  # keys of the file's metadata
VOCABULARY = "vocabulary"  # a tensor of bytes: metadata has room for few names


def save(model: EnsembleKD, path: str | PathLike[str]) -> Path:
    """Write weights, settings, the items' names and a checksum of all to one file, whole or not at all.

    The encoder's code is not in it: ``load`` asks for the factory, and compares the settings that it was built with.

    Args:
        model: with all its weights in this process.
        path: of the file, such as "model.safetensors"; its folder is made if it is missing.

    Returns:
        The path.

    Raises:
        EnsembleKDError: weights in other processes, names that cannot be saved, a file that cannot be written, or
            safetensors is not installed.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from ensemble_kd.encoders import SASRec
        >>> model = EnsembleKD(lambda: SASRec(9, d_model=4, max_len=5), n=2).eval()
        >>> with TemporaryDirectory() as folder:
        ...     path = save(model, Path(folder, "model.safetensors"))
        ...     same = load(path, lambda: SASRec(9, d_model=4, max_len=5))
        >>> ids = torch.tensor([[0, 1, 2]])
        >>> torch.equal(same(ids), model(ids))
        True
    """
    safetensors = import_extra("safetensors.torch", extra="export", where="save")
    instance("save", "model", model, EnsembleKD, "Pass an ensemble.")
    model.place.require_whole("save")
    path = file_path("save", "path", path)
    if path.is_dir():
        fix = 'Name a file in it, such as "model.safetensors".'
        raise EnsembleKDError("save", "the path of a file", f"the folder {path}", fix)
    make_folder("save", path.parent)
    tensors, storages = {}, {}
    for name, tensor in model.state_dict().items():  # one file may not have a tensor twice: tied ones stand once
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in storages:
            continue
        storages[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    if model.vocabulary is not None:
        tensors[VOCABULARY] = torch.frombuffer(bytearray(model.vocabulary.to_json().encode()), dtype=torch.uint8)
    configuration = to_json(model)
    about = {"format": "pt", CONFIGURATION: configuration, CHECKSUM: _checksum(configuration, tensors)}
    with replacing(path) as file:
        file.write(safetensors.save(tensors, about))
    return path


def load(
    path: str | PathLike[str],
    encoder_fn: Callable[[], nn.Module],
    *,
    objective: Objective | None = None,
    item_attributes: Attributes | None = None,
    device: torch.device | str = "cpu",
    check_settings: bool = True,
) -> EnsembleKD:
    """Return the model that ``save`` wrote, in evaluation mode. ``model.train()`` goes on to train it; ``fit`` does so.

    Args:
        path: of the file.
        encoder_fn: the factory that the model was built with.
        objective: needed if the model had one of your own; otherwise the saved one.
        item_attributes: to go on training with AP; without them AP and its classifier are left out.
        device: where the model goes.
        check_settings: refuse an encoder that was built with other settings, such as the number of heads. False: for an
            encoder whose code has changed in a way that you know to be harmless.

    Raises:
        EnsembleKDError: a file that is missing, damaged or something else, such as a pickle; another encoder's weights
            or settings; safetensors is not installed.
    """
    path, device = file_path("load", "path", path), _device(device)
    flag("load", "check_settings", check_settings)
    configuration, tensors = _read(path)
    content = from_json(configuration, str(path))
    check_attributes(item_attributes, content["num_items"])
    names = tensors.pop(VOCABULARY, None)
    with_ap = item_attributes is not None and content["num_attributes"] > 0
    model = EnsembleKD(
        encoder_fn,
        content["n"],
        num_items=content["num_items"],
        max_len=content["max_len"],
        objective=objective_of(content) if objective is None else objective,
        losses=losses_of(content, with_ap=with_ap),
        item_attributes=item_attributes if with_ap else None,
        classifier=content["classifier"],
        seed=content["seed"],
        backend=content["backend"],
        vocabulary=None if names is None else Vocabulary.from_json(names.numpy().tobytes().decode()),
    )
    if not with_ap:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("attribute_classifier.")}
    if {"weights", "temperatures"} <= tensors.keys():
        model.weigh(tensors["weights"], tensors["temperatures"])
    _fill(model, tensors)
    if check_settings:
        check_encoder_settings(content["encoder"], model)
    return model.to(device).eval()


def _device(device: object) -> torch.device:
    """Return a device that this build of torch and this machine have."""
    try:
        found: torch.device = torch.device(device)  # type: ignore[call-overload]
        torch.empty(0, device=found)
    except Exception as error:  # torch raises many kinds: RuntimeError, AssertionError, NotImplementedError
        fix = 'Pass "cpu", or the name of an accelerator that torch finds.'
        raise EnsembleKDError("load", "a device that is here", f"{shown(device)} ({first_line(error)})", fix) from error
    if found.type == "meta":
        raise EnsembleKDError("load", "a device with memory", "'meta'", 'Pass "cpu" or an accelerator.')
    return found


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The configuration and the tensors of a file whose checksum is right."""
    safetensors = import_extra("safetensors", extra="export", where="load")
    fix = "Pass the file that save() wrote; other formats, which may have code in them, are not opened."
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about, names = dict(file.metadata() or {}), list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        raise EnsembleKDError("load", "a whole file of save()", f"{path} ({first_line(error)})", fix) from error
    if not {CONFIGURATION, CHECKSUM} <= about.keys():
        raise EnsembleKDError("load", "a file of save()", f"{path}, without its configuration", fix)
    if (found := _checksum(about[CONFIGURATION], tensors)) != about[CHECKSUM]:
        fix = "The file is damaged: take another copy, or save the model again."
        raise EnsembleKDError("load", f"{path} with checksum {about[CHECKSUM]}", found, fix)
    return about[CONFIGURATION], tensors


def _checksum(configuration: str, tensors: Mapping[str, Tensor]) -> str:
    """Eight digits that change with the configuration and with any name, shape, type or value."""
    value = zlib.crc32(configuration.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode(), value)
        value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _fill(model: EnsembleKD, tensors: Mapping[str, Tensor]) -> None:
    floating = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(floating) == 1:  # a model that was saved in float64, for example
        model.to(floating.pop())
    own = model.state_dict()
    storages = {t.data_ptr() for name, t in own.items() if name in tensors}
    missing = [name for name, t in own.items() if name not in tensors and t.data_ptr() not in storages]
    other = [name for name in tensors if name not in own]
    unlike = [
        f"{name}: {_form(t)} saved, {_form(own[name])} here"
        for name, t in tensors.items()
        if name in own and _form(own[name]) != _form(t)
    ]
    if missing or other or unlike:
        got = [*unlike, *(f"{name}: not saved" for name in missing), *(f"{name}: not in the model" for name in other)]
        fix = "Pass the factory, and the attributes, that the model was built with."
        raise EnsembleKDError("load", "the encoder that was saved", "; ".join(got[:5]), fix)
    with torch.no_grad():
        for name, t in tensors.items():
            own[name].copy_(t)


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" if tensor.dtype == torch.float32 else f"{tuple(tensor.shape)} {tensor.dtype}"
