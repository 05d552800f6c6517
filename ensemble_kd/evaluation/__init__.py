"""How good a model is: ranks of held-out items, and weights and temperatures of members that fit them."""

from ensemble_kd.evaluation.calibration import (
    Calibration,
    Quality,
    calibrate,
    calibration_error,
    held_out_states,
)
from ensemble_kd.evaluation.ranking import (
    LONGEST,
    TILE_BYTES,
    Evaluation,
    Exclude,
    evaluate,
    evaluate_popularity,
    protocol,
    table,
)

__all__ = [
    "LONGEST",
    "TILE_BYTES",
    "Calibration",
    "Evaluation",
    "Exclude",
    "Quality",
    "calibrate",
    "calibration_error",
    "evaluate",
    "evaluate_popularity",
    "held_out_states",
    "protocol",
    "table",
]
