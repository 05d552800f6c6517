"""The average of the weights over a run: what is validated and kept in place of a falling learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.functional import power_average

UPDATES = 128  # of an epoch at most: one is a pass over all weights, which costs as much as a step that moves few rows


class WeightAverage:
    """The average of a model's weights over the steps of a run, of which step s counts s^power.

    Trained parameters are averaged, and buffers of floating point, such as the statistics of BatchNorm.

    Args:
        model: that is trained.
        power: see ``WarmupStableAverage``.
    """

    def __init__(self, model: EnsembleKD, power: float) -> None:
        self.model, self.power = model, power
        with torch.no_grad():
            self.values = {name: own.detach().clone() for name, own in self._own().items()}

    @torch.no_grad()
    def update(self, step: int, since: int) -> None:
        """Count the weights after step number ``step`` of the run (from 1), for all steps after ``since``."""
        for name, own in self._own().items():
            value = self.values[name]
            value.copy_(power_average(value, own, power=self.power, step=step, since=since))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Let the model have the averages within the context, and its own weights again after it."""
        own = {name: tensor.detach().clone() for name, tensor in self._own().items()}
        self._set(self.values)
        try:
            yield
        finally:
            self._set(own)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Go on from the averages of a checkpoint, of the same names and shapes."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, own in self._own().items():
            own.copy_(values[name])

    def _own(self) -> dict[str, Tensor]:
        buffers = {name for name, _ in self.model.named_buffers()}
        return {
            name: own
            for name, own in self.model.state_dict(keep_vars=True).items()
            if own.is_floating_point() and (own.requires_grad or name in buffers)
        }
