"""Caser: horizontal and vertical convolutions over the last items."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble_kd.encoders.parts import SequenceEncoder


class Caser(SequenceEncoder):
    """Convolutions over the ``window`` newest items, Tang and Wang, WSDM 2018 (Sec. 3), at every position in one call.

    With E the (window, d) embeddings of the items up to position t: horizontal filters of every height h in
    1..window slide over E and are max-pooled over time, vertical filters weight its rows (Sec. 3.2), and a linear layer
    with ReLU joins both: z = φ(W [o, õ] + b) (Sec. 3.3). Missing items before the first are zero rows.

    Where we differ: a horizontal filter is one causal convolution over the whole sequence, and its values are then
    max-pooled over the window of each position, which gives what the paper computes position by position. The user's
    embedding P_u (Sec. 3.3) is left out, since encoders here are given items alone. As in the authors' code, dropout
    stands before the joining layer.

    Args:
        num_items: V; ids are 0 (padding), 1..V (items) and V + 1 (mask token).
        d_model: d, the width of embedding and output.
        window: L, the items that one position sees (the paper tunes 1 to 9).
        horizontal: filters of each height (n / L in the paper).
        vertical: vertical filters (ñ in the paper).
        max_len: the longest l.
        dropout: on the pooled features.
        init_std: of the normal that item embeddings are drawn from. The authors' code has 1 / d, from which a net with
            a tied classifier, whose logits start small, learns late.

    Shapes:
        item_ids (b, l) int64, padded with 0 on the left -> hidden states (b, l, d); with ``newest=True`` the last
        position's alone, (b, d), for less work.

    Raises:
        EnsembleKDError: an argument is out of its range, or the input is not (b, l) with l <= max_len.

    Examples:
        >>> encoder = Caser(num_items=9, d_model=8, max_len=5)
        >>> encoder(torch.tensor([[0, 0, 3, 4]])).shape
        torch.Size([1, 4, 8])
    """

    causal: ClassVar[bool] = True

    def __init__(
        self,
        num_items: int,
        *,
        d_model: int = 64,
        window: int = 5,
        horizontal: int = 16,
        vertical: int = 4,
        max_len: int = 50,
        dropout: float = 0.2,
        init_std: float = 0.2,
    ) -> None:
        sizes = {"window": window, "horizontal": horizontal, "vertical": vertical}
        super().__init__(num_items, d_model, max_len, dropout, **sizes)
        d_model = self.d_model
        self.window = window
        self.horizontal = nn.ModuleList(nn.Linear(h * d_model, horizontal) for h in range(1, window + 1))
        self.vertical = nn.Linear(window, vertical, bias=False)
        self.join = nn.Linear(window * horizontal + vertical * d_model, d_model)
        self.init_embedding(init_std)

    def forward(self, item_ids: Tensor, *, newest: bool = False) -> Tensor:
        """item_ids (b, l) int64 -> hidden states (b, l, d), or (b, d) of the newest position."""
        self.check(item_ids)
        if newest:
            return self._states(item_ids[:, -self.window :])[:, -1]
        return self._states(item_ids)

    def _states(self, item_ids: Tensor) -> Tensor:
        """(b, l) -> (b, l, d)."""
        # The padding row is zero by construction; masking keeps the paper's zero rows even where a user's training
        # writes into that row.
        x = self.item_embedding(item_ids) * (item_ids != 0)[:, :, None]
        x = F.pad(x, (0, 0, self.window - 1, 0))
        windows = x.unfold(1, self.window, 1)  # (b, l, d, window), oldest item first
        features = [self.vertical(windows).flatten(2)]
        for height, layer in enumerate(self.horizontal, start=1):
            slices = x.unfold(1, height, 1).transpose(-1, -2).flatten(2)  # (b, l + window - height, height · d)
            places = self.window - height + 1
            features.append(F.relu(layer(slices)).unfold(1, places, 1).amax(-1))
        return F.relu(self.join(self.drop(torch.cat(features, -1))))
