"""EMKD as in the paper: three BERT4Rec networks with ICL, CCL, KD and AP on masked items.

Trains on a synthetic catalogue, in three minutes on two cores. It also prints
what it recommends to a user, and draws the learning curves. Its last lines of output::

    scorer           HR@5   HR@10  NDCG@5 NDCG@10     MRR
    popularity     0.0765  0.1230  0.0486  0.0636  0.0590
    member 0       0.1415  0.2055  0.0993  0.1198  0.1067
    member 1       0.1370  0.2005  0.0974  0.1179  0.1056
    member 2       0.1435  0.2060  0.1029  0.1233  0.1111
    ensemble       0.1580  0.2205  0.1118  0.1322  0.1183
    leave-one-out test, 2000 users, all 600 items ranked, exclude='history'; weights of epoch 14 of 14

On a file of yours: ``python examples/train.py --encoder bert4rec --data FILE``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ensemble_kd import AP, CCL, ICL, KD, EnsembleKD, MaskedItem, fit
from ensemble_kd.data import synthetic
from ensemble_kd.encoders import BERT4Rec
from ensemble_kd.evaluation import evaluate, evaluate_popularity, table
from ensemble_kd.plots import curves


def main(users: int = 2000, epochs: int = 14, output: str = "runs/bert4rec") -> None:
    """Train, evaluate on the test items, recommend, and draw the learning curves."""
    data = synthetic(users, num_items=600)
    print(data)
    model = EnsembleKD(
        lambda: BERT4Rec(data.num_items, d_model=64, max_len=16, dropout=0.1, norm_first=True),
        n=3,
        objective=MaskedItem(mask_ratio=0.3, views=2, newest=0.5),
        losses=0.2 * AP() + 0.01 * (ICL(temperature=0.3) + CCL(temperature=0.3)) + 0.001 * KD(temperature=0.3),
        item_attributes=data.item_attributes,
    )
    result = fit(
        model, data, epochs=epochs, batch_size=128, window=15, window_step=1, output_dir=output, overwrite=True
    )

    history = data.inputs("test", data.max_history)[:1]  # all that user 0 saw, so that none of it is recommended
    seen = history[:, history[0] != 0]
    items, _ = model.recommend(seen, k=10)
    print(f"User 0 saw items {seen[0].tolist()}, then {data.target('test')[0].item()}.")
    print(f"Recommended: {items[0].tolist()}")
    if importlib.util.find_spec("matplotlib"):
        curves(result).save(Path(output) / "curves.png")
        print(f"Learning curves: {Path(output) / 'curves.png'}")

    test = evaluate(model, data, "test")
    print(table({**evaluate_popularity(data, "test").rows, **test.rows}))
    print(f"{test.protocol}; weights of epoch {result.best_epoch + 1} of {epochs}")


if __name__ == "__main__":
    main()
