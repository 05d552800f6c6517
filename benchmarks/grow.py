"""A model that keeps up: grown by the items that came since and trained on the newest, against training from scratch.

ML-1M's text file has no times. So a user's last 10 % of interactions stand for what came later. The last 10 % of items
to appear in the file, user after user, stand for new items, and are left out of the old data altogether. The file is
ML-1M.txt in ``--data-dir``; without it the data is made up. Seconds are of the processor, which others do not slow.
``presets.WARM_FIT`` was set by looking at users 0, 5, 10, ... Others take part here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import DATA_DIR, Row, sig
from ensemble_kd import EnsembleKD, fit
from ensemble_kd.data import SequenceData, read_text, synthetic
from ensemble_kd.encoders import SASRec
from ensemble_kd.evaluation import evaluate
from ensemble_kd.growing import grow
from ensemble_kd.presets import WARM_FIT

LATER = 0.1  # share of each user's interactions, and of the items, that the old data lacks
EVERY, FIRST = 5, 2  # users 2, 7, 12, ... take part, so that the runs end soon
SEEDS = 3  # of the initial weights and of the order of batches
WINDOW, EPOCHS, MEMBERS = 50, 10, 2


def run(quick: bool) -> list[Row]:
    """Rows: seconds of training, epochs, NDCG@10 of the last items, and both as shares of training from scratch."""
    name, full = _data(quick)
    old = _without_the_future(full)
    about: Row = {"data": name, "users": full.num_users, "items": full.num_items, "old_items": old.num_items}
    every = [_of_seed(seed, quick, full, old) for seed in range(1 if quick else SEEDS)]
    rows = [{**about, "seed": seed, **row} for seed, found in enumerate(every) for row in found]
    return [*rows, *({**about, **_mean(same)} for same in zip(*every, strict=True))]


def _of_seed(seed: int, quick: bool, full: SequenceData, old: SequenceData) -> list[Row]:
    d, epochs = (8, 2) if quick else (48, EPOCHS)

    def model(num_items: int) -> EnsembleKD:
        make = lambda: SASRec(num_items, d_model=d, max_len=WINDOW, dropout=0.2)  # noqa: E731
        return EnsembleKD(make, MEMBERS, losses=0, classifier="tied", seed=seed)

    scratch = model(full.num_items)
    seconds, best = _train(scratch, full, epochs=epochs, seed=seed)
    whole = _ndcg(scratch, full)
    rows: list[Row] = [{"variant": "from scratch on all", "cpu_s": seconds, "best_epoch": best, "ndcg_10": whole}]
    before = model(old.num_items)
    seconds_before, best = _train(before, old, epochs=epochs, seed=seed)
    rows.append({"variant": "the old model, on old data", "cpu_s": seconds_before, "best_epoch": best})
    grown = grow(before, full.num_items - old.num_items)
    rows.append({"variant": "grown, not trained", "cpu_s": 0.0, "ndcg_10": _ndcg(grown, full)})
    newest = full.newest(WINDOW + 3)  # a target after the window, two held out
    seconds_warm, best = _train(grown, newest, **WARM_FIT, seed=seed)
    ndcg = _ndcg(grown, full)
    rows.append({"variant": "grown, then WARM_FIT", "cpu_s": seconds_warm, "best_epoch": best, "ndcg_10": ndcg})
    for row in rows:
        row["share_of_cpu_s"] = sig(float(str(row["cpu_s"])) / seconds, 3)
        row["share_of_ndcg"] = sig(float(str(row["ndcg_10"])) / max(whole, 1e-9), 3) if "ndcg_10" in row else None
    print(f"seed {seed}: {rows[-1]}", flush=True)
    return rows


def _mean(rows: Sequence[Row]) -> Row:
    """Return the mean of the numbers over seeds."""
    numbers = {key: [float(str(row[key])) for row in rows] for key, value in rows[0].items() if _is_number(value)}
    means = {key: sig(sum(values) / len(values), 3) for key, values in numbers.items()}
    return {"seed": "mean", "variant": rows[0]["variant"], **means}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _data(quick: bool) -> tuple[str, SequenceData]:
    """Sequences whose items are numbered by their first appearance."""
    folder = os.environ.get(DATA_DIR)
    path = Path(folder or "", "ML-1M.txt")
    real = bool(folder) and path.is_file() and not quick
    data = read_text(path) if real else synthetic(60, 120) if quick else synthetic(2000, 3000)
    kept = range(FIRST, data.num_users, EVERY) if real else range(data.num_users)
    sequences = [data.items[data.offsets[u] : data.offsets[u + 1]] for u in kept]
    numbers: dict[int, int] = {}
    renumbered = [[numbers.setdefault(item, len(numbers) + 1) for item in row.tolist()] for row in sequences]
    return f"ML-1M, 1 of {EVERY} users" if real else "synthetic", SequenceData.from_sequences(renumbered)


def _without_the_future(full: SequenceData) -> SequenceData:
    """Return each user's first interactions with the items that appeared first."""
    num_items = int(full.num_items * (1 - LATER))

    def known(row: Tensor) -> Tensor:
        early = row[: int(len(row) * (1 - LATER))]
        return early[early <= num_items]

    rows = [known(full.items[full.offsets[u] : full.offsets[u + 1]]) for u in range(full.num_users)]
    return SequenceData.from_sequences([row for row in rows if len(row) >= 3], num_items=num_items)


def _train(model: EnsembleKD, data: SequenceData, **options: object) -> tuple[float, int]:
    """Return the processor's seconds of a run, its validation included, and the number of its best epoch, from 1."""
    started = time.process_time()
    settings = {"batch_size": 32, "window": WINDOW + 1, "window_step": WINDOW, "progress": False, **options}
    result = fit(model, data, **settings)  # type: ignore[arg-type]
    return sig(time.process_time() - started), result.best_epoch + 1


@torch.no_grad()
def _ndcg(model: EnsembleKD, data: SequenceData) -> float:
    return sig(evaluate(model, data, "test").rows["ensemble"]["NDCG@10"])
