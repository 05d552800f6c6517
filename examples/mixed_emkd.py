"""SASRec, GRU4Rec and Caser in one ensemble, and one network that learns from it.

Networks of several architectures make unlike mistakes, and so their mean gains more. All three are trained side by
side, each on its own: ``losses=0``. Then one SASRec learns what they know, so that serving costs one network.

Trains on a synthetic catalogue in less than three minutes on two cores, on a fourth of the users, and tests on all:
with few users, chance decides which network looks better. Its last lines of output::

    scorer      HR@10 NDCG@10
    SASRec     0.2406  0.1215
    GRU4Rec    0.1784  0.0971
    Caser      0.1247  0.0683
    ensemble   0.2478  0.1363
    student    0.2528  0.1352
    NDCG@10 of the ensemble over its best member: +12.2%
    Of that gain the student, one SASRec, keeps: 92%

By ``seed`` 0, 1 and 2 the ensemble gains 12, 12 and 16 %, of which the student keeps 92, 114 and 94 %. On data of
yours, where members may be of less like strength, ``evaluation.calibrate`` fits a weight to each.
"""

from __future__ import annotations

from torch import nn

from ensemble_kd import EnsembleKD, NextItem, fit
from ensemble_kd.data import SequenceData, synthetic
from ensemble_kd.distillation import distill
from ensemble_kd.encoders import Caser, GRU4Rec, SASRec
from ensemble_kd.evaluation import evaluate
from ensemble_kd.training import Cosine

ITEMS, WINDOW = 400, 20


def sasrec() -> nn.Module:
    """SASRec, which looks at all items of a user."""
    return SASRec(ITEMS, d_model=32, num_layers=1, max_len=WINDOW, dropout=0.5)


def gru4rec() -> nn.Module:
    """GRU4Rec, which reads them one after the other."""
    return GRU4Rec(ITEMS, d_model=64, max_len=WINDOW, dropout=0.4)


def caser() -> nn.Module:
    """Caser, which sees the last few as a picture."""
    return Caser(ITEMS, d_model=64, max_len=WINDOW, dropout=0.5)


def large() -> nn.Module:
    """The student, which may be larger than a member: with a teacher, it overfits less."""
    return SASRec(ITEMS, d_model=128, num_layers=2, max_len=WINDOW, dropout=0.1)


def main(users: int = 3200, epochs: int = 24, seed: int = 0) -> None:
    """Train the ensemble and its student; print the accuracy of all, and what each step gains."""
    data = synthetic(users, num_items=ITEMS)
    fourth = data.offsets[: users // 4 + 1]
    train = SequenceData(data.items[: fourth[-1]], fourth, ITEMS)
    windows = {"batch_size": 64, "window": WINDOW + 1, "window_step": 1}
    options = {**windows, "epochs": epochs, "schedule": Cosine(warmup=0.5), "precision": "float32", "seed": seed}
    ensemble = EnsembleKD([sasrec, gru4rec, caser], objective=NextItem(), losses=0, seed=seed)
    fit(ensemble, train, lr=5e-3, **options)
    student = distill(ensemble, large, train, lr=2e-3, **options).student
    rows = evaluate(ensemble, data, "test").rows
    shown = {name: rows[f"member {i}"] for i, name in enumerate(("SASRec", "GRU4Rec", "Caser"))}
    best = max(row["NDCG@10"] for row in shown.values())
    shown |= {"ensemble": rows["ensemble"], "student": evaluate(student, data, "test").rows["ensemble"]}
    print(f"{'scorer':<9}{'HR@10':>8}{'NDCG@10':>8}")
    for name, row in shown.items():
        print(f"{name:<9}{row['HR@10']:>8.4f}{row['NDCG@10']:>8.4f}")
    whole, one = shown["ensemble"]["NDCG@10"], shown["student"]["NDCG@10"]
    print(f"NDCG@10 of the ensemble over its best member: {whole / best - 1:+.1%}")
    kept = f"{(one - best) / (whole - best):.0%}" if whole > best else "nothing to keep"
    print(f"Of that gain the student, one SASRec, keeps: {kept}")


if __name__ == "__main__":
    main()
