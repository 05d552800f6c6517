"""Weights and temperatures of members: how much each counts in the ensemble's scores (Eq. 20 with other shares)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_kd.errors import EnsembleKDError

NAMES = ("weights", "temperatures")


class Weighted(nn.Module):
    """A model of n members with a weight and a temperature each.

    The scores are the mean over members of weight · logits / temperature. The weights' own mean is 1. They are in
    ``state_dict()`` once they have been set.
    """

    weights: Tensor  # (n,) 1 each by default
    temperatures: Tensor  # (n,) 1 each by default
    is_weighted: bool  # they have been set

    def start_uniform(self, n: int, like: Tensor) -> None:
        """Give all members the weight 1 and the temperature 1."""
        self.is_weighted = False
        for name in NAMES:
            self.register_buffer(name, torch.ones(n, dtype=like.dtype, device=like.device), persistent=False)

    def weigh(self, weights: Tensor | Sequence[float], temperatures: Tensor | Sequence[float] | None = None) -> None:
        """Let members count by weights in scores, recommendations, vectors, exports and as teachers of a student.

        Args:
            weights: (n,) numbers >= 0 of the members of this process, one of them > 0. Of a model that is whole they
                are scaled to a mean of 1. Where members are spread over processes, pass weights whose mean is 1.
            temperatures: (n,) numbers > 0 that logits are divided by; None: 1 each.

        Raises:
            EnsembleKDError: other numbers of them, or numbers out of range.

        Examples:
            >>> from ensemble_kd import EnsembleKD
            >>> from ensemble_kd.encoders import SASRec
            >>> model = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=10), n=2)
            >>> model.weigh([3, 1])
            >>> model.weights
            tensor([1.5000, 0.5000])
        """
        given = (weights, torch.ones(len(self.weights)) if temperatures is None else temperatures)
        made = [torch.as_tensor(x).to(self.weights) for x in given]
        for name, values, rule in zip(NAMES, made, ("at least 0, one of them more", "above 0"), strict=True):
            fits = values.shape == self.weights.shape and bool(values.isfinite().all()) and bool(values.any())
            if not fits or float(values.min()) < 0 or (name == "temperatures" and not bool(values.all())):
                expected = f"{len(self.weights)} {name}, {rule}"
                raise EnsembleKDError("weigh", expected, values.tolist(), "Pass one finite number per member.")
        if not self._is_spread():
            made[0] = made[0] / made[0].mean()
        self.is_weighted = True
        for name, values in zip(NAMES, made, strict=True):
            self.register_buffer(name, values)  # from now on in the state

    def _is_spread(self) -> bool:
        """True if other processes have members, too."""
        return False

    @property
    def factors(self) -> Tensor:
        """The factor of each member's logits in the mean, (n,): weight / temperature."""
        return self.weights / self.temperatures

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Become weighted, or uniform, as the model was whose state is loaded."""
        found = [state_dict.get(prefix + name) for name in NAMES]
        if all(isinstance(value, Tensor) for value in found):
            self.is_weighted = True
            for name in NAMES:
                self.register_buffer(name, getattr(self, name))
        elif self.is_weighted:
            self.start_uniform(len(self.weights), self.weights)
        super()._load_from_state_dict(state_dict, prefix, *rest)
