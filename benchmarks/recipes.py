"""The paper's recipe on Beauty, and plain training steps of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.baseline import Weights, loss, members_of
from benchmarks.common import Row, Step
from ensemble_kd import EnsembleKD, MaskedItem
from ensemble_kd.data import BatchPlan, SequenceData
from ensemble_kd.encoders import BERT4Rec
from ensemble_kd.losses import Loss
from ensemble_kd.stacking import Backend
from ensemble_kd.training import RowAdamW

N, WINDOW, BATCH = 3, 15, 256
DROPOUT = 0.2


def encoder(num_items: int, d: int, *, dropout: float = DROPOUT) -> BERT4Rec:
    """One network of the paper: two layers, two heads, room for the [mask] that asks for the next item."""
    return BERT4Rec(num_items, d_model=d, max_len=WINDOW + 1, dropout=dropout, norm_first=True)


def ensemble(
    data: SequenceData,
    d: int,
    *,
    n: int = N,
    views: int,
    losses: Loss | None = None,
    device: str = "cpu",
    backend: Backend = "auto",
    encoder_fn: Callable[[], torch.nn.Module] | None = None,
) -> EnsembleKD:
    """n BERT4Rec networks on masked items, with the losses of the paper where none are given."""
    return EnsembleKD(
        encoder_fn or (lambda: encoder(data.num_items, d)),
        n,
        num_items=data.num_items,
        max_len=WINDOW + 1,
        objective=MaskedItem(mask_ratio=0.15, views=views),
        losses=Weights().losses() if losses is None else losses,
        item_attributes=data.item_attributes,
        backend=backend,
    ).to(device)


def batch(data: SequenceData, rows: int = BATCH, device: str = "cpu") -> Tensor:
    """A batch of windows at random, (rows, 15): nothing but the paper's padding."""
    windows = data.train_windows(WINDOW)
    return BatchPlan(windows, min(rows, len(windows)), seed=0, epoch=0)[0].to(device)


def ensemble_step(
    model: EnsembleKD, item_ids: Tensor, dtype: torch.dtype = torch.float32, *, by_length: bool = False
) -> Step:
    """Loss, backward, optimizer, as ``fit`` runs them (clipping apart)."""
    optimizer = RowAdamW(model.parameters())

    def step() -> None:
        with torch.autocast(item_ids.device.type, dtype, enabled=dtype != torch.float32):
            total = model.loss(item_ids, validate=False, by_length=by_length).total
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return step


def reference_step(model: EnsembleKD, item_ids: Tensor) -> Step:
    """The same with separate modules and torch's default Adam, in float32: see ``baseline``."""
    members, table = members_of(model), model.attribute_table
    assert table is not None
    optimizer = torch.optim.Adam([p for member in members for p in member.parameters()], lr=1e-3)

    def step() -> None:
        draw = model.objective.draw(item_ids, mask_token=model.mask_token)
        total = loss(members, draw, table, Weights())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return step


def sizes(model: EnsembleKD, item_ids: Tensor) -> Row:
    return {
        "n": len(model),
        "d": model.hidden_size,
        "v": model.num_items,
        "views": model.objective.views,
        "batch": len(item_ids),
        "length": item_ids.shape[1],
    }
