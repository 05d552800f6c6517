"""Adam by rows under a scaler of gradients."""

from __future__ import annotations

import pytest
import torch

from ensemble_kd.stacking import take_rows
from ensemble_kd.training import RowAdamW


@pytest.mark.parametrize("sparse", [True, False])
def test_a_scaler_unscales_sparse_gradients_as_well(sparse: bool) -> None:
    """eps is large beside the true gradients: those that are still scaled would step further."""
    tables = []
    for scaled in (False, True):
        table = torch.nn.Parameter(torch.zeros(1, 6, 2))
        optimizer = RowAdamW([table], lr=0.1, eps=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        rows = torch.tensor([1, 4])
        picked = take_rows(table, rows) if sparse else table[:, rows]
        scaler.scale(picked.sum()).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        tables.append(table.detach())
    torch.testing.assert_close(*tables)
    assert float(tables[0].abs().max()) == pytest.approx(0.05, rel=1e-3)
