"""Checks that a run's numbers are finite, so that no checkpoint has lost weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ensemble_kd.distributed import whole
from ensemble_kd.errors import EnsembleKDError


def check_terms(terms: Mapping[str, Tensor], when: str) -> None:
    """Check losses or gradient norms.

    Raises:
        EnsembleKDError: a term that is not finite, by name.

    Examples:
        >>> check_terms({"kd": torch.tensor(torch.nan)}, "step 3")
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: fit: step 3, term 'kd': expected a finite value, got nan. Lower lr, raise \
the temperature or set max_grad_norm; the last good checkpoint was kept.
    """
    for name, value in terms.items():
        if not bool(torch.isfinite(value)):
            fix = "Lower lr, raise the temperature or set max_grad_norm; the last good checkpoint was kept."
            raise EnsembleKDError(f"fit: {when}, term {name!r}", "a finite value", str(float(value)), fix)


def check_weights(weights: Mapping[str, Tensor], step: int) -> None:
    """Check weights: one step's gradient can spoil them under a finite loss. All processes call it together.

    Raises:
        EnsembleKDError: weights that are not finite, by name.
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(whole(torch.isfinite(tensor).all())):
            fix = "Lower lr or set max_grad_norm; the last good checkpoint was kept."
            raise EnsembleKDError(f"fit: step {step}, weights {name!r}", "finite weights", "inf or nan", fix)
