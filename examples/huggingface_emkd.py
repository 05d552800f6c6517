"""EMKD around a model of Hugging Face: GPT-2 with next items, or BERT with masked items.

Needs ``pip install 'ensemble_kd[huggingface]'``. Without arguments it trains on a synthetic catalogue in a few minutes;
``--model bert`` takes the other one, which needs more epochs. On real data::

    python examples/huggingface_emkd.py --data Beauty.txt --attributes Beauty_item2attributes.json --window 50
"""

from __future__ import annotations

from argparse import Namespace

from common import flags, run
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from ensemble_kd import MaskedItem, NextItem
from ensemble_kd.encoders import from_huggingface


def encoder(args: Namespace, num_items: int) -> nn.Module:
    """A model of random weights; a pretrained one knows words, not items."""
    rows, d, p = num_items + 2, args.d_model, args.dropout  # a row for padding, one for [mask]
    if args.model == "bert":
        sizes = {"num_hidden_layers": args.num_layers, "num_attention_heads": args.num_heads, "hidden_size": d}
        sizes |= {"intermediate_size": 4 * d, "max_position_embeddings": args.window + 1}  # room for the last [mask]
        dropouts = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
        return from_huggingface(BertModel(BertConfig(vocab_size=rows, **sizes, **dropouts), add_pooling_layer=False))
    sizes = {"n_layer": args.num_layers, "n_head": args.num_heads, "n_embd": d, "n_positions": args.window}
    dropouts = {"embd_pdrop": p, "attn_pdrop": p, "resid_pdrop": p}
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return from_huggingface(GPT2Model(GPT2Config(vocab_size=rows, **sizes, **dropouts, **tokens)))


if __name__ == "__main__":
    parser = flags(__doc__, output="runs/huggingface", window=15, views=1, batch_size=64, epochs=5)
    parser.add_argument("--model", choices=("gpt2", "bert"), default="gpt2")
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--num-heads", type=int, default=2)
    args = parser.parse_args()
    objective = (
        MaskedItem(mask_ratio=0.3, views=args.views, newest=0.5) if args.model == "bert" else NextItem(views=args.views)
    )
    run(args, lambda data: lambda: encoder(args, data.num_items), objective)
