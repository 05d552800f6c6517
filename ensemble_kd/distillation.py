"""``distill``: a network that learns from a trained ensemble, so that serving costs one network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ensemble_kd.data import SequenceData
from ensemble_kd.ensemble import EnsembleKD, Step
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import AP, KD, ItemLosses, Loss, distillation_losses, terms_by_name
from ensemble_kd.objectives import Draw, MaskedItem, NextItem, Objective
from ensemble_kd.serving import item_vectors, query_vectors
from ensemble_kd.training import FitResult, fit
from ensemble_kd.training.settings import checksum


class Distilled(NamedTuple):
    """What ``distill`` returns."""

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

    The teacher is the ensemble's mean of logits (Eq. 20), in evaluation mode, on the very inputs that the student
    reads; its gradient is that of KD (Eqs. 16–18) with one teacher, computed by tiles like the ensemble's own.

    On the sequences that it was trained on a teacher knows the answers, and says little of what else it has learned.
    So the student learns from what it says to as many ``splice``d sequences as well: a teacher needs no targets.
    (Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", CVPR 2022, do so with images.)

    Args:
        ensemble: trained; it stays as it is, and has to be where the student is to be trained.
        student_fn: ``() -> nn.Module``, an encoder as for ``EnsembleKD``, of any kind and width that reads what the
            members read.
        data: what the student learns from, usually what the ensemble did.
        n: how many students; several, each with weights and dropout of its own, make an ensemble of better members.
        losses: ``KD`` with its weight and temperature, and ``AP`` where wanted. Default: ``10 * KD(temperature=1.0)``,
            and AP as the ensemble has it.
        objective: default: the ensemble's, over all items.
        classifier: default: the ensemble's.
        spliced: learn from spliced sequences, too, which takes a step twice as long; the loss is the mean of both.
        seed: of the student's weights and, unless ``options`` has another, of the run.
        options: of ``fit``: epochs, lr, window, precision, output_dir, ...

    Returns:
        The student and how its training went.

    Raises:
        EnsembleKDError: losses without KD or with contrastive terms, sampled negatives, or what ``fit`` refuses.

    Examples:
        >>> from ensemble_kd.data import synthetic
        >>> from ensemble_kd.encoders import SASRec
        >>> data = synthetic(num_users=40, num_items=100)
        >>> ensemble = EnsembleKD(lambda: SASRec(100, d_model=4, max_len=10), n=3)
        >>> found = distill(ensemble, lambda: SASRec(100, d_model=8, max_len=10), data, epochs=1, progress=False)
        >>> len(found.student), found.student.hidden_size
        (1, 8)
    """
    ensemble.ranks.require_whole("distill")
    own = terms_by_name(ensemble.losses).get("ap")
    with_ap = own is not None and data.item_attributes is not None
    if losses is None:
        kd = 10 * KD(temperature=1.0)
        losses = kd + own[0] * AP() if own is not None and with_ap else kd
    named = terms_by_name(losses)
    if "kd" not in named or named.keys() & {"icl", "ccl"}:
        fix = "Pass losses=10 * KD(temperature=1.0), or that and AP()."
        raise EnsembleKDError("distill", "losses with KD, and AP at most", repr(losses), fix)
    chosen = ensemble.objective if objective is None else objective
    if isinstance(chosen, MaskedItem | NextItem) and chosen.negatives is not None:
        if objective is not None:
            fix = "Leave negatives out: the student learns from the teacher's whole distribution."
            raise EnsembleKDError("distill", "an objective over all items", repr(objective), fix)
        chosen = replace(chosen, negatives=None)
    if data.num_items != ensemble.num_items:
        fix = "Distil on the data that the ensemble knows."
        raise EnsembleKDError("distill", f"data of {ensemble.num_items} items", data.num_items, fix)
    student = _Student(
        student_fn,
        n,
        num_items=ensemble.num_items,
        objective=chosen,
        losses=losses,
        item_attributes=data.item_attributes if "ap" in named else None,
        classifier=ensemble.classifier if classifier is None else classifier,
        seed=seed,
    ).to(ensemble.device)
    student.learn_from(ensemble, spliced=spliced)
    result = fit(student, data, **{"seed": seed, **options})
    return Distilled(student.alone(), result)


