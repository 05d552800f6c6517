"""``MeanTeachers``: members learn from slowly moving averages of each other, ``KD(teacher="ema")``."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from ensemble_kd.ensemble.classifier import whole_classifier
from ensemble_kd.ensemble.item_loss import Classifier, ItemLoss, Mutual, Weighting
from ensemble_kd.ensemble.model import EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.functional import moving_average
from ensemble_kd.internal import instance
from ensemble_kd.losses import KD, ItemLosses, Loss, Networks, mean_teacher_losses, terms_by_name
from ensemble_kd.objectives import Draw


class MeanTeachers(ItemLoss):
    """Cross-entropy, and KD into each member from the moving averages of the others' weights.

    ``fit`` makes one by itself if the losses have ``KD(teacher="ema")``, and its checkpoints have the averages. In a
    loop of your own, pass it as ``item_loss`` and call ``update`` after each step of the optimizer. The averages are
    networks of their own in evaluation mode; a step costs one more pass through the encoders, without gradient.

    Args:
        model: whose losses have ``KD(teacher="ema")``; the averages begin with its weights.

    Raises:
        EnsembleKDError: losses without that term or with Ambiguity, an objective that samples its negatives, or weights
            of which other processes have a share.

    Examples:
        >>> from ensemble_kd.encoders import SASRec
        >>> model = EnsembleKD(lambda: SASRec(9, d_model=4, max_len=5), n=3, losses=KD(teacher="ema"))
        >>> teachers = MeanTeachers(model)
        >>> step = model.loss(torch.tensor([[1, 2, 3], [4, 5, 6]]), item_loss=teachers)
        >>> list(step.terms)
        ['nip', 'kd']
        >>> teachers.update(step=1)
    """

    def __init__(self, model: EnsembleKD) -> None:
        where = "MeanTeachers"
        instance(where, "model", model, EnsembleKD, "Pass the ensemble that is trained.")
        named = terms_by_name(model.losses)
        kd = named["kd"][1] if "kd" in named else None
        if not (isinstance(kd, KD) and kd.teacher == "ema") or "ambiguity" in named:
            fix = "Pass losses=KD(teacher='ema'), and leave Ambiguity, which members have with each other, out."
            raise EnsembleKDError(where, "losses with KD(teacher='ema') and without Ambiguity", repr(model.losses), fix)
        if model.objective.negatives is not None:
            fix = "Leave negatives out: averages know of no sample."
            raise EnsembleKDError(where, "an objective over all items", repr(model.objective), fix)
        if model.place.sharded or model.place.member is not None:
            fix = "Spread rows over processes, not members or weights, or leave teacher='ema' out."
            raise EnsembleKDError(where, "all weights in this process", "a share of them", fix)
        self.model, self.decay = model, kd.decay
        shared = (model.item_attributes, model.attribute_table, model.vocabulary)  # fixed, and large
        averages = copy.deepcopy(model, {id(x): x for x in shared if x is not None})
        self.averages = averages.requires_grad_(False).eval()

    def __call__(self, draw: Draw, hidden: Tensor, classifier: Classifier, weighting: Weighting) -> ItemLosses:
        """Return the members' losses at the targets."""
        if weighting.kd_weight == 0 or len(hidden) == 1:  # the averages need not be run
            return Mutual()(draw, hidden, classifier, weighting._replace(kd_weight=0.0))
        weight, bias = classifier
        product_dtype = weighting.product_dtype
        with torch.no_grad(), torch.autocast(hidden.device.type, torch.bfloat16, product_dtype == torch.bfloat16):
            states = self.averages.states(draw.inputs, by_length=True, training=False, lengths=draw.lengths)
            keys, key_bias = whole_classifier(self.averages)
            averages = Networks(states.at(draw.positions).to(weight.dtype), keys.to(weight.dtype), key_bias)
        return mean_teacher_losses(
            hidden.to(weight.dtype),
            weight,
            bias,
            averages,
            draw.targets - 1,
            valid=draw.valid,
            ce_weight=weighting.targets,
            kd_weight=float(weighting.kd_weight),  # no tensor: a graph does not go with averages
            temperature=weighting.kd.temperature,
            scale_by_temperature_squared=weighting.kd.scale_by_temperature_squared,
            between=weighting.kd.between,
            kinds=weighting.kinds,
            product_dtype=product_dtype,
        )

    @torch.no_grad()
    def update(self, *, step: int) -> None:
        """Move the averages towards the model's weights, after step number ``step`` of the run (from 1).

        What is not of floating point, such as a count of batches, is copied.
        """
        own = self.model.state_dict()
        for name, average in self.averages.state_dict().items():
            if average.is_floating_point():
                average.copy_(moving_average(average, own[name], decay=self.decay, step=step))
            else:
                average.copy_(own[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by the names of the model's own state."""
        return self.averages.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take averages from ``state_dict``."""
        self.averages.load_state_dict(state)


def learns_from_averages(losses: Loss | int) -> bool:
    """Return True if a sum of losses has ``KD(teacher="ema")``.

    Examples:
        >>> learns_from_averages(2 * KD(teacher="ema")), learns_from_averages(KD()), learns_from_averages(0)
        (True, False, False)
    """
    return any(isinstance(term, KD) and term.teacher == "ema" for _, term in terms_by_name(losses).values())
