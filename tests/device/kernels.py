"""Where an accelerator differs from the CPU: kernels that a CPU lacks, autocast's lists, limits of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

# The lists of CUDA's autocast, as far as the package meets them.
AUTOCAST_LOW = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "mv", "addmv", "conv1d", "conv2d")
AUTOCAST_HALF = ("gru.input",)  # in float16, also where bfloat16 is asked for
AUTOCAST_FLOAT32 = (
    "softmax.int", "log_softmax.int", "layer_norm", "exp", "log", "pow.Tensor_Scalar", "sum", "sum.dim_IntList",
    "cumsum", "norm.ScalarOpt_dim", "cosine_similarity", "cross_entropy_loss", "logsumexp",
)  # fmt: skip


def _gru_cell(gates: Tensor, hidden_gates: Tensor, hidden: Tensor, bias: Any = None, hidden_bias: Any = None) -> Any:
    gates = gates if bias is None else gates + bias
    hidden_gates = hidden_gates if hidden_bias is None else hidden_gates + hidden_bias
    (i_reset, i_update, i_new), (h_reset, h_update, h_new) = gates.chunk(3, 1), hidden_gates.chunk(3, 1)
    reset, update = (i_reset + h_reset).sigmoid(), (i_update + h_update).sigmoid()
    new = (i_new + reset * h_new).tanh()
    return new + update * (hidden - new), torch.cat([reset, update, new, hidden, h_new], 1)


def _gru_cell_backward(grad: Tensor, workspace: Tensor, has_bias: bool) -> Any:
    reset, update, new, hidden, h_new = workspace.chunk(5, 1)
    d_update = grad * (hidden - new) * update * (1 - update)
    d_new = grad * (1 - update) * (1 - new * new)
    d_reset = d_new * h_new * reset * (1 - reset)
    gates, hidden_gates = torch.cat([d_reset, d_update, d_new], 1), torch.cat([d_reset, d_update, d_new * reset], 1)
    biases = (gates.sum(0), hidden_gates.sum(0)) if has_bias else (None, None)
    return gates, hidden_gates, grad * update, *biases


def _addmm_in_float32(
    total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor, **factors: Any
) -> Tensor:
    return torch.addmm(total, left.to(dtype), right.to(dtype), out=out, **factors)


KERNELS: dict[str, Callable[..., Any]] = {
    "addmm.dtype_out": _addmm_in_float32,
    "_thnn_fused_gru_cell": _gru_cell,
    "_thnn_fused_gru_cell_backward": _gru_cell_backward,
}


def attention(plain: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """Return an attention that fails where CUDA's kernels of torch 2.11 to 2.13 do: with a mask, under vmap."""

    def attend(query: Tensor, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if query.device.type == device and attn_mask is not None and _functorch.is_batchedtensor(query):
            raise RuntimeError("attn_bias: wrong shape (batch dimension)")
        return plain(query, *args, attn_mask=attn_mask, **kwargs)

    return attend
