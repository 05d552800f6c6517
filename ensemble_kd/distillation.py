"""``distill``: a network that learns from a trained ensemble, so that serving costs one network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ensemble_kd.data.sequences import SequenceData
from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.fused import ItemLosses
from ensemble_kd.fused_distillation import distillation_losses
from ensemble_kd.losses import AP, KD, Loss, terms_by_name
from ensemble_kd.objectives import Draw, MaskedItem, NextItem, Objective
from ensemble_kd.serving import item_vectors, query_vectors
from ensemble_kd.training import FitResult, fit


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
    seed: int = 0,
    **options: Any,
) -> Distilled:
    """Train a network on the targets and on the distribution that the ensemble gives for each of them.

    The teacher is the ensemble's mean of logits (Eq. 20), in evaluation mode, on the very inputs that the student
    reads; its gradient is that of KD (Eqs. 16–18) with one teacher, computed by tiles like the ensemble's own.

    Args:
        ensemble: trained; it stays as it is, and has to be where the student is to be trained.
        student_fn: ``() -> nn.Module``, an encoder as for ``EnsembleKD``, of any kind and width that reads what the
            members read.
        data: what the student learns from, usually what the ensemble did.
        n: how many students; several, each with weights and dropout of its own, make an ensemble of better members.
        losses: ``KD`` with its weight and temperature, and ``AP`` where wanted. Default: ``KD(temperature=1.0)``, and
            AP as the ensemble has it.
        objective: default: the ensemble's, over all items.
        classifier: default: the ensemble's.
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
        losses = KD(temperature=1.0) + own[0] * AP() if own is not None and with_ap else KD(temperature=1.0)
    named = terms_by_name(losses)
    if "kd" not in named or named.keys() & {"icl", "ccl"}:
        fix = "Pass losses=KD(temperature=1.0), or that and AP()."
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
    student.learn_from(ensemble)
    result = fit(student, data, **{"seed": seed, **options})
    return Distilled(student.alone(), result)


class _Student(EnsembleKD):
    """Networks whose KD has a teacher outside of them."""

    def learn_from(self, teacher: EnsembleKD) -> None:
        # Past nn.Module's registry: the teacher's weights are neither trained nor saved with the student.
        self.__dict__["_teacher"] = teacher
        with torch.no_grad():
            vectors = item_vectors(*teacher.classifier_weights())
        self.__dict__["_keys"] = (vectors[:, :-1].contiguous(), vectors[:, -1].contiguous())

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
        found = [
            distillation_losses(
                one.to(weight.dtype),
                weight[i],
                bias[i],
                queries.to(weight.dtype),
                keys.to(weight.dtype),
                key_bias.to(weight.dtype),
                draw.targets - 1,
                valid=draw.valid,
                ce_weight=float(m),  # views have equally many targets: a sum of means is m times the mean over all
                kd_weight=kd_weight * m,
                temperature=kd.temperature,
                scale_by_temperature_squared=kd.scale_by_temperature_squared,
                product_dtype=product_dtype,
            )
            for i, one in enumerate(hidden)
        ]
        own = torch.stack([losses.cross_entropy[0] for losses in found])
        total = torch.stack([losses.total for losses in found]).sum()
        return ItemLosses(total, own, torch.stack([losses.kd for losses in found]).sum())

    def alone(self) -> EnsembleKD:
        """The same networks without a teacher, an ordinary ensemble."""
        plain = EnsembleKD.__new__(EnsembleKD)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("_teacher", "_keys")})
        own = terms_by_name(self.losses).get("ap")
        plain.losses = own[0] * own[1] if own is not None else 0
        return plain
