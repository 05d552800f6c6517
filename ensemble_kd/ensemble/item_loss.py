"""``ItemLoss``: how wrong the item predictions are, and from whom the networks learn besides the targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import (
    KD,
    ItemLosses,
    Spread,
    Weight,
    item_losses,
    sampled_item_losses,
)
from ensemble_kd.objectives import Draw


class Classifier(NamedTuple):
    """The item classifiers of the members: row j scores item j + 1, or candidate j."""

    weight: Tensor  # (n, v, d)
    bias: Tensor  # (n, v)


class Weighting(NamedTuple):
    """The weights of the parts of an item loss, and how to compute it."""

    targets: float  # of the cross-entropy; a sum over views of means
    kd_weight: Weight  # of KD, likewise; 0: there is none; a tensor () if a graph of the step is to follow it
    kd: KD  # its settings
    product_dtype: torch.dtype  # of the matrix products
    spread: Spread | None = None  # where other processes have members
    kinds: tuple[int, ...] | None = None  # a number per member, equal for members of one architecture
    ambiguity_weight: Weight = 0.0  # of the ambiguity, a sum over views of means; it may be negative


class ItemLoss(Protocol):
    """A loss of item predictions. ``fit(model, data, loss=...)`` and ``model.loss(ids, item_loss=...)`` take one.

    ``Mutual`` and ``FromTeacher`` are two. For one of your own, subclass this class and define ``__call__``.
    """

    def __call__(self, draw: Draw, hidden: Tensor, classifier: Classifier, weighting: Weighting) -> ItemLosses:
        """Return the losses of a step's targets.

        Args:
            draw: inputs, positions and targets of the step.
            hidden: (n, t, d) the members' hidden states at the target positions.
            classifier: the members' item classifiers, of all items or of ``draw.candidates``.
            weighting: the weights of the parts.

        Returns:
            ``total`` (), differentiable and weighted; ``cross_entropy`` (n,), ``kd`` () and ``ambiguity`` (), detached
            means over the targets.
        """
        ...

    def further(self, item_ids: Tensor, *, generator: torch.Generator | None) -> Tensor | None:
        """Return sequences (b, l) to learn from besides, without targets, or None. The loss is the mean of both."""
        return None

    def fingerprint(self) -> dict[str, str]:
        """Return by name what must be the same for a run to be resumed."""
        return {}


@dataclass(frozen=True)
class Mutual(ItemLoss):
    """Cross-entropy (Eqs. 5-7), and KD between the members (Eqs. 16-18): the loss of EMKD; and ambiguity if wanted.

    Examples:
        >>> Mutual()
        Mutual()
    """

    def __call__(self, draw: Draw, hidden: Tensor, classifier: Classifier, weighting: Weighting) -> ItemLosses:
        """Return the losses, over all items or over the step's candidates.

        Raises:
            EnsembleKDError: averages of the members are to teach, which only ``MeanTeachers`` has.
        """
        if weighting.kd.teacher == "ema" and weighting.kd_weight != 0:
            fix = "Train with fit, which keeps them, or pass item_loss=MeanTeachers(model), and update it."
            raise EnsembleKDError("Mutual", "averages of the members, which teach here", repr(weighting.kd), fix)
        weight, bias = classifier
        options = {
            "valid": draw.valid,
            "ce_weight": weighting.targets,
            "kd_weight": weighting.kd_weight,
            "ambiguity_weight": weighting.ambiguity_weight,
            "temperature": weighting.kd.temperature,
            "scale_by_temperature_squared": weighting.kd.scale_by_temperature_squared,
            "between": weighting.kd.between,
            "part": weighting.kd.part,
            "gate": weighting.kd.gate,
            "kinds": weighting.kinds,
            "product_dtype": weighting.product_dtype,
            "spread": weighting.spread,
        }
        hidden = hidden.to(weight.dtype)
        if draw.candidates is None:
            return item_losses(hidden, weight, bias, draw.targets - 1, **options)  # type: ignore[arg-type]
        targets, counts = draw.candidates.targets, draw.candidates.counts
        return sampled_item_losses(hidden, weight, bias, targets, counts, **options)  # type: ignore[arg-type]
