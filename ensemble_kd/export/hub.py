"""A model on the Hugging Face Hub: ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``.

They are functions, as ``save`` and ``load`` are, and not huggingface_hub's ``ModelHubMixin``. The mixin would be a base
class of ``EnsembleKD``, so that the library could not be imported without huggingface_hub, and it builds a model from a
JSON file alone, which cannot hold the function that makes an encoder. Code of a repository is never run.

Needs huggingface_hub and safetensors (the extra ``hub``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from os import PathLike, fspath
from pathlib import Path

import torch
from torch import nn

from ensemble_kd.ensemble import Attributes, EnsembleKD
from ensemble_kd.errors import EnsembleKDError, first_line, import_extra
from ensemble_kd.export.card import MADE, Card
from ensemble_kd.export.configuration import to_json
from ensemble_kd.export.weights import load, save
from ensemble_kd.internal import file_path, flag, instance, make_folder, replacing, shown
from ensemble_kd.objectives import Objective

WEIGHTS, SETTINGS, CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(model: EnsembleKD, folder: str | PathLike[str], *, card: Card = Card(), name: str = "") -> Path:
    """Write a model to a folder, as a repository of the Hub has it: weights, settings and a model card.

    ``model.safetensors`` is the file that ``save`` writes, with all that ``from_pretrained`` reads. ``config.json`` has
    the same settings for people and for the Hub, which counts downloads by it.

    Args:
        model: with all its weights in this process.
        folder: made if it is missing. Files of an earlier call are replaced, each whole or not at all.
        card: the part of the model card that the model does not know.
        name: of the repository that it will be, such as "me/beauty"; "": the folder's.

    Returns:
        The folder.

    Raises:
        EnsembleKDError: a README.md that you wrote, a card that does not fit the model, or what ``save`` refuses.

    Examples:
        >>> from ensemble_kd.encoders import SASRec
        >>> model = EnsembleKD(lambda: SASRec(9, d_model=4, max_len=5), n=2)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = save_pretrained(model, Path(parent, "tiny"))
        ...     same = from_pretrained(folder, lambda: SASRec(9, d_model=4, max_len=5))
        ...     print(sorted(path.name for path in folder.iterdir()))
        ['README.md', 'config.json', 'model.safetensors']
    """
    import_extra("huggingface_hub", extra="hub", where="save_pretrained")
    instance("save_pretrained", "model", model, EnsembleKD, "Pass an ensemble.")
    instance("save_pretrained", "card", card, Card, "Pass Card(...).")
    instance("save_pretrained", "name", name, str, 'Pass the name of the repository, such as "me/beauty".')
    model.place.require_whole("save_pretrained")
    folder = file_path("save_pretrained", "folder", folder)
    text = card.markdown(model, name or folder.resolve().name)
    make_folder("save_pretrained", folder)
    readme = folder / CARD
    if readme.exists() and MADE not in readme.read_text(encoding="utf-8", errors="replace"):
        fix = "Choose another folder, or move your words into Card(text=...)."
        raise EnsembleKDError("save_pretrained", f"no {CARD} of yours in the folder", str(readme), fix)
    save(model, folder / WEIGHTS)
    for path, content in ((folder / SETTINGS, to_json(model) + "\n"), (readme, text)):
        with replacing(path) as file:
            file.write(content.encode())
    return folder


def push_to_hub(
    model: EnsembleKD,
    repo_id: str,
    *,
    card: Card = Card(),
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload an ensemble",
    token: str | None = None,
) -> str:
    """Upload a model to the Hugging Face Hub in one commit: weights, settings and a model card.

    The repository is made if it is missing. Files of the same names are replaced there; its history keeps them.

    Args:
        model: with all its weights in this process.
        repo_id: such as "me/beauty".
        card: the part of the model card that the model does not know.
        private: of a repository that is made now; None: the default of your account.
        revision: a branch that exists; None: the main one.
        message: of the commit.
        token: None: the one of ``hf auth login`` or of the environment's HF_TOKEN.

    Returns:
        The address of the commit. ``HF_ENDPOINT`` in the environment names another server than huggingface.co.

    Raises:
        EnsembleKDError: the Hub refuses or cannot be reached, a card that does not fit the model, or what ``save``
            refuses.
    """
    hub = import_extra("huggingface_hub", extra="hub", where="push_to_hub")
    instance("push_to_hub", "model", model, EnsembleKD, "Pass an ensemble.")
    instance("push_to_hub", "card", card, Card, "Pass Card(...).")
    _words("push_to_hub", repo_id=repo_id, message=message)
    _words_or_none("push_to_hub", revision=revision, token=token)
    if private is not None:
        flag("push_to_hub", "private", private)
    api = hub.HfApi(token=token, library_name="ensemble_kd")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, card=card, name=repo_id)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision)
        except Exception as error:  # httpx and huggingface_hub raise many kinds
            fix = "Check the name and the connection, and log in by `hf auth login` with a token that may write."
            got = f"{shown(repo_id)} ({first_line(error)})"
            raise EnsembleKDError("push_to_hub", "a repository that can be written", got, fix) from error
    return str(commit.commit_url)


def from_pretrained(
    name: str | PathLike[str],
    encoder_fn: Callable[[], nn.Module],
    *,
    revision: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    objective: Objective | None = None,
    item_attributes: Attributes | None = None,
    device: torch.device | str = "cpu",
    check_settings: bool = True,
) -> EnsembleKD:
    """Return a model from the Hugging Face Hub, or from a folder of ``save_pretrained``, in evaluation mode.

    One file is read, ``model.safetensors``, and verified as ``load`` does: its checksum, and the settings of the
    encoder that ``encoder_fn`` makes. No code of the repository is run.

    Args:
        name: of a repository, such as "me/beauty", or of a folder on this machine.
        encoder_fn: the factory that the model was built with.
        revision: a branch, a tag or a commit; None: the main branch. A commit alone is sure to stay as it is.
        cache_dir: None: the cache of huggingface_hub.
        local_files_only: take the copy in the cache, and connect to nothing.
        token: None: the one of ``hf auth login`` or of the environment's HF_TOKEN.
        objective, item_attributes, device, check_settings: as of ``load``.

    Raises:
        EnsembleKDError: no such repository, folder or file, no connection, or what ``load`` refuses.
    """
    where = "from_pretrained"
    instance(where, "name", name, (str, PathLike), 'Pass the name of a repository, such as "me/beauty", or a folder.')
    _words_or_none(where, revision=revision, token=token)
    flag(where, "local_files_only", local_files_only)
    cache = None if cache_dir is None else file_path(where, "cache_dir", cache_dir)
    open_weights = partial(
        load,
        encoder_fn=encoder_fn,
        objective=objective,
        item_attributes=item_attributes,
        device=device,
        check_settings=check_settings,
    )
    folder = file_path(where, "name", name)
    if folder.is_dir():
        path = folder / WEIGHTS
        if not path.is_file():
            raise EnsembleKDError(where, f"a folder with {WEIGHTS}", str(folder), "Pass what save_pretrained returned.")
        return open_weights(path)
    hub = import_extra("huggingface_hub", extra="hub", where=where)
    try:
        found = hub.hf_hub_download(
            fspath(name),
            WEIGHTS,
            revision=revision,
            cache_dir=cache,
            local_files_only=local_files_only,
            token=token,
            library_name="ensemble_kd",
        )
    except Exception as error:  # httpx and huggingface_hub raise many kinds
        fix = "Check the name and the connection; log in by `hf auth login` if the repository is private."
        got = f"{shown(fspath(name))} ({first_line(error)})"
        raise EnsembleKDError(where, f"a folder, or a repository with {WEIGHTS}", got, fix) from error
    return open_weights(found)


def _words(where: str, **given: object) -> None:
    for name, value in given.items():
        instance(where, name, value, str, "Pass a text.")
        if not value:
            raise EnsembleKDError(where, f"{name}, a text", "''", "Pass a text that is not empty.")


def _words_or_none(where: str, **given: object) -> None:
    _words(where, **{name: value for name, value in given.items() if value is not None})
