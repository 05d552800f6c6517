"""A check of the two great arguments, before anything is read from them."""

from __future__ import annotations

from ensemble_kd.data import AnySequences, MappedSequences, SequenceData
from ensemble_kd.ensemble.model import EnsembleKD
from ensemble_kd.internal import instance


def check_model_and_data(where: str, model: EnsembleKD, data: AnySequences) -> None:
    """Check that both are what they should be.

    Raises:
        EnsembleKDError: something else, such as the class in place of a model.
    """
    instance(where, "model", model, EnsembleKD, "Build one: EnsembleKD(encoder_fn).")
    fix = "Read a file, or use SequenceData.from_sequences."
    instance(where, "data", data, (SequenceData, MappedSequences), fix)
