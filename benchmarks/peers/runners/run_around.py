"""Three networks of a peer as members of one ensemble of this library, in the peer's environment."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import run_ensemble_kd
import shared
import torch
from torch import Tensor, nn

from ensemble_kd import EnsembleKD
from ensemble_kd.data import SequenceData, read_text
from ensemble_kd.encoders import right_padded
from ensemble_kd.ensemble import ItemLoss, Mutual


class RecTools(nn.Module):
    """User code of RecTools: its SASRec as an encoder; it pads on the left, as this library does."""

    causal = True

    def __init__(self, num_items: int, d: int, max_len: int, heads: int, blocks: int, dropout: float) -> None:
        from rectools.models.nn.transformers.net_blocks import LearnableInversePositionalEncoding
        from rectools.models.nn.transformers.sasrec import SASRecTransformerLayers
        from rectools.models.nn.transformers.torch_backbone import TransformerTorchBackbone

        super().__init__()
        self.max_len = max_len
        self.item_embedding = nn.Embedding(num_items + 2, d)
        self.backbone = TransformerTorchBackbone(
            n_heads=heads,
            dropout_rate=dropout,
            item_model=None,
            pos_encoding_layer=LearnableInversePositionalEncoding(True, max_len, d),
            transformer_layers=SASRecTransformerLayers(blocks, d, heads, dropout),
            similarity_module=None,
            use_key_padding_mask=True,
        )
        for parameter in self.parameters():  # as RecTools does when training starts
            if parameter.ndim > 1:
                nn.init.xavier_normal_(parameter)

    def forward(self, item_ids: Tensor) -> Tensor:
        states: Tensor = self.backbone.encode_sessions({"x": item_ids}, self.item_embedding.weight)
        return states


def recbole(num_items: int, d: int, max_len: int, heads: int, blocks: int, dropout: float) -> nn.Module:
    """User code of RecBole: its SASRec as an encoder; it pads on the right, and itself trains on the newest state."""
    from recbole.model.sequential_recommender import SASRec

    torch.autograd.set_detect_anomaly(False)  # the import switches it on
    config = {
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "LIST_SUFFIX": "_list",
        "NEG_PREFIX": "neg_",
        "ITEM_LIST_LENGTH_FIELD": "item_length",
        "MAX_ITEM_LIST_LENGTH": max_len,
        "device": "cpu",
        "n_layers": blocks,
        "n_heads": heads,
        "hidden_size": d,
        "inner_size": 256,
        "hidden_dropout_prob": dropout,
        "attn_dropout_prob": dropout,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "loss_type": "CE",
    }
    network = SASRec(config, SimpleNamespace(num=lambda field: num_items + 1))
    network.gather_indexes = every_state
    return right_padded(network, positions="all", causal=True)


def every_state(states: Tensor, newest: Tensor) -> Tensor:
    """User code of RecBole: in place of its choice of the newest state of each sequence."""
    return states


def build(encoder_fn: Any, n: int, seed: int, data: SequenceData, table: str) -> tuple[EnsembleKD, ItemLoss]:
    """User code: n of them, trained side by side; they score by the embeddings of the items, as the libraries do."""
    return EnsembleKD(encoder_fn, n=n, num_items=data.num_items, seed=seed, losses=0, classifier=table), Mutual()


def run(job: dict[str, Any]) -> None:
    settings = dict(job["settings"])
    n, newest, options = settings.pop("n"), settings.pop("newest", None), settings.pop("fit", {})
    data = read_text(job["data"])
    kind, table = {"RecTools": (RecTools, "item_embedding"), "RecBole": (recbole, "model.item_embedding")}[job["model"]]
    model, loss = build(partial(kind, data.num_items, **settings), n, job["seed"], data, table)
    run_ensemble_kd.watched(job, model, data, settings["max_len"], newest, loss=loss, **options)


if __name__ == "__main__":
    shared.main(run)
