"""The validation of an epoch, and the number by which the best one is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ensemble_kd.data import AnySequences
from ensemble_kd.distributed import Place, gather_objects
from ensemble_kd.ensemble import Chosen, EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.evaluation import evaluate
from ensemble_kd.internal import seeded
from ensemble_kd.metrics import METRICS
from ensemble_kd.training.settings import Settings
from ensemble_kd.training.state import Rows


class Selection:
    """Validates the model of a run, and scores it: higher is better.

    Args:
        model: in training.
        data: with targets in "valid"; without any, each epoch is better than the one before.
        settings: of the run.
        place: of this process.

    Raises:
        EnsembleKDError: ``patience`` with nothing to compare.
    """

    def __init__(self, model: EnsembleKD, data: AnySequences, settings: Settings, place: Place) -> None:
        self.model, self.data, self.settings, self.place = model, data, settings, place
        self.validates = data.has_targets("valid")
        if settings.patience is not None and not self.validates and isinstance(settings.metric, str):
            fix = "Hold items out, pass a metric of your own, or leave patience out."
            raise EnsembleKDError("fit", "data with validation targets for patience", data.held_out, fix)

    @property
    def name(self) -> str:
        """The name of the metric, in logs and in rows of metrics."""
        metric = self.settings.metric
        return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)

    def validate(self, epoch: int, precision: Chosen) -> tuple[Rows, float]:
        """Return the metrics by scorer after an epoch in the run's precision, and the number that is compared.

        Raises:
            EnsembleKDError: the user's metric returns no finite number.
        """
        s = self.settings
        rows: Rows = {}
        if self.validates:
            names = METRICS if not isinstance(s.metric, str) or s.metric in METRICS else (*METRICS, s.metric)
            options = {"exclude": s.exclude, "precision": precision.name, "place": self.place, "metrics": names}
            found = evaluate(self.model, self.data, "valid", **options)  # type: ignore[arg-type]
            rows = {scorer: dict(row) for scorer, row in found.rows.items()}
        if callable(s.metric):
            rows.setdefault("ensemble", {})[self.name] = self._own_metric(s.metric)
        return rows, rows["ensemble"][self.name] if rows else float(epoch)

    def _own_metric(self, metric: Callable[[EnsembleKD, AnySequences], float]) -> float:
        self.model.eval()
        with torch.no_grad(), seeded(self.settings.seed):  # its draws are not those of training
            value = metric(self.model, self.data)
        try:
            value = float(value)
        except (TypeError, ValueError):
            value = math.nan
        value = gather_objects(value, self.place)[0]
        if not math.isfinite(value):
            fix = "Return a number, higher for better models."
            raise EnsembleKDError("fit", f"a finite number from the metric {self.name!r}", value, fix)
        return value

    def summary(self, rows: Rows, score: float) -> str:
        """Return the outcome in words, for a line of progress."""
        members = [row[self.name] for scorer, row in rows.items() if scorer != "ensemble" and self.name in row]
        if not rows:
            return self.data.held_out
        mean = f", members' mean {sum(members) / len(members):.4f}" if members else ""
        return f"valid {self.name} ensemble {score:.4f}{mean}"
