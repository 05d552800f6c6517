"""GRU4Rec: a recurrent net over items."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ensemble_kd.encoders.parts import SequenceEncoder


class GRU4Rec(SequenceEncoder):
    """Gated recurrent units over items, Hidasi et al., ICLR 2016 (Sec. 3, Eqs. 1 to 4).

    The recurrence begins at the first real item with state 0, whatever the padding: rows are rolled to begin with
    their items, run, and rolled back, all by gather.

    Where we differ: items enter through an embedding, which the paper has as an option (it found one-hot input
    better, where the input-to-hidden matrix plays that part); a linear layer maps states back to d, so that the
    classifier outside can be tied to the embedding; batches are whole sequences and not session-parallel.
    ``nn.GRU`` has no batching rule for ``torch.vmap``: use the loop backend.

    Args:
        num_items: V; ids are 0 (padding), 1..V (items) and V + 1 (mask token).
        d_model: d, the width of embedding and output.
        num_layers: stacked GRU layers (the paper's best is 1).
        hidden_size: width of the state; None: ``d_model``.
        max_len: the longest l.
        dropout: on the embedding and between GRU layers.
        init_std: of the normal that item embeddings are drawn from. With a small one, such as Glorot's, and a tied
            classifier, the net starts from small logits and learns late.

    Shapes:
        item_ids (b, l) int64, padded with 0 on the left -> hidden states (b, l, d); with ``newest=True`` the last
        position's alone, (b, d), for less work.

    Raises:
        EnsembleKDError: an argument is out of its range, or the input is not (b, l) with l <= max_len.

    Examples:
        >>> encoder = GRU4Rec(num_items=9, d_model=8, max_len=5)
        >>> encoder(torch.tensor([[0, 0, 3, 4]])).shape
        torch.Size([1, 4, 8])
    """

    causal: ClassVar[bool] = True

    def __init__(
        self,
        num_items: int,
        *,
        d_model: int = 64,
        num_layers: int = 1,
        hidden_size: int | None = None,
        max_len: int = 50,
        dropout: float = 0.2,
        init_std: float = 0.2,
    ) -> None:
        width = d_model if hidden_size is None else hidden_size
        super().__init__(num_items, d_model, max_len, dropout, num_layers=num_layers, hidden_size=width)
        d_model = self.d_model
        between = self.dropout if num_layers > 1 else 0.0  # nn.GRU warns where it has no place to apply it
        self.gru = nn.GRU(d_model, width, num_layers, batch_first=True, dropout=between)
        self.project = nn.Linear(width, d_model)
        self.init_embedding(init_std)

    def forward(self, item_ids: Tensor, *, newest: bool = False) -> Tensor:
        """item_ids (b, l) int64 -> hidden states (b, l, d), or (b, d) of the newest position."""
        self.check(item_ids)
        length = item_ids.shape[1]
        padding = (item_ids == 0).sum(1, keepdim=True)
        place = torch.arange(length, device=item_ids.device)
        x = self.item_embedding(item_ids.gather(1, (place + padding) % length))
        states = self._recur(self.drop(x))
        if newest:
            last = ((length - 1 - padding) % length)[:, :, None].expand(-1, 1, states.shape[-1])
            return self.project(states.gather(1, last)[:, 0])  # type: ignore[no-any-return]
        states = self.project(states)
        back = ((place - padding) % length)[:, :, None].expand_as(states)
        return states.gather(1, back)  # type: ignore[no-any-return]

    def _recur(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return self.gru(x)[0]  # type: ignore[no-any-return]
        # CUDA's autocast runs recurrent layers in float16, whatever its precision is: too little range without scaling.
        with torch.autocast(x.device.type, enabled=False):
            return self.gru(x.to(self.project.weight.dtype))[0]  # type: ignore[no-any-return]
