"""EMKD around Caser (Sec. 4.5 of the paper): next-item prediction at every position, views by dropout.

Without arguments it trains on a synthetic catalogue in a few minutes. On real data::

    python examples/caser_emkd.py --data Beauty.txt --attributes Beauty_item2attributes.json --window 50
"""

from __future__ import annotations

from common import flags, run

from ensemble_kd import NextItem
from ensemble_kd.encoders import Caser

if __name__ == "__main__":
    parser = flags(__doc__, output="runs/caser", views=1, batch_size=64, epochs=8, lr=3e-3, dropout=0.4)
    parser.add_argument("--filter-window", type=int, default=5, help="newest items that the convolutions look at")
    args = parser.parse_args()
    run(
        args,
        lambda data: (
            lambda: Caser(
                data.num_items,
                d_model=args.d_model,
                window=args.filter_window,
                max_len=args.window,
                dropout=args.dropout,
            )
        ),
        NextItem(views=args.views),
    )
