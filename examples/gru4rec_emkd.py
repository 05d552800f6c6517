"""EMKD around GRU4Rec (Sec. 4.5 of the paper): next-item prediction at every position, views by dropout.

Without arguments it trains on a synthetic catalogue in a few minutes. On real data::

    python examples/gru4rec_emkd.py --data Beauty.txt --attributes Beauty_item2attributes.json --window 50
"""

from __future__ import annotations

from common import flags, run

from ensemble_kd import NextItem
from ensemble_kd.encoders import GRU4Rec

if __name__ == "__main__":
    parser = flags(__doc__, output="runs/gru4rec", views=1, batch_size=64, epochs=8, lr=3e-3, dropout=0.4)
    parser.add_argument("--num-layers", type=int, default=1)
    args = parser.parse_args()
    run(
        args,
        lambda data: (
            lambda: GRU4Rec(
                data.num_items,
                d_model=args.d_model,
                num_layers=args.num_layers,
                max_len=args.window,
                dropout=args.dropout,
            )
        ),
        NextItem(views=args.views),
    )
