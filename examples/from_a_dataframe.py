"""From a DataFrame with text ids to a Parquet file of recommendations with the same ids, and on to tomorrow's data.

Without arguments it makes up a log of purchases. On your own, with columns user_id, item_id and timestamp::

    python examples/from_a_dataframe.py --table interactions.parquet --library polars

Its last lines are the recommendations of the first user, today and after tomorrow's items came::

    2 items more. For user-0, then and now:
    sku-642, sku-356, sku-173, sku-110, sku-134
    sku-326, sku-625, sku-356, sku-472, sku-529
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from ensemble_kd import EnsembleKD, fit
from ensemble_kd.data import SequenceData, synthetic
from ensemble_kd.encoders import SASRec
from ensemble_kd.growing import grow
from ensemble_kd.presets import WARM_FIT
from ensemble_kd.recommending import recommend_all, recommend_for


def purchases(library: Any, users: int, items: int) -> Any:
    """A made-up log: a row per purchase, with texts as ids."""
    made = synthetic(num_users=users, num_items=items)
    row_of = [u for u in range(made.num_users) for _ in range(int(made.offsets[u + 1] - made.offsets[u]))]
    return library.DataFrame(
        {
            "user_id": [f"user-{u}" for u in row_of],
            "item_id": [f"sku-{item}" for item in made.items.tolist()],
            "timestamp": list(range(len(row_of))),
        }
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="a Parquet file of interactions; default: made up")
    parser.add_argument("--library", choices=["pandas", "polars"], default="pandas")
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/from_a_dataframe"))
    args = parser.parse_args()
    library = import_module(args.library)
    table = library.read_parquet(args.table) if args.table else purchases(library, args.users, args.items)

    data = SequenceData.from_interactions(table)
    model = EnsembleKD(lambda: SASRec(data.num_items, d_model=32), n=3)
    fit(model, data, epochs=args.epochs)
    path = recommend_all(model, data, args.output / "recommendations.parquet", k=10)
    print(f"{data}\n{path}:\n{library.read_parquet(path).head(10)}")

    # Tomorrow: one user buys two items that no one has bought before.
    first = table["user_id"][0]
    after = table["timestamp"].max()
    new = library.DataFrame({"user_id": [first] * 2, "item_id": ["sku-new", "sku-newer"], "timestamp": [after, after]})
    later = SequenceData.from_interactions(library.concat([table, new]), vocabulary=model.vocabulary)
    grown = grow(model, later)
    fit(grown, later.newest(50), **WARM_FIT)
    print(f"{grown.num_items - model.num_items} items more. For {first}, then and now:")
    for known, source in ((model, data), (grown, later)):
        print(", ".join(map(str, recommend_for(known, [first], source, k=5).item_id)))
