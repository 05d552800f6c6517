"""EMKD around a model of RecBole, its SASRec: right-padded input with lengths.

Needs ``pip install 'ensemble_kd[recbole]'``. The model alone is taken: RecBole 1.2.1 reads its own configuration files
with names that NumPy 2 no longer has, so the settings stand here. RecBole takes the newest state of each sequence, and
so reads a history again for each of its items. Its SASRec looks back alone, so that every state can predict what
follows it; ``every_state`` returns them all, and an epoch takes a fraction of the time. It ran with RecBole 1.2.1,
NumPy 1.26 and torch 2.13; its last lines of output::

    scorer           HR@5   HR@10  NDCG@5 NDCG@10     MRR
    member 0       0.3080  0.4180  0.2070  0.2421  0.2030
    member 1       0.3180  0.4420  0.2111  0.2506  0.2052
    member 2       0.3220  0.4140  0.2097  0.2399  0.2005
    ensemble       0.3280  0.4400  0.2188  0.2552  0.2126
    leave-one-out test, 500 users, all 200 items ranked, exclude='history'
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from recbole.model.sequential_recommender import SASRec
from torch import Tensor, nn

from ensemble_kd import EnsembleKD, NextItem, fit
from ensemble_kd.data import synthetic
from ensemble_kd.encoders import right_padded
from ensemble_kd.evaluation import evaluate

torch.autograd.set_detect_anomaly(False)  # importing RecBole's models switches it on, which costs most of the time
WINDOW = 20
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
    network = SASRec(config, SimpleNamespace(num=lambda field: num_items + 1))  # padding counts
    network.gather_indexes = every_state
    return right_padded(network, positions="all", causal=True)


def every_state(states: Tensor, newest: Tensor) -> Tensor:
    """Return all states, in place of the newest of each sequence, as RecBole's models choose by this method."""
    return states


def main(users: int = 500, epochs: int = 10) -> None:
    """Train three networks, and print the metrics of each and of the ensemble."""
    data = synthetic(users, num_items=200)
    model = EnsembleKD(lambda: encoder(data.num_items), n=3, num_items=data.num_items, objective=NextItem())
    fit(model, data, epochs=epochs, window=WINDOW + 1)
    print(evaluate(model, data, "test"))


if __name__ == "__main__":
    main()
