"""Seconds of whole epochs of the paper's recipe on Beauty at d=64 with two views, by ``fit``, validation apart."""

from __future__ import annotations

import statistics

import torch

from benchmarks import recipes
from benchmarks.common import Row, beauty, gflop, sig
from ensemble_kd import EnsembleKD, fit
from ensemble_kd.data import BatchPlan, SequenceData

EPOCHS = 3  # the first is kept apart: it compiles
COUNTED = 8  # batches of an epoch whose products are counted


def products_gflop(model: EnsembleKD, data: SequenceData, device: str = "cpu") -> float:
    """Billions of operations in the matrix products of an epoch, which no implementation can leave out."""
    plan = BatchPlan(data.train_windows(recipes.WINDOW).to(device), recipes.BATCH, seed=0, epoch=0)
    steps = [
        recipes.ensemble_step(model, plan[i], torch.bfloat16, by_length=True) for i in range(min(COUNTED, len(plan)))
    ]
    counted = [gflop(step) for step in steps]
    return len(plan) * statistics.mean(counted)


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """One row: seconds of training and of validation, nothing extrapolated."""
    data, d = beauty(quick), 8 if quick else 64
    model = recipes.ensemble(data, d, views=2, device=device)
    result = fit(
        model,
        data,
        epochs=EPOCHS,
        batch_size=recipes.BATCH,
        window=recipes.WINDOW,
        precision="bfloat16",
        progress=False,
    )
    first, *later = [float(entry["train_s"]) for entry in result.history]
    return [
        {
            "n": recipes.N,
            "d": d,
            "v": data.num_items,
            "views": 2,
            "precision": "bfloat16",
            "epoch_s": sig(statistics.median(later)),
            "best_s": sig(min(later)),
            "first_epoch_s": sig(first),
            "validation_s": sig(statistics.median(float(entry["valid_s"]) for entry in result.history)),
            "products_gflop": sig(products_gflop(model, data, device)),
        }
    ]
