"""The settings of a model as JSON and back: sizes, objective, losses, and how each module of an encoder was built."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, Literal

from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import (
    AP,
    CCL,
    ICL,
    KD,
    Ambiguity,
    Loss,
    terms_by_name,
)
from ensemble_kd.objectives import MaskedItem, NextItem, Objective

FORMAT = 1
MOST_NAMED = 5  # differences that an error lists
OBJECTIVES: Mapping[str, Callable[..., Objective]] = {"MaskedItem": MaskedItem, "NextItem": NextItem}
TERMS: Mapping[str, Callable[..., Loss]] = {"AP": AP, "ICL": ICL, "CCL": CCL, "KD": KD, "Ambiguity": Ambiguity}


def to_json(model: EnsembleKD) -> str:
    """Return the settings of a model; an objective of the user's own is null.

    Examples:
        >>> from ensemble_kd.encoders import SASRec
        >>> text = to_json(EnsembleKD(lambda: SASRec(9, d_model=4, max_len=5), n=2))
        >>> from_json(text, "a file")["max_len"]
        5
    """
    objective = type(model.objective).__name__
    known = objective in OBJECTIVES and is_dataclass(model.objective)
    content = {
        "format": FORMAT,
        "n": len(model),
        "num_items": model.num_items,
        "max_len": model.max_len,
        "num_attributes": 0 if model.item_attributes is None else model.item_attributes.num_attributes,
        "classifier": model.classifier,
        "seed": model.seed,
        "backend": model.encoder.requested_backend,
        "objective": {"name": objective, **asdict(model.objective)} if known else None,  # type: ignore[call-overload]
        "losses": [
            {"weight": weight, "name": type(term).__name__, **asdict(term)}  # type: ignore[call-overload]
            for weight, term in terms_by_name(model.losses).values()
        ],
        "encoder": model.encoder.describe(),
    }
    return json.dumps(content, indent=1)


def from_json(text: str, source: str) -> dict[str, Any]:
    """Return the settings that ``to_json`` wrote.

    Raises:
        EnsembleKDError: another format.
    """
    content: dict[str, Any] = json.loads(text)
    if content.get("format") != FORMAT:
        fix = "Load it with the version of ensemble_kd that wrote it."
        raise EnsembleKDError("load", f"format {FORMAT} in {source}", content.get("format"), fix)
    return content


def objective_of(content: Mapping[str, Any]) -> Objective:
    """Return the saved objective.

    Raises:
        EnsembleKDError: it was one of the user's own.
    """
    if content["objective"] is None:
        fix = "Pass the objective that the model was trained with."
        raise EnsembleKDError("load", "objective=...", "None, and a model with an objective of its own", fix)
    arguments = dict(content["objective"])
    return OBJECTIVES[arguments.pop("name")](**arguments)


def losses_of(content: Mapping[str, Any], *, with_ap: bool) -> Loss | Literal[0]:
    """Return the saved losses, with or without AP, which needs attributes."""
    kept: list[Loss] = []
    for term in content["losses"]:
        arguments = dict(term)
        name, weight = arguments.pop("name"), arguments.pop("weight")
        if name != "AP" or with_ap:
            kept.append(weight * TERMS[name](**arguments))
    return sum(kept[1:], start=kept[0]) if kept else 0


def check_encoder_settings(saved: Mapping[str, str], model: EnsembleKD) -> None:
    """Refuse an encoder that was built with other settings: weights of the same shapes would give other scores.

    Raises:
        EnsembleKDError: names what differs.
    """
    here = model.encoder.describe()
    differing = [
        f"{path}: {_beyond(saved.get(path), here.get(path))} saved, {_beyond(here.get(path), saved.get(path))} here"
        for path in {**here, **saved}
        if saved.get(path) != here.get(path)
    ]
    if differing:
        more = [f"and {len(differing) - MOST_NAMED} more"] if len(differing) > MOST_NAMED else []
        fix = "Pass the factory that the model was built with, or check_settings=False if its code alone has changed."
        got = "; ".join(differing[:MOST_NAMED] + more)
        raise EnsembleKDError("load", "the encoder that was saved", got, fix)


def _beyond(one: str | None, other: str | None) -> str:
    """The parts of "Class(a=1, b=2)" that another description lacks."""
    parts, others = ((text or "nothing").rstrip(")").replace("(", ", ", 1).split(", ") for text in (one, other))
    return ", ".join(part for part in parts if part not in others) or "no such setting"
