"""``join``: ensembles that were trained apart become one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ensemble_kd.ensemble.classifier import whole_classifier
from ensemble_kd.ensemble.model import EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import instance


def join(models: Sequence[EnsembleKD]) -> EnsembleKD:
    """Return one ensemble of the members of several, which were trained apart, of one architecture or several.

    Members keep their weights and their classifiers. Where classifiers are not all tied to the same embedding, each
    becomes a linear one with the same weights. All members count alike; ``evaluation.calibrate`` fits a weight to each.

    Args:
        models: of the same items and the same kind of objective. They are copied, and stay as they are.

    Returns:
        The ensemble, on the device of all, without losses between members.

    Raises:
        EnsembleKDError: no models, other items, objectives or devices, or members in other processes.

    Examples:
        >>> from ensemble_kd.encoders import GRU4Rec, SASRec
        >>> first = EnsembleKD(lambda: SASRec(9, d_model=4, max_len=5), n=2, classifier="tied").eval()
        >>> second = EnsembleKD(lambda: GRU4Rec(9, d_model=8, max_len=5), n=1).eval()
        >>> joined, ids = join([first, second]), torch.tensor([[1, 2, 3]])
        >>> len(joined), torch.allclose(joined.member_scores(ids)[2], second(ids))
        (3, True)
    """
    if not isinstance(models, Sequence) or not models:
        raise EnsembleKDError("join", "a list of ensembles", repr(models), "Pass one or more of EnsembleKD.")
    for i, model in enumerate(models):
        instance("join", f"models[{i}]", model, EnsembleKD, "Pass trained ensembles, such as those of export.load.")
        model.place.require_whole("join")
        for name, own, first in (
            ("num_items", model.num_items, models[0].num_items),
            ("objective", type(model.objective).__name__, type(models[0].objective).__name__),
            ("vocabulary", model.vocabulary, models[0].vocabulary),
            ("device", model.device, models[0].device),
        ):
            if own != first:
                fix = "Join ensembles on one device that were trained on the same items, to predict the same positions."
                raise EnsembleKDError("join", f"models[{i}] with {name} {first}, as the first", own, fix)
    classifiers, lengths = {model.classifier for model in models}, [m.max_len for m in models if m.max_len is not None]
    joined = EnsembleKD.from_members(
        [model.encoder.member(i) for model in models for i in range(len(model))],
        num_items=models[0].num_items,
        objective=models[0].objective,
        losses=0,
        classifier=classifiers.pop() if len(classifiers) == 1 else "linear",
        max_len=min(lengths, default=None),
        vocabulary=models[0].vocabulary,
    )
    found = [whole_classifier(model) for model in models]
    with torch.no_grad():
        joined.item_classifier.bias.copy_(torch.cat([each.bias for each in found]))
        if joined.item_classifier.weight is not None:
            widest = joined.hidden_size
            filled = [F.pad(each.weight, (0, widest - each.weight.shape[-1])) for each in found]
            joined.item_classifier.weight.copy_(torch.cat(filled))
    return joined.train(models[0].training)
