"""SASRec: a causal Transformer over items."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble_kd.encoders.parts import HIDDEN_KEY, SelfAttention, SequenceEncoder, dropout
from ensemble_kd.internal import choice, flag


class CausalBlock(nn.Module):
    """Attention, then a point-wise net (Sec. III-B, Eqs. 3 and 4), each in a residual (Sec. III-C)."""

    def __init__(
        self, d_model: int, num_heads: int, d_ff: int, p: float, norm_first: bool, activation: str, distances: int
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(d_model, num_heads, p)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.inner, self.outer = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.p, self.norm_first, self.activation = p, norm_first, activation
        self.distance_bias = nn.Parameter(torch.zeros(num_heads, distances)) if distances else None

    def forward(self, x: Tensor, mask: Tensor, *, newest: bool = False) -> Tensor:
        """(b, l, d) -> (b, l, d); ``newest``: (b, 1, d) of the last position, for which nothing else is computed."""
        p = self.p if self.training else 0.0
        mask = mask[..., -1:, :] if newest else mask
        if self.distance_bias is not None:
            length, bias = x.shape[1], self.distance_bias
            added = bias[:, None, :length].flip(2) if newest else by_distance(bias, length)
            mask = mask + added.to(mask.dtype)
        own = x[:, -1:] if newest else x
        if self.norm_first:
            x = own + dropout(self.attention(self.norm1(x), mask, newest=newest), p)
            return x + dropout(self._pointwise(self.norm2(x), p), p)
        x = self.norm1(own + dropout(self.attention(x, mask, newest=newest), p))
        return self.norm2(x + dropout(self._pointwise(x, 0.0), p))  # type: ignore[no-any-return]

    def _pointwise(self, x: Tensor, p: float) -> Tensor:
        inner = self.inner(x)
        active = F.relu(inner) if self.activation == "relu" else F.gelu(inner)
        return self.outer(dropout(active, p))  # type: ignore[no-any-return]


def by_distance(bias: Tensor, length: int) -> Tensor:
    """Return attention biases (h, queries, keys) of so many positions from biases (h, distances): bias[:, q - k].

    Entries of later keys mean nothing.

    Examples:
        >>> by_distance(torch.tensor([[5.0, 6.0, 7.0]]), 2)
        tensor([[[5., 0.],
                 [6., 5.]]])
    """
    # Row q is a window of the reversed biases that begins at q - length + 1: no index, so no scattered gradient.
    reversed_ = F.pad(bias[:, :length].flip(1), (0, length - 1))
    return reversed_.unfold(1, length, 1).flip(1)


class SASRec(SequenceEncoder):
    """Causal Transformer over items, Kang and McAuley, ICDM 2018 (Sec. III): position t sees items up to t.

    Where we differ: positions are counted from the newest item, so that left padding changes nothing (the authors
    count from the start of the padded window, which is the same thing at one fixed length). Queries, keys and values
    are all normalised, as Sec. III-C has it (the authors' code: the queries alone), and the heads' outputs are
    projected once more, as in the Transformer. A padded position's embedding is its position's row instead of 0; no
    real position attends to it.

    Args:
        num_items: V; ids are 0 (padding), 1..V (items) and V + 1 (mask token).
        d_model: d, the width of embedding and output.
        num_layers: number of blocks (Sec. III-C; the paper's default is 2).
        num_heads: attention heads, a divisor of ``d_model`` (the paper's default is 1).
        max_len: the longest l.
        dropout: on the embedding, the attention weights and in the sublayers (Sec. III-C).
        d_ff: width of the point-wise net; ``d_model``, as in the paper, where None.
        activation: of the point-wise net, "relu" as in the paper, or "gelu".
        positions: "learned", a row for every position as in the paper, or "relative", a number per head and distance
            that is added to the attention's scores, so that what is learned at one place of a long sequence holds at
            every other.
        norm_first: x + Dropout(g(LayerNorm(x))) as in Sec. III-C, with a last LayerNorm as in the code; otherwise
            LayerNorm(x + Dropout(g(x))), a LayerNorm after the embedding, and no dropout within the point-wise net, as
            in RecBole's SASRec.
        scale_embedding: multiply item embeddings by √d, as in the authors' code.
        init_std: of the normal that weights are drawn from, truncated at two standard deviations.

    Shapes:
        item_ids (b, l) int64, padded with 0 on the left -> hidden states (b, l, d); with ``newest=True`` the last
        position's alone, (b, d), for less work.

    Raises:
        EnsembleKDError: an argument is out of its range, or the input is not (b, l) with l <= max_len.

    Examples:
        >>> encoder = SASRec(num_items=9, d_model=8, max_len=5)
        >>> encoder(torch.tensor([[0, 0, 3, 4]])).shape
        torch.Size([1, 4, 8])
    """

    causal: ClassVar[bool] = True
    above_diagonal: Tensor
    position_embedding: nn.Parameter | None

    def __init__(
        self,
        num_items: int,
        *,
        d_model: int = 64,
        num_layers: int = 2,
        num_heads: int = 1,
        max_len: int = 50,
        dropout: float = 0.2,
        d_ff: int | None = None,
        activation: Literal["relu", "gelu"] = "relu",
        positions: Literal["learned", "relative"] = "learned",
        norm_first: bool = True,
        scale_embedding: bool = True,
        init_std: float = 0.02,
    ) -> None:
        d_ff = d_model if d_ff is None else d_ff
        super().__init__(num_items, d_model, max_len, dropout, num_layers=num_layers, num_heads=num_heads, d_ff=d_ff)
        d_model, max_len = self.d_model, self.max_len
        flag("SASRec", "norm_first", norm_first)
        flag("SASRec", "scale_embedding", scale_embedding)
        choice("SASRec", "activation", activation, ("relu", "gelu"))
        relative = choice("SASRec", "positions", positions, ("learned", "relative")) == "relative"
        if relative:
            self.register_parameter("position_embedding", None)
        else:
            self.position_embedding = nn.Parameter(torch.empty(max_len, d_model))
        distances = max_len if relative else 0
        self.blocks = nn.ModuleList(
            CausalBlock(d_model, num_heads, d_ff, self.dropout, norm_first, activation, distances)
            for _ in range(num_layers)
        )
        # One LayerNorm is due outside the blocks in either form: after the last residual, or after the embedding.
        self.norm, self.norm_first = nn.LayerNorm(d_model), norm_first
        self.scale = d_model**0.5 if scale_embedding else 1.0
        later = torch.ones(max_len, max_len, dtype=torch.bool).triu(1)
        self.register_buffer("above_diagonal", later, persistent=False)
        self.init_weights(init_std)
        for name, parameter in self.named_parameters():
            if name.endswith("distance_bias"):  # no distance is preferred at the start
                nn.init.zeros_(parameter)

    def forward(self, item_ids: Tensor, *, newest: bool = False) -> Tensor:
        """item_ids (b, l) int64 -> hidden states (b, l, d), or (b, d) of the newest position."""
        self.check(item_ids)
        length = item_ids.shape[1]
        x = self.item_embedding(item_ids) * self.scale
        if self.position_embedding is not None:
            x = x + self.position_embedding[-length:]
        x = self.drop(x if self.norm_first else self.norm(x))
        hidden = (item_ids == 0)[:, None, None, :] | self.above_diagonal[:length, :length]
        mask = hidden.to(x.dtype) * HIDDEN_KEY
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, mask, newest=newest and number == len(self.blocks))
        x = x[:, -1] if newest else x
        return self.norm(x) if self.norm_first else x  # type: ignore[no-any-return]
