"""Checks that a run's numbers are finite, so that no checkpoint has lost weights, and warnings about its start."""

from __future__ import annotations

import math
import warnings
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


_FAR = 1.5  # times the loss of a guess: an untrained network has .99 to 1.01 of it, unless its scores are too wide


def warn_if_worse_than_a_guess(loss: float, num_items: int) -> None:
    """Warn if the first epoch's mean loss, of one member and one view, is far above that of equal scores for all items.

    The usual cause is a classifier that is tied to embeddings as wide as torch begins them.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_if_worse_than_a_guess(5.2, 200)
        ...     warn_if_worse_than_a_guess(38.0, 200)
        >>> [str(each.message)[:75] for each in caught]
        ['fit: the loss of the first epoch is 38.0 a member; a guess among 200 items ']
    """
    guess = math.log(num_items)
    if loss > _FAR * guess:
        warnings.warn(
            f"fit: the loss of the first epoch is {loss:.1f} a member; a guess among {num_items} items has {guess:.1f}."
            ' Scores begin too wide, or lr is too high. With classifier="tied" the items\' embeddings should begin'
            " narrow: nn.init.normal_(embedding.weight, std=0.02); torch begins them with std=1.",
            stacklevel=2,
        )


def warn_of_anomaly_detection() -> None:
    """Warn if torch's anomaly detection is on, which keeps the stack of every operation and takes most of the time.

    Other libraries switch it on for the whole process: RecBole 1.2.1 does when its models are imported.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught, torch.autograd.set_detect_anomaly(True):
        ...     warnings.simplefilter("always")
        ...     warn_of_anomaly_detection()
        >>> str(caught[-1].message)[:66]
        "fit: torch's anomaly detection is on, and a step takes several tim"
    """
    if torch.is_anomaly_enabled():
        warnings.warn(
            "fit: torch's anomaly detection is on, and a step takes several times as long. It may be on without your"
            " doing: importing RecBole's models switches it on. torch.autograd.set_detect_anomaly(False) ends it.",
            stacklevel=2,
        )


def check_weights(weights: Mapping[str, Tensor], step: int) -> None:
    """Check weights: one step's gradient can spoil them under a finite loss. All processes call it together.

    Raises:
        EnsembleKDError: weights that are not finite, by name.
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(whole(torch.isfinite(tensor).all())):
            fix = "Lower lr or set max_grad_norm; the last good checkpoint was kept."
            raise EnsembleKDError(f"fit: step {step}, weights {name!r}", "finite weights", "inf or nan", fix)
