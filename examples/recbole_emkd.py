"""EMKD around a model of RecBole, its SASRec: right-padded input with lengths, one vector a sequence.

Needs ``pip install 'ensemble_kd[recbole]'``. The model alone is taken: RecBole 1.2.1 reads its own configuration files
with names that NumPy 2 has no longer, so the settings stand here, and the data are ours. Short windows, since each has
one target. Without arguments it trains on a synthetic catalogue in a few minutes. On real data::

    python examples/recbole_emkd.py --data Beauty.txt --attributes Beauty_item2attributes.json
"""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

from common import flags, run
from recbole.model.sequential_recommender import SASRec
from torch import nn

from ensemble_kd import NextItem
from ensemble_kd.encoders import right_padded

NAMES = {"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_"}


def encoder(args: Namespace, num_items: int) -> nn.Module:
    """The parts of RecBole's configuration and data set that its SASRec reads."""
    config = {
        **NAMES,
        "ITEM_LIST_LENGTH_FIELD": "item_length",
        "MAX_ITEM_LIST_LENGTH": args.window,
        "device": args.device,
        "n_layers": args.num_layers,
        "n_heads": args.num_heads,
        "hidden_size": args.d_model,
        "inner_size": 4 * args.d_model,
        "hidden_dropout_prob": args.dropout,
        "attn_dropout_prob": args.dropout,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "loss_type": "CE",  # of RecBole's own training; ours takes the sequence's vector alone
    }
    return right_padded(SASRec(config, SimpleNamespace(num=lambda field: num_items + 1)))  # padding counts


if __name__ == "__main__":
    parser = flags(__doc__, output="runs/recbole", views=1, window=6, window_step=2, batch_size=128, epochs=6, lr=2e-3)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--num-heads", type=int, default=2)
    args = parser.parse_args()
    run(args, lambda data: lambda: encoder(args, data.num_items), NextItem(views=args.views))
