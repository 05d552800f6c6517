"""The attribute loss (Eqs. 9–11) from hidden states and classifiers, without storing the logits.

A tile is some positions of one member × all attributes. Its loss is final and its gradient is known while it is in the
cache. ``softplus(x)`` and ``sigmoid(x)`` share one exponential.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import tensor
from ensemble_kd.losses.autograd import check_networks, refuse_create_graph
from ensemble_kd.losses.formula import Networks
from ensemble_kd.losses.tiles import gain_for

_WHERE = "attribute_losses"
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
    """Return the attribute loss of each member, whose gradients are computed on the way forward.

    It is ``functional.attribute_cross_entropy`` of the logits hidden · weightᵀ + bias.

    Args:
        hidden: (n, t, d) hidden states of the positions.
        weight: (n, a, d) attribute classifiers.
        bias: (n, a).
        attributes: (t, k) int64 classes in [0, a) of the item at each position, filled up with -1.
        real: (t,) bool, False at padding, which never counts.
        product_dtype: precision of the matrix products. None: that of ``hidden``. Everything else is float32, or
            float64 for float64 input.

    Returns:
        (n,) one loss per member, a mean over real positions and attributes; 0 if no position is real.

    Raises:
        EnsembleKDError: shapes or types that do not fit, a class of a or more (checked on the CPU only: elsewhere that
            would wait for the device), or a backward pass with ``create_graph``.
            ``functional.attribute_cross_entropy`` differentiates twice.

    Examples:
        >>> hidden, weight, bias = torch.zeros(1, 2, 3), torch.zeros(1, 4, 3), torch.zeros(1, 4, requires_grad=True)
        >>> losses = attribute_losses(hidden, weight, bias, torch.tensor([[2], [0]]), torch.tensor([True, True]))
        >>> losses.exp()
        tensor([2.], grad_fn=<ExpBackward0>)
        >>> losses.sum().backward()
        >>> bias.grad  # (sigmoid - target) / (positions · attributes)
        tensor([[0.0000, 0.1250, 0.0000, 0.1250]])
    """
    _check(Networks(hidden, weight, bias), attributes, real)
    with torch.autocast(hidden.device.type, enabled=False):
        return _Losses.apply(hidden, weight, bias, attributes, real, product_dtype or hidden.dtype)  # type: ignore[no-any-return, no-untyped-call]


def _check(networks: Networks, attributes: Tensor, real: Tensor) -> None:
    check_networks(_WHERE, networks, classes="a")
    tensor(_WHERE, "attributes", attributes)
    tensor(_WHERE, "real", real)
    if networks.bias is None:
        tensor(_WHERE, "bias", None)
    t, a = networks.hidden.shape[1], networks.weight.shape[1]
    if attributes.ndim != 2 or len(attributes) != t or attributes.dtype != torch.int64:
        got = f"{attributes.dtype} {tuple(attributes.shape)}"
        raise EnsembleKDError(_WHERE, f"attributes int64 ({t}, k)", got, "Pass one row of classes per position.")
    if real.shape != (t,) or real.dtype != torch.bool:
        got = f"{real.dtype} {tuple(real.shape)}"
        raise EnsembleKDError(_WHERE, f"real bool ({t},)", got, "Pass one flag per position, False at padding.")
    if attributes.device.type == "cpu" and attributes.numel() and int(attributes.max()) >= a:
        raise EnsembleKDError(_WHERE, f"attributes in [0, {a}), or -1", int(attributes.max()), "Count them from 0.")


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
        number = real.sum().clamp(min=1) * a
        shares = real.to(dtype) / number
        losses = torch.zeros(n, dtype=dtype, device=hidden.device)
        d_hidden = torch.empty(n, t, d, dtype=product, device=hidden.device) if wanted else None
        d_weight, d_bias = torch.zeros_like(weight, dtype=dtype), torch.zeros_like(offsets)
        rows = max(1, _TILE_BYTES.get(hidden.device.type, _TILE_BYTES["cuda"]) // (4 * a))
        gain = gain_for(product, rows, number)
        for i in range(n):
            for start in range(0, t, rows):
                part = slice(start, min(start + rows, t))
                x = torch.mm(inputs[i, part], classifier[i].T).to(dtype).add_(offsets[i])
                share = shares[part, None] * gain
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
            ctx.dtypes, ctx.gain = (hidden.dtype, weight.dtype, bias.dtype), gain
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph(_WHERE)

        def scaled(grad: Tensor, dtype: torch.dtype) -> Tensor:
            wide = grad.to(torch.promote_types(grad.dtype, dtype))
            return (wide * upstream.view(-1, *[1] * (grad.ndim - 1)).to(wide.dtype)).div_(ctx.gain).to(dtype)

        grads = zip(ctx.grads, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        return *(scaled(grad, dtype) if needed else None for grad, dtype, needed in grads), None, None, None
