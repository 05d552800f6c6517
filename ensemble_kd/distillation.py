"""``distill``: a network that learns from a trained ensemble, so that serving costs one network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ensemble_kd.data import MappedSequences, SequenceData
from ensemble_kd.ensemble import (
    Classifier,
    EnsembleKD,
    ItemLoss,
    Weighting,
    check_catalogue,
    checksum,
)
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import flag, instance
from ensemble_kd.losses import (
    AP,
    KD,
    ItemLosses,
    Loss,
    distillation_losses,
    terms_by_name,
)
from ensemble_kd.objectives import Draw, MaskedItem, NextItem, Objective, splice
from ensemble_kd.training import FitResult, fit


class FromTeacher(ItemLoss):
    """Cross-entropy, and KD from an ensemble outside of the trained model: the loss of ``distill``.

    The teacher is the ensemble's mean of logits (Eq. 20), in evaluation mode, on the very inputs that the student
    reads. The gradient is that of KD (Eqs. 16-18) with one teacher, computed by tiles. The weight and the temperature
    are those of the student's own ``KD`` term.

    On the sequences that it was trained on, a teacher knows the answers and adds little to the targets. So the student
    also learns from the teacher's scores on as many ``splice``d sequences, which need no targets. (Beyer et al.,
    "Knowledge distillation: A good teacher is patient and consistent", CVPR 2022, do so with images.)

    Args:
        teacher: trained, on the device of the student; it stays as it is.
        spliced: learn from spliced sequences, too. A step then takes twice as long; the loss is the mean of both.

    Examples:
        >>> from ensemble_kd.encoders import SASRec
        >>> teacher = EnsembleKD(lambda: SASRec(9, d_model=4, max_len=5), n=3)
        >>> student = EnsembleKD(lambda: SASRec(9, d_model=8, max_len=5), n=1, losses=KD(temperature=1.0))
        >>> step = student.loss(torch.tensor([[1, 2, 3], [4, 5, 6]]), item_loss=FromTeacher(teacher))
        >>> list(step.terms)
        ['nip', 'kd']
    """

    def __init__(self, teacher: EnsembleKD, *, spliced: bool = True) -> None:
        instance("FromTeacher", "teacher", teacher, EnsembleKD, "Pass a trained ensemble.")
        flag("FromTeacher", "spliced", spliced)
        teacher.place.require_whole("FromTeacher")
        self.teacher, self.spliced = teacher, spliced
        vectors = teacher.item_vectors()
        self.keys, self.key_bias = vectors[:, :-1].contiguous(), vectors[:, -1].contiguous()

    def __call__(self, draw: Draw, hidden: Tensor, classifier: Classifier, weighting: Weighting) -> ItemLosses:
        """Return the students' losses at the targets.

        Raises:
            EnsembleKDError: the objective samples its negatives, while the student learns from all items; KD has more
                settings than its temperature; or the losses have Ambiguity.
        """
        if draw.candidates is not None:
            fix = "Leave negatives out: the student learns from the teacher's whole distribution."
            raise EnsembleKDError("FromTeacher", "an objective over all items", "sampled negatives", fix)
        if weighting.ambiguity_weight != 0:
            fix = "Leave Ambiguity out: students learn from their teacher alone, not from each other."
            raise EnsembleKDError("FromTeacher", "losses without Ambiguity", f"{weighting.ambiguity_weight:g}", fix)
        plain = KD(weighting.kd.temperature, weighting.kd.scale_by_temperature_squared)
        if weighting.kd != plain:
            fix = "Leave the rest out: students have one teacher, the ensemble, and learn all that it knows."
            raise EnsembleKDError("FromTeacher", repr(plain), repr(weighting.kd), fix)
        weight, bias = classifier
        product_dtype = weighting.product_dtype
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=product_dtype == torch.bfloat16):
            queries = self._queries(draw)
        return distillation_losses(
            hidden.to(weight.dtype),
            weight,
            bias,
            queries.to(weight.dtype),
            self.keys.to(weight.dtype),
            self.key_bias.to(weight.dtype),
            draw.targets - 1,
            valid=draw.valid,
            ce_weight=weighting.targets,
            kd_weight=float(weighting.kd_weight),
            temperature=weighting.kd.temperature,
            scale_by_temperature_squared=weighting.kd.scale_by_temperature_squared,
            product_dtype=product_dtype,
        )

    def _queries(self, draw: Draw) -> Tensor:
        """Return the teacher's states at the target positions of the views, members side by side: (t, n d)."""
        with torch.no_grad():
            states = self.teacher.states(draw.inputs, by_length=True, training=False)
        return self.teacher.joined(states.at(draw.positions))[:, :-1]

    def further(self, item_ids: Tensor, *, generator: torch.Generator | None) -> Tensor | None:
        """Return spliced sequences, which no user has had."""
        return splice(item_ids, generator=generator) if self.spliced else None

    def fingerprint(self) -> dict[str, str]:
        """Return the teacher's checksum and the use of spliced sequences."""
        return {"teacher": f"item vectors with checksum {checksum(self.keys)}", "spliced": repr(self.spliced)}


