"""The attribute loss (Eqs. 9-11) from hidden states and classifiers, without holding the logits.

A tile is some positions of one member against all attributes. Its loss is final and its gradient known while it is in
the cache, as in ``items``: ``softplus(x)`` and ``sigmoid(x)`` share one exponential.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError

_TILE_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}  # of one float32 plane; some five are in use at once


def attribute_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    attributes: Tensor,
    real: Tensor,
    *,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """``functional.attribute_cross_entropy`` of ``hidden · weightᵀ + bias``; gradients are computed on the way forward.

    Args:
        hidden: (n, t, d) hidden states of the positions.
        weight: (n, a, d) attribute classifiers.
        bias: (n, a).
        attributes: (t, k) int64 classes in [0, a) of the item at each position, filled up with -1.
        real: (t,) bool, False at padding, which never counts.
        product_dtype: of the matrix products; None: that of ``hidden``. All else is float32 (float64 for float64).

    Returns:
        (n,) one loss a member.

    Raises:
        EnsembleKDError: a backward with ``create_graph``; ``functional.attribute_cross_entropy`` differentiates twice.

    Examples:
        >>> hidden, weight, bias = torch.zeros(1, 2, 3), torch.zeros(1, 4, 3), torch.zeros(1, 4, requires_grad=True)
        >>> losses = attribute_losses(hidden, weight, bias, torch.tensor([[2], [0]]), torch.tensor([True, True]))
        >>> losses.exp()
        tensor([2.], grad_fn=<ExpBackward0>)
        >>> losses.sum().backward()
        >>> bias.grad  # (sigmoid - target) / (positions · attributes)
        tensor([[0.0000, 0.1250, 0.0000, 0.1250]])
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _Losses.apply(hidden, weight, bias, attributes, real, product_dtype or hidden.dtype)  # type: ignore[no-any-return, no-untyped-call]


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, attributes: Tensor, real: Tensor, product: torch.dtype
    ) -> Tensor:
        (n, t, d), a = hidden.shape, weight.shape[1]
        dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
        wanted = any(ctx.needs_input_grad[:3])
        # What a padded position holds, NaN included, must not reach the weights: 0 · NaN would.
        inputs = hidden.detach().masked_fill(~real[:, None], 0).to(product)
        classifier, offsets = weight.detach().to(product), bias.detach().to(dtype)
        has = (attributes >= 0) & real[:, None]
        index = attributes.clamp(min=0)
        shares = real.to(dtype) / (real.sum() * a)
        losses = torch.zeros(n, dtype=dtype, device=hidden.device)
        d_hidden = torch.empty(n, t, d, dtype=product, device=hidden.device) if wanted else None
        d_weight, d_bias = torch.zeros_like(weight, dtype=dtype), torch.zeros_like(offsets)
        rows = max(1, _TILE_BYTES.get(hidden.device.type, _TILE_BYTES["cuda"]) // (4 * a))
        for i in range(n):
            for start in range(0, t, rows):
                part = slice(start, min(start + rows, t))
                x = torch.mm(inputs[i, part], classifier[i].T).to(dtype).add_(offsets[i])
                share = shares[part, None]
                picked = x.gather(1, index[part]).masked_fill_(~has[part], 0).sum(dim=1)
                small = x.abs().neg_().exp_()  # in (0, 1], so that nothing overflows
                softplus = small.log1p().add_(x.clamp(min=0)).sum(dim=1)
                losses[i] += (softplus - picked) @ shares[part]
                if d_hidden is None:
                    continue
                grad = torch.where(x > 0, 1.0, small).div_(small.add_(1)).mul_(share)  # the sigmoid
                grad.scatter_add_(1, index[part], -(has[part] * share).to(dtype))
                rounded = grad.to(product)
                torch.mm(rounded, classifier[i], out=d_hidden[i, part])
                d_weight[i] += rounded.T @ inputs[i, part]
                d_bias[i] += grad.sum(dim=0)
        if wanted:
            ctx.grads = (d_hidden, d_weight, d_bias)
            ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the second derivatives would silently be taken for zero
            fix = "Leave create_graph off, or use the losses of ensemble_kd.functional, which differentiate twice."
            raise EnsembleKDError("attribute_losses", "one backward pass", "create_graph=True", fix)
        grads = zip(ctx.grads, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        each = (
            (grad * upstream.view(-1, *[1] * (grad.ndim - 1)).to(grad.dtype)).to(dtype) if needed else None
            for grad, dtype, needed in grads
        )
        return *each, None, None, None
