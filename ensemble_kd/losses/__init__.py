"""How wrong predictions are: the loss terms as values, and their computation by tiles."""

from ensemble_kd.losses.attributes import attribute_losses
from ensemble_kd.losses.compiled import compile_status
from ensemble_kd.losses.formula import Networks, Weight, weighted
from ensemble_kd.losses.items import ItemLosses, item_losses
from ensemble_kd.losses.mean_teachers import mean_teacher_losses
from ensemble_kd.losses.pairs import Between, Gate, Spread
from ensemble_kd.losses.peers import Part
from ensemble_kd.losses.sampled import sampled_item_losses
from ensemble_kd.losses.students import distillation_losses
from ensemble_kd.losses.terms import (
    AP,
    CCL,
    ICL,
    KD,
    Ambiguity,
    Loss,
    LossName,
    LossSum,
    Need,
    On,
    Teacher,
    Term,
    scale_transfer,
    terms_by_name,
)

__all__ = [
    "AP",
    "CCL",
    "ICL",
    "KD",
    "Ambiguity",
    "Between",
    "Gate",
    "ItemLosses",
    "Loss",
    "LossName",
    "LossSum",
    "Need",
    "Networks",
    "On",
    "Part",
    "Spread",
    "Teacher",
    "Term",
    "Weight",
    "attribute_losses",
    "compile_status",
    "distillation_losses",
    "item_losses",
    "mean_teacher_losses",
    "sampled_item_losses",
    "scale_transfer",
    "terms_by_name",
    "weighted",
]
