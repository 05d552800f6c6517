"""``EnsembleKD``: the parts put together."""

from ensemble_kd.ensemble.checked import check_model_and_data
from ensemble_kd.ensemble.contract import (
    Attributes,
    check_attributes,
    check_catalogue,
    check_output,
    probe,
    size_of,
)
from ensemble_kd.ensemble.defaults import default_losses
from ensemble_kd.ensemble.fingerprint import checksum, fingerprint, without_addresses
from ensemble_kd.ensemble.item_loss import Classifier, ItemLoss, Mutual, Weighting
from ensemble_kd.ensemble.joining import join
from ensemble_kd.ensemble.mean_teachers import MeanTeachers, learns_from_averages
from ensemble_kd.ensemble.model import EnsembleKD, Options
from ensemble_kd.ensemble.precision import Chosen, Precision, choose_precision
from ensemble_kd.ensemble.step import Step

__all__ = [
    "Attributes",
    "Chosen",
    "Classifier",
    "EnsembleKD",
    "ItemLoss",
    "MeanTeachers",
    "Mutual",
    "Options",
    "Precision",
    "Step",
    "Weighting",
    "check_attributes",
    "check_catalogue",
    "check_model_and_data",
    "check_output",
    "checksum",
    "choose_precision",
    "default_losses",
    "fingerprint",
    "join",
    "learns_from_averages",
    "probe",
    "size_of",
    "without_addresses",
]
