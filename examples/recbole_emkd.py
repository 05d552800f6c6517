"""EMKD around a model of RecBole, its SASRec: right-padded input with lengths, one vector a sequence.

Needs ``pip install 'ensemble_kd[recbole]'``. The model alone is taken: RecBole 1.2.1 reads its own configuration files
with names that NumPy 2 no longer has, so the settings stand here. It has one target per window, and so ``fit`` gives it
a window for every item. It ran with RecBole 1.2.1, NumPy 1.26 and torch 2.13; its last lines of output::

    scorer           HR@5   HR@10  NDCG@5 NDCG@10     MRR
    member 0       0.2440  0.3260  0.1695  0.1961  0.1731
    member 1       0.2580  0.3480  0.1766  0.2052  0.1775
    member 2       0.2500  0.3180  0.1793  0.2011  0.1822
    ensemble       0.2640  0.3440  0.1882  0.2138  0.1909
    leave-one-out test, 500 users, all 200 items ranked, exclude='history'
"""

from __future__ import annotations

from types import SimpleNamespace

from recbole.model.sequential_recommender import SASRec
from torch import nn

from ensemble_kd import EnsembleKD, NextItem, fit
from ensemble_kd.data import synthetic
from ensemble_kd.encoders import right_padded
from ensemble_kd.evaluation import evaluate

WINDOW = 6
NAMES = {"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_"}


def encoder(num_items: int) -> nn.Module:
    """Return RecBole's SASRec from the parts of a configuration and a data set that it reads."""
    config = {
        **NAMES,
        "ITEM_LIST_LENGTH_FIELD": "item_length",
        "MAX_ITEM_LIST_LENGTH": WINDOW,
        "device": "cpu",
        "n_layers": 2,
        "n_heads": 2,
        "hidden_size": 64,
        "inner_size": 256,
        "hidden_dropout_prob": 0.2,
        "attn_dropout_prob": 0.2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "loss_type": "CE",  # of RecBole's own training; ours takes the sequence's vector alone
    }
    return right_padded(SASRec(config, SimpleNamespace(num=lambda field: num_items + 1)))  # padding counts


def main(users: int = 500, epochs: int = 3) -> None:
    """Train three networks, and print the metrics of each and of the ensemble."""
    data = synthetic(users, num_items=200)
    model = EnsembleKD(lambda: encoder(data.num_items), n=3, num_items=data.num_items, objective=NextItem())
    fit(model, data, epochs=epochs, window=WINDOW + 1)
    print(evaluate(model, data, "test"))


if __name__ == "__main__":
    main()
