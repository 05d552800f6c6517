"""Training objectives: how a batch of sequences becomes inputs, target positions and targets."""

from ensemble_kd.objectives.candidates import Candidates, draw_candidates
from ensemble_kd.objectives.masked import MaskedItem
from ensemble_kd.objectives.next_item import NextItem
from ensemble_kd.objectives.positions import mask_positions, places, selects
from ensemble_kd.objectives.protocol import Draw, Objective
from ensemble_kd.objectives.splicing import splice

__all__ = [
    "Candidates",
    "Draw",
    "MaskedItem",
    "NextItem",
    "Objective",
    "draw_candidates",
    "mask_positions",
    "places",
    "selects",
    "splice",
]
