"""Models of other libraries under the encoder contract: item_ids (b, l), padded on the left -> hidden states."""

from __future__ import annotations

import inspect
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import (
    choice,
    flag,
    instance,
    is_whole,
    whole,
)

Positions = Literal["last", "all"]

# Hugging Face model types whose position t sees positions up to t alone. Others are taken for bidirectional unless the
# configuration has is_decoder. A causal model that is taken for bidirectional loses accuracy; the other way round, the
# target would leak.
CAUSAL_TYPES = frozenset(
    {"bloom", "codegen", "cohere", "falcon", "gemma", "gemma2", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj"}
    | {"granite", "llama", "mamba", "mamba2", "mistral", "mixtral", "mpt", "olmo", "olmo2", "openai-gpt", "opt"}
    | {"persimmon", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"}
)


class HuggingFaceEncoder(nn.Module):
    """A Hugging Face model as an encoder, from ``from_huggingface``; its parameters are named ``model.*``."""

    def __init__(self, model: nn.Module, num_items: int, max_len: int | None, causal: bool) -> None:
        super().__init__()
        self.model, self.num_items, self.max_len, self.causal = model, num_items, max_len, causal
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.constants = {"use_cache": False} if "use_cache" in accepted else {}

    def forward(self, item_ids: Tensor) -> Tensor:
        """item_ids (b, l) int64 -> hidden states (b, l, d)."""
        real = item_ids != 0
        # The newest position is padding only in a row without items: kept, so that attention has a key there too.
        newest = torch.arange(item_ids.shape[1], device=item_ids.device) == item_ids.shape[1] - 1
        arguments: dict[str, object] = {"attention_mask": (real | newest).long(), **self.constants}
        if self.takes_positions:
            arguments["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
        output = self.model(input_ids=item_ids, **arguments)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            fix = "Wrap the bare model (AutoModel), without a language-model head and with return_dict=True."
            raise EnsembleKDError("from_huggingface", "an output with last_hidden_state", type(output).__name__, fix)
        return hidden  # type: ignore[no-any-return]


def from_huggingface(
    model: nn.Module, *, num_items: int | None = None, max_len: int | None = None, causal: bool | None = None
) -> HuggingFaceEncoder:
    """Wrap a Hugging Face model as an encoder; nothing of ``transformers`` is imported.

    ``attention_mask`` hides the padding. ``position_ids``, if the model takes them, count a row's items from 0, so that
    left padding changes nothing. A model without ``position_ids`` that counts columns goes on counting them.

    Args:
        model: a bare model (``BertModel``, ``GPT2Model``, ``LlamaModel``, …) with V + 2 rows in its word embedding.
        num_items: V; None: ``model.config.vocab_size - 2``.
        max_len: the longest l; None: ``model.config.max_position_embeddings``, if there is one.
        causal: True if position t sees positions up to t alone; None: from ``model.config``.

    Shapes:
        item_ids (b, l) int64, padded with 0 on the left -> hidden states (b, l, d).

    Raises:
        EnsembleKDError: no vocabulary size is known, it is below 3, or the model's padding id is not 0.

    Examples:
        >>> from types import SimpleNamespace
        >>> class Tiny(torch.nn.Module):
        ...     config = SimpleNamespace(vocab_size=11, model_type="gpt2")
        ...     def forward(self, input_ids, attention_mask):
        ...         return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 4))
        >>> encoder = from_huggingface(Tiny())
        >>> encoder.num_items, encoder.causal, encoder(torch.tensor([[0, 2, 3]])).shape
        (9, True, torch.Size([1, 3, 4]))
    """
    where = "from_huggingface"
    instance(where, "model", model, nn.Module, "Pass the model itself.")
    config = getattr(model, "config", None)
    if num_items is None:
        rows = getattr(config, "vocab_size", None)
        if not (is_whole(rows) and rows >= 3):
            raise EnsembleKDError(where, "config.vocab_size of 3 or more", repr(rows), "Pass num_items.")
        num_items = rows - 2
    num_items = whole(where, "num_items", num_items, least=1)
    find = getattr(model, "get_input_embeddings", None)
    padding = getattr(find(), "padding_idx", None) if callable(find) else None
    if padding not in (None, 0):  # that row would silently get no gradient, and here it is an item
        raise EnsembleKDError(where, "padding id 0", padding, "Build the model with pad_token_id=0 in its config.")
    if max_len is None:
        max_len = getattr(config, "max_position_embeddings", None)
    max_len = None if max_len is None else whole(where, "max_len", max_len, least=1)
    if causal is not None:
        flag(where, "causal", causal)
    if causal is None:
        causal = bool(getattr(config, "is_decoder", False)) or getattr(config, "model_type", None) in CAUSAL_TYPES
    return HuggingFaceEncoder(model, num_items, max_len, causal)


class RightPadded(nn.Module):
    """A model for right padding as an encoder, from ``right_padded``; its parameters are named ``model.*``."""

    def __init__(
        self,
        model: nn.Module,
        positions: Positions,
        lengths: bool,
        num_items: int | None,
        max_len: int | None,
        causal: bool,
    ) -> None:
        super().__init__()
        self.model, self.positions, self.lengths = model, positions, lengths
        self.max_len, self.causal = max_len, causal
        if num_items is not None:
            self.num_items = num_items

    def forward(self, item_ids: Tensor) -> Tensor:
        """item_ids (b, l) int64 -> hidden states (b, l, d), or (b, d) of the newest position."""
        length = item_ids.shape[1]
        padding = (item_ids == 0).sum(1, keepdim=True)
        place = torch.arange(length, device=item_ids.device)
        rolled = item_ids.gather(1, (place + padding) % length)
        # A row without items is given one step: such models read position length - 1.
        hidden = self.model(rolled, (length - padding[:, 0]).clamp(min=1)) if self.lengths else self.model(rolled)
        axes = 3 if self.positions == "all" else 2
        if not isinstance(hidden, Tensor) or hidden.dim() != axes:
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            fix = 'Choose positions="last" for (b, d) and positions="all" for (b, l, d).'
            raise EnsembleKDError("right_padded", f"an output of {axes} axes", got, fix)
        if self.positions == "last":
            return hidden
        back = (place - padding) % length
        return hidden.gather(1, back[:, :, None].expand_as(hidden))


def right_padded(
    model: nn.Module,
    *,
    positions: Positions = "last",
    lengths: bool = True,
    num_items: int | None = None,
    max_len: int | None = None,
    causal: bool | None = None,
) -> RightPadded:
    """Wrap a model that reads sequences padded on the right, as RecBole's do, as an encoder.

    Rows are rolled to begin with their items by one gather, which works under ``torch.vmap`` too.

    Args:
        model: called as ``model(item_seq, item_seq_len)`` with (b, l) and (b,).
        positions: "last" if the model returns (b, d), one vector per sequence; "all" if it returns (b, l, d).
        lengths: pass ``item_seq_len``; False for models called as ``model(item_seq)``, like RecBole's BERT4Rec.
        num_items: V; None: ``model.n_items - 1``, if there is one, since RecBole counts padding as an item.
        max_len: the longest l; None: ``model.max_seq_length``, if there is one, as in RecBole's models.
        causal: None: ``model.causal``, if there is one, else True for "last", which sees no item after the newest.

    Shapes:
        item_ids (b, l) int64, padded with 0 on the left -> (b, d) or (b, l, d), as the model returns.

    Raises:
        EnsembleKDError: an unknown ``positions``, or an output with another number of axes.

    Examples:
        >>> class Last(torch.nn.Module):
        ...     n_items = 10
        ...     def forward(self, item_seq, item_seq_len):
        ...         return item_seq.gather(1, item_seq_len[:, None] - 1).float()
        >>> encoder = right_padded(Last())
        >>> encoder.num_items, encoder(torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]]))
        (9, tensor([[4.],
                [8.]]))
    """
    where = "right_padded"
    instance(where, "model", model, nn.Module, "Pass the model itself.")
    positions = choice(where, "positions", positions, get_args(Positions))
    flag(where, "lengths", lengths)
    if num_items is None and is_whole(rows := getattr(model, "n_items", None)):
        num_items = rows - 1
    if max_len is None:
        max_len = getattr(model, "max_seq_length", None)
    num_items = None if num_items is None else whole(where, "num_items", num_items, least=1)
    max_len = None if max_len is None else whole(where, "max_len", max_len, least=1)
    if causal is not None:
        flag(where, "causal", causal)
    if causal is None:
        causal = bool(getattr(model, "causal", positions == "last"))
    return RightPadded(model, positions, lengths, num_items, max_len, causal)
