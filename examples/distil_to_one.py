"""Distil an ensemble of SASRec into one network, and compare the two with a network trained alone.

Without arguments it trains on a synthetic catalogue in a few minutes. On real data::

    python examples/distil_to_one.py --data Beauty.txt --attributes Beauty_item2attributes.json --window 50 ...
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from common import ensemble, fit_options, flags, sequences
from torch import nn

from ensemble_kd import (
    AP,
    KD,
    EnsembleKD,
    NextItem,
    fit,
)
from ensemble_kd.data import SequenceData
from ensemble_kd.distillation import distill
from ensemble_kd.encoders import SASRec
from ensemble_kd.evaluation import evaluate
from ensemble_kd.training import Ramp

METRIC = "NDCG@10"


def request_ms(model: EnsembleKD, data: SequenceData, requests: int = 200) -> float:
    """Median milliseconds of one user's ten recommendations."""
    users, times = data.inputs("test", model.max_len or 50)[:requests].to(model.device), []
    for ids in users.split(1):
        started = time.perf_counter()
        model.recommend(ids[:, ids[0] != 0], k=10)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2] * 1e3


if __name__ == "__main__":
    parser = flags(__doc__, output="runs/distil", views=1, batch_size=64, epochs=6, lr=2e-3, dropout=0.3)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--student-kd", type=float, default=10.0, help="weight of KD from the ensemble")
    parser.add_argument("--student-kd-temperature", type=float, default=1.0, help="of KD from the ensemble")
    parser.add_argument("--student-epochs", type=int, help="default: twice the ensemble's")
    parser.add_argument("--student-dropout", type=float, default=0.0, help="spliced sequences keep it from overfitting")
    parser.add_argument("--no-spliced", action="store_true", help="let the student learn on real sequences alone")
    args = parser.parse_args()
    data, objective = sequences(args), NextItem(views=args.views)

    def encoder(dropout: float) -> nn.Module:
        return SASRec(
            data.num_items, d_model=args.d_model, num_layers=args.num_layers, max_len=args.window, dropout=dropout
        )

    def factory(_: SequenceData) -> Callable[[], nn.Module]:
        return lambda: encoder(args.dropout)

    options, resume = fit_options(args, objective), args.resume
    teacher = ensemble(args, data, factory, objective)
    fit(teacher, data, **options, output_dir=args.output / "ensemble", resume=resume, overwrite=not resume)

    members, args.n = args.n, 1
    alone = ensemble(args, data, factory, objective)
    fit(alone, data, **options, output_dir=args.output / "alone", resume=resume, overwrite=not resume)

    kd = args.student_kd * KD(temperature=args.student_kd_temperature)
    student = distill(
        teacher,
        lambda: encoder(args.student_dropout),
        data,
        losses=kd if data.item_attributes is None or not args.ap else kd + args.ap * AP(),
        spliced=not args.no_spliced,
        **{**options, "epochs": args.student_epochs or 2 * args.epochs, "transfer": Ramp(0, 0)},
        output_dir=args.output / "student",
        resume=resume,
        overwrite=not resume,
    ).student

    rows = {}
    print(f"\n{'':<22}{METRIC:>8}{'HR@10':>8}{'parameters':>12}{'ms a request':>14}")
    for name, model in ((f"ensemble of {members}", teacher), ("student", student), ("network alone", alone)):
        test = evaluate(model, data, "test", exclude=args.exclude)
        row = {**test.rows["ensemble"], "parameters": sum(p.numel() for p in model.parameters())}
        row["ms"] = request_ms(model, data)
        rows[name] = row
        print(f"{name:<22}{row[METRIC]:>8.4f}{row['HR@10']:>8.4f}{row['parameters']:>12,}{row['ms']:>14.2f}")
    best, one, two = (row[METRIC] for row in (rows[f"ensemble of {members}"], rows["network alone"], rows["student"]))
    kept = f"{(two - one) / (best - one):.0%}" if best > one else "nothing to keep"
    print(f"{test.protocol}\nOf the ensemble's gain over a network alone the student keeps: {kept}")
    (args.output / "test.json").write_text(json.dumps({"protocol": test.protocol, "rows": rows}, indent=1) + "\n")
