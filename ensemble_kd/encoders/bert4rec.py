"""BERT4Rec: a bidirectional Transformer over items."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble_kd.encoders.parts import HIDDEN_KEY, SelfAttention, SequenceEncoder, dropout
from ensemble_kd.internal import flag, whole


class Block(nn.Module):
    """One bidirectional Transformer layer: attention and a GELU feed-forward net, each in a residual (Sec. 3.3)."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, p: float, norm_first: bool) -> None:
        super().__init__()
        self.attention = SelfAttention(d_model, num_heads, p)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.wide, self.narrow = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.p, self.norm_first = p, norm_first

    def forward(self, x: Tensor, mask: Tensor, *, newest: bool = False) -> Tensor:
        """(b, l, d) -> (b, l, d); ``newest``: (b, 1, d) of the last position, for which nothing else is computed."""
        p, own = self.p if self.training else 0.0, x[:, -1:] if newest else x
        if self.norm_first:
            x = own + dropout(self.attention(self.norm1(x), mask, newest=newest), p)
            return x + dropout(self.narrow(F.gelu(self.wide(self.norm2(x)))), p)
        x = self.norm1(own + dropout(self.attention(x, mask, newest=newest), p))
        return self.norm2(x + dropout(self.narrow(F.gelu(self.wide(x))), p))  # type: ignore[no-any-return]


class BERT4Rec(SequenceEncoder):
    """Bidirectional Transformer over items, Sun et al., CIKM 2019: h⁰ = v + p, hˡ = Trm(hˡ⁻¹) (Sec. 3.3 and 3.4).

    Where we differ: positions are counted from the newest item, so that left padding changes nothing; padding is no
    attention key; logits are made outside the encoder, so that ``output_head`` is Sec. 3.5 (Eq. 7) up to its product
    with the item embedding. As in the authors' code, the embedding is normalised in the post-norm form.

    Args:
        num_items: V; ids are 0 (padding), 1..V (items) and V + 1 (mask token).
        d_model: d, the width of embedding and output.
        num_layers: number of Transformer layers.
        num_heads: attention heads, a divisor of ``d_model``.
        max_len: the longest l.
        dropout: on the embedding, the attention weights and each sublayer's output (Sec. 3.3).
        d_ff: width of the feed-forward net; None: ``4 * d_model``, as in the paper.
        norm_first: normalise a sublayer's input (the code of EMKD) instead of its output (the paper).
        output_head: end with LayerNorm(GELU(h W + b)), as the paper's code does before the item classifier.
        init_std: of the normal that weights are drawn from, truncated at two standard deviations; 0.02 is the paper's.
            None: Glorot's rule for matrices. At small d, a standard deviation of 0.02 lets little of the context
            through an attention layer, and a [mask], which has nothing but the context, learns late.

    Shapes:
        item_ids (b, l) int64, padded with 0 on the left -> hidden states (b, l, d); with ``newest=True`` the last
        position's alone, (b, d), for less work.

    Raises:
        EnsembleKDError: an argument is out of its range, or the input is not (b, l) with l <= max_len.

    Examples:
        >>> encoder = BERT4Rec(num_items=9, d_model=8, max_len=5)
        >>> encoder(torch.tensor([[0, 0, 3, 10]])).shape
        torch.Size([1, 4, 8])
    """

    causal: ClassVar[bool] = False

    def __init__(
        self,
        num_items: int,
        *,
        d_model: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        max_len: int = 50,
        dropout: float = 0.2,
        d_ff: int | None = None,
        norm_first: bool = False,
        output_head: bool = False,
        init_std: float | None = None,
    ) -> None:
        d_model = whole("BERT4Rec", "d_model", d_model, least=1)
        d_ff = 4 * d_model if d_ff is None else d_ff
        super().__init__(num_items, d_model, max_len, dropout, num_layers=num_layers, num_heads=num_heads, d_ff=d_ff)
        d_model, max_len = self.d_model, self.max_len
        flag("BERT4Rec", "norm_first", norm_first)
        flag("BERT4Rec", "output_head", output_head)
        self.position_embedding = nn.Parameter(torch.empty(max_len, d_model))
        self.blocks = nn.ModuleList(
            Block(d_model, num_heads, d_ff, self.dropout, norm_first) for _ in range(num_layers)
        )
        # One LayerNorm is due outside the blocks in either form: after the embedding, or after the last residual.
        self.norm, self.norm_first = nn.LayerNorm(d_model), norm_first
        self.head = (
            nn.Sequential(nn.Linear(d_model, d_model), nn.GELU(), nn.LayerNorm(d_model)) if output_head else None
        )
        self.init_weights(init_std)

    def forward(self, item_ids: Tensor, *, newest: bool = False) -> Tensor:
        """item_ids (b, l) int64 -> hidden states (b, l, d), or (b, d) of the newest position."""
        self.check(item_ids)
        # The last row is the newest position's, whatever l is.
        x = self.item_embedding(item_ids) + self.position_embedding[-item_ids.shape[1] :]
        x = self.drop(x if self.norm_first else self.norm(x))
        mask = (item_ids == 0)[:, None, None, :].to(x.dtype) * HIDDEN_KEY
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, mask, newest=newest and number == len(self.blocks))
        x = x[:, -1] if newest else x
        x = self.norm(x) if self.norm_first else x
        return x if self.head is None else self.head(x)  # type: ignore[no-any-return]