class Distilled(NamedTuple):
    """The result of ``distill``."""

    student: EnsembleKD  # of one network, or of n, with the weights of the best epoch
    result: FitResult


def distill(
    ensemble: EnsembleKD,
    student_fn: Callable[[], nn.Module],
    data: SequenceData,
    *,
    n: int = 1,
    losses: Loss | None = None,
    objective: Objective | None = None,
    classifier: str | None = None,
    spliced: bool = True,
    seed: int = 0,
    **options: Any,
) -> Distilled:
    """Train a network on the targets and on the distribution that the ensemble gives for each of them.

    It is ``fit(student, data, loss=FromTeacher(ensemble))`` with the arguments that suit it.

    Args:
        ensemble: trained; it stays as it is, and has to be where the student is to be trained.
        student_fn: ``() -> nn.Module``, an encoder as for ``EnsembleKD``, of any kind and width that reads what the
            members read.
        data: the sequences that the student learns from, usually those of the ensemble.
        n: number of students; several, each with weights and dropout of its own, make an ensemble of better members.
        losses: ``KD`` with its weight and temperature, and ``AP`` if wanted. Default: ``10 * KD(temperature=1.0)``,
            and AP as the ensemble has it.
        objective: default: the ensemble's, over all items.
        classifier: default: the ensemble's.
        spliced: as of ``FromTeacher``.
        seed: of the student's weights and, unless ``options`` has another, of the run.
        options: of ``fit``: epochs, lr, window, precision, output_dir, ...

    Returns:
        The student and how its training went.

    Raises:
        EnsembleKDError: losses without KD or with terms besides AP, sampled negatives, or what ``fit`` refuses.

    Examples:
        >>> from ensemble_kd.data import synthetic
        >>> from ensemble_kd.encoders import SASRec
        >>> data = synthetic(num_users=40, num_items=100)
        >>> ensemble = EnsembleKD(lambda: SASRec(100, d_model=4, max_len=10), n=3)
        >>> found = distill(ensemble, lambda: SASRec(100, d_model=8, max_len=10), data, epochs=1, progress=False)
        >>> len(found.student), found.student.hidden_size
        (1, 8)
    """
    instance("distill", "ensemble", ensemble, EnsembleKD, "Pass a trained ensemble.")
    instance("distill", "data", data, (SequenceData, MappedSequences), "Pass the sequences to learn from.")
    flag("distill", "spliced", spliced)
    ensemble.place.require_whole("distill")
    own = terms_by_name(ensemble.losses).get("ap")
    with_ap = own is not None and data.item_attributes is not None
    if losses is None:
        kd = 10 * KD(temperature=1.0)
        losses = kd + own[0] * AP() if own is not None and with_ap else kd
    named = terms_by_name(losses)
    if "kd" not in named or named.keys() & {"icl", "ccl", "ambiguity"}:
        fix = "Pass losses=10 * KD(temperature=1.0), or that and AP()."
        raise EnsembleKDError("distill", "losses with KD, and AP at most", repr(losses), fix)
    chosen = ensemble.objective if objective is None else objective
    if getattr(chosen, "negatives", None) is not None:
        if objective is not None or not isinstance(chosen, MaskedItem | NextItem):
            fix = "Pass one without negatives: the student learns from the teacher's whole distribution."
            raise EnsembleKDError("distill", "an objective over all items", repr(chosen), fix)
        chosen = replace(chosen, negatives=None)
    check_catalogue("distill", ensemble, data)
    student = EnsembleKD(
        student_fn,
        n,
        num_items=ensemble.num_items,
        objective=chosen,
        losses=losses,
        item_attributes=data.item_attributes if "ap" in named else None,
        classifier=ensemble.classifier if classifier is None else classifier,
        seed=seed,
        vocabulary=ensemble.vocabulary,
    ).to(ensemble.device)
    result = fit(student, data, loss=FromTeacher(ensemble, spliced=spliced), **{"seed": seed, **options})
    ap = terms_by_name(losses).get("ap")
    student.losses = 0 if ap is None else ap[0] * ap[1]  # it has nothing more to learn from: the teacher is gone
    return Distilled(student, result)
