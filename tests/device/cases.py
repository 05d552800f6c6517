"""Small models on both devices: the same weights, the same draw, without dropout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_kd import (
    AP,
    CCL,
    ICL,
    KD,
    EnsembleKD,
    MaskedItem,
    NextItem,
)
from ensemble_kd.data import SequenceData, synthetic
from ensemble_kd.encoders import BERT4Rec, Caser, GRU4Rec, SASRec
from ensemble_kd.objectives import Draw, Objective
from ensemble_kd.training import RowAdamW, clip_members_

ITEMS, LENGTH = 80, 8
SMALL: dict[str, Any] = {"num_items": ITEMS, "d_model": 8, "max_len": LENGTH}
ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "BERT4Rec": lambda dropout: BERT4Rec(**SMALL, dropout=dropout, num_layers=1),
    "SASRec": lambda dropout: SASRec(**SMALL, dropout=dropout, num_layers=1),
    "GRU4Rec": lambda dropout: GRU4Rec(**SMALL, dropout=dropout),
    "Caser": lambda dropout: Caser(**SMALL, dropout=dropout, window=3, horizontal=2, vertical=2),
}
OBJECTIVES: dict[str, Objective] = {
    "masked": MaskedItem(mask_ratio=0.4, views=2),
    "masked, sampled": MaskedItem(mask_ratio=0.4, views=2, negatives=16),
    "next": NextItem(views=2),
    "next, sampled": NextItem(negatives=16),
    "next, masked inputs": NextItem(views=2, mask_ratio=0.3),
}


def trains(encoder: str, objective: str) -> bool:
    """Return True for an encoder that the objective suits; one encoder takes the rarest of them."""
    if objective.startswith("masked"):
        return encoder == "BERT4Rec"
    return encoder == "SASRec" or (encoder != "BERT4Rec" and objective != "next, masked inputs")


LOSSES = 0.5 * AP() + 0.1 * (ICL() + CCL()) + 0.5 * KD(temperature=0.5)


def data() -> SequenceData:
    return synthetic(num_users=30, num_items=ITEMS)


def build(encoder: str, objective: Objective, *, dropout: float = 0.0, **options: Any) -> EnsembleKD:
    options = {"n": 2, "losses": LOSSES, "item_attributes": data().item_attributes, **options}
    return EnsembleKD(lambda: ENCODERS[encoder](dropout), objective=objective, **options)


def batch(rows: int = 6) -> Tensor:
    windows = data().train_windows(LENGTH)
    return windows[(windows != 0).sum(1) > 1][:rows]


@dataclasses.dataclass
class Recorded:
    """An objective that keeps its draw, or repeats one that is given."""

    objective: Objective
    kept: Draw | None = None
    replay: bool = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def draw(self, *args: Any, **kwargs: Any) -> Draw:
        if not self.replay:
            self.kept = self.objective.draw(*args, **kwargs)
        assert self.kept is not None
        return self.kept

    def on_host(self) -> Recorded:
        """Return an objective that repeats the draw on the CPU."""
        assert self.kept is not None
        return Recorded(self.objective, _host(self.kept), replay=True)


def _host(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.cpu()
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return dataclasses.replace(x, **{f.name: _host(getattr(x, f.name)) for f in dataclasses.fields(x)})
    return type(x)(*map(_host, x)) if isinstance(x, tuple) and hasattr(x, "_fields") else x


def step(model: EnsembleKD, ids: Tensor, optimizer: torch.optim.Optimizer, dtype: torch.dtype, **options: Any) -> Any:
    """Run one whole training step; returns its losses and its gradients before clipping."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = model.loss(ids, validate=False, **options)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    clip_members_(list(model.parameters()), 5.0)
    optimizer.step()
    return losses, grads


def optimizer(model: EnsembleKD) -> RowAdamW:
    return RowAdamW(model.parameters(), lr=1e-3)