def splice(item_ids: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Sequences that begin as one of the batch and end as another: the newest items of each row, of another row before.

    Of each row of T items the newest 1..T are kept, in front of which stands another row without some of its newest.

    Args:
        item_ids: (b, l) int64, padded with 0 on the left.
        generator: source of randomness, on the device of ``item_ids``; None: torch's global one.

    Returns:
        (b, l) int64, padded with 0 on the left; what does not fit is cut off there.

    Examples:
        >>> spliced = splice(torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]]))
        >>> spliced.shape, spliced[:, -1].tolist()
        (torch.Size([2, 5]), [3, 8])
    """
    (b, length), device = item_ids.shape, item_ids.device
    column, count = torch.arange(length, device=device), (item_ids != 0).sum(dim=1)
    share = torch.rand(2, b, 1, generator=generator, device=device)
    other = torch.randperm(b, generator=generator, device=device)
    kept = ((share[0] * count[:, None]).long() + 1).minimum(count[:, None])
    left_out = (share[1] * count[other, None]).long()
    at = column + kept - left_out  # the column of the other row, whose newest that stays is to end where this begins
    before = item_ids[other].gather(1, at.clamp(0, length - 1)).masked_fill(at < 0, 0)
    return torch.where(column >= length - kept, item_ids, before)


_TEACHING = ("_teacher", "_keys", "_spliced", "_ce_share")  # what a student has beyond an ordinary network


class _Student(EnsembleKD):
    """Networks whose KD has a teacher outside of them."""

    def learn_from(self, teacher: EnsembleKD, *, spliced: bool) -> None:
        # Past nn.Module's registry: the teacher's weights are neither trained nor saved with the student.
        self.__dict__["_teacher"] = teacher
        with torch.no_grad():
            vectors = item_vectors(*teacher.classifier_weights())
        self.__dict__["_keys"] = (vectors[:, :-1].contiguous(), vectors[:, -1].contiguous())
        self._spliced, self._ce_share = spliced, 1.0

    def _told(self) -> dict[str, str]:
        return {
            "teacher": f"item vectors with checksum {checksum(self.__dict__['_keys'][0])}",
            "spliced": repr(self._spliced),
        }

    def loss(
        self,
        item_ids: Tensor,
        *,
        generator: torch.Generator | None = None,
        validate: bool = True,
        by_length: bool = False,
    ) -> Step:
        """As of ``EnsembleKD``; with spliced sequences the mean of both, the terms those of the real ones."""
        real = super().loss(item_ids, generator=generator, validate=validate, by_length=by_length)
        if not self._spliced:
            return real
        self._ce_share = 0.0  # nobody has had such a sequence: there is nothing to predict but what the teacher says
        try:
            mixed = splice(item_ids, generator=generator)
            made = super().loss(mixed, generator=generator, validate=False, by_length=by_length)
        finally:
            self._ce_share = 1.0
        return Step((real.total + made.total) / 2, real.terms)

    def _teach(self, draw: Draw, at: Tensor) -> Tensor:
        """The teacher's states at the target positions ``at`` of the views, members side by side: (t, n d)."""
        teacher: EnsembleKD = self.__dict__["_teacher"]
        training = teacher.training
        teacher.eval()
        try:
            with torch.no_grad():
                states = teacher._pack(draw.inputs, by_length=True)
        finally:
            teacher.train(training)
        return query_vectors(states.at(at))[:, :-1]

    def _item_losses(
        self, draw: Draw, hidden: Tensor, classifier: tuple[Tensor, Tensor], product_dtype: torch.dtype
    ) -> ItemLosses:
        weight, bias = classifier
        kd_weight, kd = self._terms["kd"]
        assert isinstance(kd, KD)
        m = self.objective.views
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=product_dtype == torch.bfloat16):
            queries = self._teach(draw, draw.positions)
        keys, key_bias = self.__dict__["_keys"]
        return distillation_losses(
            hidden.to(weight.dtype),
            weight,
            bias,
            queries.to(weight.dtype),
            keys.to(weight.dtype),
            key_bias.to(weight.dtype),
            draw.targets - 1,
            valid=draw.valid,
            ce_weight=m * self._ce_share,  # views have equally many targets: a sum of means is m times the mean
            kd_weight=kd_weight * m,
            temperature=kd.temperature,
            scale_by_temperature_squared=kd.scale_by_temperature_squared,
            product_dtype=product_dtype,
        )

    def alone(self) -> EnsembleKD:
        """The same networks without a teacher, an ordinary ensemble."""
        plain = EnsembleKD.__new__(EnsembleKD)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k not in _TEACHING})
        own = terms_by_name(self.losses).get("ap")
        plain.losses = own[0] * own[1] if own is not None else 0
        return plain
