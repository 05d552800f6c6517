"""Members of several architectures whose outputs do not go together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ensemble_kd import EnsembleKDError
from ensemble_kd.stacking import MixedModule


class Cut(nn.Linear):
    """Leaves the first position out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[:, 1:])


def test_outputs_of_unequal_positions_are_refused_and_of_unequal_widths_are_not() -> None:
    x = torch.ones(2, 3, 4)
    assert MixedModule([nn.Linear(4, 5), nn.Linear(4, 2)])(x).shape == (2, 2, 3, 5)
    with pytest.raises(EnsembleKDError, match=r"\(2, 3, 5\) of member 0, \(2, 2, 5\) of member 1"):
        MixedModule([nn.Linear(4, 5), Cut(4, 5)])(x)
