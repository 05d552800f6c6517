"""The objective and the losses of an ensemble where none are given, and the losses that it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import (
    AP,
    CCL,
    ICL,
    KD,
    Loss,
    terms_by_name,
)
from ensemble_kd.objectives import MaskedItem, NextItem, Objective


def default_objective(members: Sequence[nn.Module], *, newest_only: bool) -> Objective:
    """Return ``NextItem()`` if all members are causal or return (b, d), ``MaskedItem()`` if none is.

    Raises:
        EnsembleKDError: some are causal, some read ahead.
    """
    causal = [newest_only or bool(getattr(member, "causal", False)) for member in members]
    if any(causal) and not all(causal):
        got = f"causal ones, as member {causal.index(True)}, and others, as member {causal.index(False)}"
        fix = "Pass objective=MaskedItem() to train all of them on masked items."
        raise EnsembleKDError("objective", "members that read alike", got, fix)
    return NextItem() if all(causal) else MaskedItem()


def default_losses(*, with_attributes: bool, with_ccl: bool = True) -> Loss:
    """Return the losses that ``EnsembleKD`` uses if none are given: the weights of the authors' code, except AP's.

    AP at weight 1 (the paper's) made networks on Beauty learn later and no better than at 0.2.

    Examples:
        >>> default_losses(with_attributes=False)
        0.01 * ICL(temperature=0.3) + 0.01 * CCL(temperature=0.3) + 0.001 * KD(temperature=0.3)
    """
    contrast = ICL(temperature=0.3) + CCL(temperature=0.3) if with_ccl else ICL(temperature=0.3)
    transfer = 0.01 * contrast + 0.001 * KD(temperature=0.3)
    return 0.2 * AP() + transfer if with_attributes else transfer


def check_losses(losses: Loss | Literal[0], *, with_attributes: bool, widths: Sequence[int]) -> None:
    """Refuse AP without attributes, and CCL between members of unequal widths.

    Raises:
        EnsembleKDError: says which.
    """
    if "ap" in terms_by_name(losses) and not with_attributes:
        fix = "Pass item_attributes, or leave AP out of losses."
        raise EnsembleKDError("losses", "item_attributes, which AP needs", "none", fix)
    if "ccl" in terms_by_name(losses) and len(set(widths)) > 1:
        fix = "Give the encoders equal widths, or leave CCL out; ICL compares each member with itself alone."
        raise EnsembleKDError("CCL", "members of one width d, whose states can be compared", widths, fix)
