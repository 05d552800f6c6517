"""What to predict: how a batch of sequences becomes inputs, target positions and targets."""

from ensemble_kd.objectives.masked import (
    Draw,
    MaskedItem,
    NextItem,
    Objective,
    mask_positions,
    selects,
)

__all__ = ["Draw", "MaskedItem", "NextItem", "Objective", "mask_positions", "selects"]
