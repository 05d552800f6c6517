"""Small ensembles with weights that make scores differ, and sequences for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ensemble_kd import EnsembleKD
from ensemble_kd.encoders import BERT4Rec, Caser, GRU4Rec, SASRec

V, LENGTH = 60, 9
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "BERT4Rec": lambda: BERT4Rec(V, d_model=8, max_len=LENGTH, init_std=0.3),
    "SASRec": lambda: SASRec(V, d_model=8, max_len=LENGTH, init_std=0.3),
    "GRU4Rec": lambda: GRU4Rec(V, d_model=8, max_len=LENGTH),
    "Caser": lambda: Caser(V, d_model=8, max_len=LENGTH),
}


def ensemble(name: str, n: int = 3) -> EnsembleKD:
    model = EnsembleKD(ENCODERS[name], n, classifier="tied" if name == "SASRec" else "linear")
    with torch.no_grad():
        model.item_classifier.bias.normal_()
    return model.eval()


def inputs(b: int, length: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, V + 1, (b, length), generator=g)
    for row in range(b):
        ids[row, : int(torch.randint(length, (), generator=g))] = 0
    return ids
