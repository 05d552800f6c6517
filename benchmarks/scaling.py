"""A whole training step over catalogues of growing size: sampled (``negatives=1024``) against the full softmax.

Forward, backward, clipping and optimizer, as in ``fit``. Items are drawn uniformly, so that a step touches as many
different rows as it can: the worst case for updates by rows, and for the caches.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from benchmarks.common import Row, Step, interleaved, sig
from ensemble_kd import (
    CCL,
    ICL,
    KD,
    EnsembleKD,
    MaskedItem,
)
from ensemble_kd.encoders import BERT4Rec
from ensemble_kd.training import RowAdamW, clip_members_

N, BATCH, LENGTH, VIEWS = 3, 256, 15, 2
BEAUTY, SAMPLED, FULL = 12101, "sampled", "full"


def sequences(num_items: int, device: str) -> Tensor:
    """(b, l) windows with the lengths of real data: as many short ones as long ones."""
    rng = torch.Generator().manual_seed(0)
    items = torch.randint(1, num_items + 1, (BATCH, LENGTH), generator=rng)
    lengths = torch.randint(2, LENGTH + 1, (BATCH, 1), generator=rng)
    return items.where(torch.arange(LENGTH) >= LENGTH - lengths, 0).to(device)


def make(num_items: int, d: int, negatives: int | None, device: str) -> tuple[EnsembleKD, Step]:
    model = EnsembleKD(
        lambda: BERT4Rec(num_items, d_model=d, max_len=LENGTH + 1, norm_first=True),
        N,
        objective=MaskedItem(views=VIEWS, negatives=negatives),
        losses=0.01 * (ICL(temperature=0.3) + CCL(temperature=0.3)) + 0.001 * KD(temperature=0.3),
    ).to(device)
    item_ids, parameters = sequences(num_items, device), list(model.parameters())
    optimizer = RowAdamW(parameters, weight_decay=0.0)

    def step() -> None:
        total = model.loss(item_ids, validate=False).total
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        clip_members_(parameters, 5.0)
        optimizer.step()

    return model, step


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows: v, ms of a step, and the times it takes of the first row's (a round's ratio, the median)."""
    d, negatives = (8, 32) if quick else (64, 1024)
    sizes: dict[str, tuple[int, ...]] = {SAMPLED: (200, 2000) if quick else (BEAUTY, 100_000, 1_000_000)}
    sizes[FULL] = sizes[SAMPLED][: 1 if quick else 2]
    steps = {
        (variant, v): make(v, d, negatives if variant == SAMPLED else None, device)[1]
        for variant, several in sizes.items()
        for v in several
    }
    named = {f"{variant}, v={v}": step for (variant, v), step in steps.items()}
    # Moments are laid out in memory at the first touch of their rows: two rounds before any counts.
    found = interleaved("scaling", named, rounds=7, warm_up=2, quick=quick)
    base = found[f"{SAMPLED}, v={sizes[SAMPLED][0]}"]
    rows: list[Row] = []
    for (variant, v), name in zip(steps, named, strict=True):
        ratios = [ms / of for ms, of in zip(found[name].ms, base.ms, strict=True)]
        row: Row = {"v": v, "variant": variant, "negatives": negatives if variant == SAMPLED else None, "d": d}
        rows.append(row | found[name].row() | {"times_base": sig(statistics.median(ratios), 3)})
    return rows
