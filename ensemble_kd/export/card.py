"""``Card``: the README of a published model, made from the run itself.

Needs huggingface_hub (the extra ``hub``), which writes the head that the Hub reads.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy
import torch

from ensemble_kd.data import AnySequences, MappedSequences, SequenceData
from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.errors import EnsembleKDError, import_extra
from ensemble_kd.evaluation import Evaluation
from ensemble_kd.internal import instance
from ensemble_kd.training import FitResult

MADE = "<!-- made by ensemble_kd.export; put text of your own into Card(text=...) -->"
_PAPER = "[Du et al., SIGIR 2023](https://doi.org/10.1145/3539618.3591679)"
_TAGS = ["recommender-system", "sequential-recommendation", "ensemble", "knowledge-distillation"]


@dataclass(frozen=True, eq=False)
class Card:
    """The part of a model card that the model itself does not know. All of it may be left out.

    Args:
        data: that the model was trained on.
        data_name: the name of the data, such as "Amazon Beauty".
        result: of ``fit``.
        evaluation: of ``evaluate``; the ensemble's metrics also go into the head that the Hub reads.
        license: of the weights, as the Hub names it, such as "mit".
        text: words of your own, in Markdown.

    Raises:
        EnsembleKDError: something else in one of them.

    Examples:
        >>> Card(data_name="Amazon Beauty", license="mit").license
        'mit'
    """

    data: AnySequences | None = None
    data_name: str = "the data of its training"
    result: FitResult | None = None
    evaluation: Evaluation | None = None
    license: str | None = None
    text: str = ""

    def __post_init__(self) -> None:
        none = type(None)
        fix = "Pass the sequences of the training, or None."
        instance("Card", "data", self.data, (SequenceData, MappedSequences, none), fix)
        instance("Card", "result", self.result, (FitResult, none), "Pass what fit returned, or None.")
        instance("Card", "evaluation", self.evaluation, (Evaluation, none), "Pass what evaluate returned, or None.")
        instance("Card", "data_name", self.data_name, str, "Pass a name.")
        instance("Card", "license", self.license, (str, none), 'Pass a name such as "mit", or None.')
        instance("Card", "text", self.text, str, "Pass Markdown.")

    def markdown(self, model: EnsembleKD, name: str) -> str:
        """Return the card of a model.

        Args:
            model: the ensemble.
            name: of the repository, such as "me/beauty", or of the folder.

        Raises:
            EnsembleKDError: data of another catalogue, an evaluation of another number of members, or huggingface_hub
                is not installed.
        """
        hub = import_extra("huggingface_hub", extra="hub", where="Card")
        instance("Card", "model", model, EnsembleKD, "Pass an ensemble.")
        instance("Card", "name", name, str, 'Pass the name of the repository, such as "me/beauty".')
        self._check(model)
        head = hub.ModelCardData(
            library_name="ensemble_kd",
            license=self.license,
            tags=list(_TAGS),
            model_name=name.rpartition("/")[2],
            eval_results=[hub.EvalResult(**entry) for entry in self._results()] or None,
        )
        return f"---\n{head.to_yaml()}\n---\n{MADE}\n\n" + "\n\n".join(self._parts(model, name)) + "\n"

    def _check(self, model: EnsembleKD) -> None:
        if self.data is not None and self.data.num_items != model.num_items:
            expected = f"data of {model.num_items} items, as the model"
            raise EnsembleKDError("Card", expected, self.data.num_items, "Pass the data that the model was trained on.")
        if self.evaluation is not None:
            members = [scorer for scorer in self.evaluation.rows if scorer.startswith("member ")]
            if len(members) != len(model):
                expected = f"an evaluation of the {len(model)} members of this model"
                raise EnsembleKDError("Card", expected, f"one of {len(members)}", "Evaluate this model.")

    def _results(self) -> Iterator[dict[str, Any]]:
        """Yield the ensemble's metrics, an entry each."""
        if self.evaluation is not None:
            for metric, value in self.evaluation.rows["ensemble"].items():
                yield {
                    "task_type": "sequential-recommendation",
                    "dataset_type": self.data_name.lower().replace(" ", "-"),
                    "dataset_name": self.data_name,
                    "metric_type": metric.lower(),
                    "metric_name": metric,
                    "metric_value": round(value, 4),
                    "metric_args": {"protocol": self.evaluation.protocol},
                }

    def _parts(self, model: EnsembleKD, name: str) -> Iterator[str]:
        yield f"# {name.rpartition('/')[2]}"
        yield (
            f"An ensemble of {len(model)} networks that recommends the next item of a sequence, made with "
            f"`ensemble_kd`. The method is EMKD ({_PAPER})."
        )
        if self.text:
            yield self.text
        yield (
            "## Use\n\n```python\nfrom ensemble_kd.export import from_pretrained\n\n"
            f"model = from_pretrained({json.dumps(name)}, encoder_fn)  # your function that makes the encoder\n"
            "items, scores = model.recommend(item_ids, k=10)\n```\n\n"
            "There is no code in this repository. `encoder_fn` is the function that the model was built with; weights, "
            "settings and a checksum are compared with it."
        )
        yield "## Model\n\n" + _table(_model(model))
        if self.data is not None:
            yield f"## Data\n\n{self.data_name}.\n\n" + _table(_data(self.data))
        if self.result is not None and self.result.history:
            yield "## Training\n\n" + _table(_training(self.result))
        if self.evaluation is not None:
            yield f"## Evaluation\n\n{_metrics(self.evaluation)}\n\n{self.evaluation.protocol}."
        yield "## Versions\n\n" + _table(
            {
                "ensemble_kd": version("ensemble_kd"),
                "torch": str(torch.__version__),
                "NumPy": numpy.__version__,
                "Python": platform.python_version(),
            }
        )


def _model(model: EnsembleKD) -> dict[str, str]:
    built = model.encoder.describe()
    return {
        **{f"member {i}": f"`{built[f'member {i}']}`" for i in range(len(model))},
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "items": f"{model.num_items:,}" + (", with their names" if model.vocabulary is not None else ""),
        "longest input": "any length" if model.max_len is None else str(model.max_len),
        "objective": f"`{model.objective!r}`",
        "losses": f"`{model.losses!r}`",
        "classifier": model.classifier,
        "seed": str(model.seed),
    }


def _data(data: AnySequences) -> dict[str, str]:
    return {
        "users": f"{data.num_users:,}",
        "items": f"{data.num_items:,}",
        "interactions": f"{data.num_interactions:,}",
    }


def _training(result: FitResult) -> dict[str, str]:
    return {
        "epochs": f"{len(result.history)}; the weights are those of epoch {result.best_epoch + 1}",
        "steps": f"{result.history[-1]['step']:,}",
        "minutes of training": f"{sum(entry['train_s'] for entry in result.history) / 60:.1f}",
        "precision": result.precision,
    }


def _metrics(evaluation: Evaluation) -> str:
    names = list(evaluation.rows["ensemble"])
    lines = [f"| scorer | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for scorer, row in evaluation.rows.items():
        lines.append(f"| {scorer} | {' | '.join(f'{row[name]:.4f}' for name in names)} |")
    return "\n".join(lines)


def _table(rows: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(
        f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows.items()
    )
