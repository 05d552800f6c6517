"""EMKD as in the paper: an ensemble of BERT4Rec networks with ICL, CCL, KD and AP on masked items.

Without arguments it trains on a synthetic catalogue in a few minutes. On real data::

    python examples/bert4rec_emkd.py --data Beauty.txt --attributes Beauty_item2attributes.json --window 15
"""

from __future__ import annotations

from common import flags, run

from ensemble_kd import MaskedItem
from ensemble_kd.encoders import BERT4Rec

if __name__ == "__main__":
    parser = flags(__doc__, output="runs/bert4rec", window=15, epochs=14, batch_size=128, lr=2e-3, dropout=0.1, ap=0.2)
    parser.add_argument("--mask-ratio", type=float, default=0.3, help="share of a sequence that is masked")
    parser.add_argument("--newest", type=float, default=0.5, help="probability that the newest item is masked")
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--num-heads", type=int, default=2)
    args = parser.parse_args()
    run(
        args,
        lambda data: (
            lambda: BERT4Rec(
                data.num_items,
                d_model=args.d_model,
                num_layers=args.num_layers,
                num_heads=args.num_heads,
                max_len=args.window + 1,  # room for the [mask] that asks for the next item
                dropout=args.dropout,
                norm_first=True,  # as the authors' code of EMKD
            )
        ),
        MaskedItem(mask_ratio=args.mask_ratio, views=args.views, newest=args.newest),
    )
