"""Seconds of whole epochs of the paper's recipe on Beauty at d=64 with two views, by ``fit``, validation apart."""

from __future__ import annotations

import statistics

from benchmarks import recipes
from benchmarks.common import Row, beauty, sig
from ensemble_kd import fit

EPOCHS = 3  # the first is kept apart: it compiles


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
        }
    ]
