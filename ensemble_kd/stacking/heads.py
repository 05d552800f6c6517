"""The classifiers on top of the encoders, stacked: every member has its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ensemble_kd.internal import member_seed, seeded

INIT_STD = 0.02  # as BERT4Rec; a classifier that starts near zero starts near the uniform distribution


class Heads(nn.Module):
    """n linear classifiers with weights (n, c, d) and biases (n, c).

    Args:
        n: members.
        classes: c, items or attributes.
        d: hidden size; or one per member, and weights are filled up with zeros to the widest, as hidden states are.
        seed: of the ensemble; each member's weights follow from it and the member's number.
        stream: another number for each kind of classifier, see ``member_seed``; 0 is the encoders'.
        tied: leave the weights out; the caller passes those of the item embedding.
        like: gives the dtype (float64, else float32) and the device.
        first: number of the first of these members in the whole ensemble.

    Examples:
        >>> heads = Heads(2, 5, 4, seed=0, stream=1, tied=False, like=torch.zeros(()))
        >>> heads.weight.shape, heads.bias.shape
        (torch.Size([2, 5, 4]), torch.Size([2, 5]))
    """

    weight: nn.Parameter | None
    bias: nn.Parameter

    def __init__(
        self,
        n: int,
        classes: int,
        d: int | Sequence[int],
        *,
        seed: int,
        stream: int,
        tied: bool,
        like: Tensor,
        first: int = 0,
    ) -> None:
        super().__init__()
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.widths = (d,) * n if isinstance(d, int) else tuple(d)
        weights = []
        for i, width in enumerate(self.widths, start=first):
            with seeded(member_seed(seed, i, stream)):
                own = torch.randn(0 if tied else classes, width, dtype=dtype) * INIT_STD
            weights.append(nn.functional.pad(own, (0, max(self.widths) - width)))
        weight = None if tied else nn.Parameter(torch.stack(weights).to(like.device))
        self.register_parameter("weight", weight)
        self.bias = nn.Parameter(torch.zeros(n, classes, dtype=dtype, device=like.device))

    def member(self, i: int) -> Heads:
        """Return a copy of member i's classifier, with n = 1 and the member's own width."""
        alone = Heads.__new__(Heads)
        nn.Module.__init__(alone)
        alone.train(self.training)
        alone.widths = self.widths[i : i + 1]
        for name, own in self._parameters.items():
            row = None
            if own is not None:
                values = own.detach()[i][None]
                values = values[..., : alone.widths[0]] if name == "weight" else values
                row = nn.Parameter(values.clone(memory_format=torch.contiguous_format), own.requires_grad)
            alone.register_parameter(name, row)
        return alone
