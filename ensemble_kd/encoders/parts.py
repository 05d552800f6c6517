"""Parts that the encoders of this folder share: their frame, dropout and self-attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import is_vmap_slice, number, shown, view_as_int16, whole

# Added to the attention scores of hidden keys. exp() of it is exactly 0 in every precision; finite also in float16,
# so that a row with nothing to attend to gives a mean instead of a NaN.
HIDDEN_KEY = -30000.0

LONG = 64  # keys from which on a CPU is faster with them on the last axis; up to 50 there is no clear difference


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero features with probability p (to 1/65536) and scale the others so that the mean stays; x itself at p = 0.

    ``F.dropout`` draws one number per feature, which costs more than the attention on a CPU. Here one 64-bit draw
    serves four features, so that forward and backward take half the time. Other devices have a fused kernel.

    Examples:
        >>> sorted(set(dropout(torch.ones(1000), 0.5).tolist()))
        [0.0, 2.0]
    """
    dropped = round(p * 65536)
    if not dropped:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    draws = view_as_int16(torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,)))
    keep = draws[: x.numel()].view(x.shape) >= dropped - 32768
    return x * (keep.to(x.dtype) * (65536 / (65536 - dropped)))


# The largest sizes that are no mistake: beyond them, memory or time would end before the encoder is built.
MOST = {"num_items": 2**31 - 3, "num_layers": 1000, "window": 1000}
MOST_FEATURES = 2**20


class SequenceEncoder(nn.Module):
    """The frame of the encoders here: checked arguments, the item embedding, checked input.

    ``positive`` are further arguments of the subclass that have to be 1 or more.
    """

    causal: ClassVar[bool]

    def __init__(self, num_items: int, d_model: int, max_len: int, dropout: float, **positive: int) -> None:
        super().__init__()
        where = type(self).__name__
        sizes = {"num_items": num_items, "d_model": d_model, "max_len": max_len, **positive}
        for name, value in sizes.items():
            sizes[name] = whole(where, name, value, least=1, most=MOST.get(name, MOST_FEATURES))
        self.num_items, self.d_model, self.max_len = sizes["num_items"], sizes["d_model"], sizes["max_len"]
        self.dropout = number(where, "dropout", dropout, least=0, below=1)
        self.item_embedding = nn.Embedding(num_items + 2, d_model, padding_idx=0)

    def check(self, item_ids: Tensor) -> None:
        """Raise EnsembleKDError unless ``item_ids`` is (b, l) of integers with 1 <= l <= max_len."""
        where = type(self).__name__
        if not isinstance(item_ids, Tensor) or item_ids.is_complex() or item_ids.dtype == torch.bool:
            got = shown(item_ids)
            raise EnsembleKDError(where, "item_ids (b, l) of integers", got, "Pass a tensor of item ids.")
        if item_ids.dim() != 2 or item_ids.is_floating_point():
            got = f"{tuple(item_ids.shape)} {item_ids.dtype}"
            raise EnsembleKDError(where, "item_ids (b, l) of integers", got, "Pad sequences with 0 on the left.")
        if not 1 <= item_ids.shape[1] <= self.max_len:
            fix = "Keep the newest items, item_ids[:, -max_len:], or build the encoder with a larger max_len."
            raise EnsembleKDError(where, f"1 <= l <= max_len = {self.max_len}", f"l = {item_ids.shape[1]}", fix)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout in training; x itself otherwise."""
        return dropout(x, self.dropout if self.training else 0.0)

    def init_embedding(self, std: float) -> None:
        """Draw the item embeddings from N(0, std²); the padding row is zero."""
        nn.init.normal_(self.item_embedding.weight, std=number(type(self).__name__, "init_std", std, above=0))
        with torch.no_grad():
            self.item_embedding.weight[0].zero_()

    def init_weights(self, std: float | None) -> None:
        """Draw weights and plain parameters from N(0, std²) truncated at 2 std; biases and the padding row are zero.

        None: matrices by Glorot's uniform rule, which keeps a signal's size whatever the width, and the rest with 0.02.
        """
        std = None if std is None else number(type(self).__name__, "init_std", std, above=0)
        glorot, std = std is None, std or 0.02
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    nn.init.zeros_(parameter)
                elif glorot and isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        with torch.no_grad():
            self.item_embedding.weight[0].zero_()


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float) -> Tensor:
    """Return ``F.scaled_dot_product_attention`` of (b, h, l, d); under ``torch.vmap`` one call for all members.

    To torch 2.13 at least, CUDA's fused kernels cannot run under vmap: they refuse a mask that the members share, and
    the backward pass lacks a statistic, since tensors under vmap say that they require no gradient. So the members are
    joined with the batch before the kernel is called.

    Args:
        q: (b, h, queries, d).
        k: (b, h, keys, d).
        v: (b, h, keys, d).
        mask: (b, 1, queries or 1, keys), added to the scores.
        p: of dropout.

    Examples:
        >>> q, mask = torch.randn(3, 2, 1, 4, 8), torch.zeros(2, 1, 1, 4)
        >>> together = torch.vmap(fused_attention, in_dims=(0, 0, 0, None, None))(q, q, q, mask, 0.0)
        >>> torch.allclose(together[1], fused_attention(q[1], q[1], q[1], mask, 0.0), atol=1e-6)
        True
    """
    if is_vmap_slice(q):
        return _Joined.apply(q, k, v, mask, p)  # type: ignore[no-any-return, no-untyped-call]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)


class _Joined(torch.autograd.Function):
    """The way into ``vmap``, where a function sees the tensors of all members; autograd records what it does there."""

    @staticmethod
    def forward(*_: Any) -> Tensor:
        """Never run, as ``vmap`` takes its place."""
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Never run, but torch.func asks for it."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Join members and batch, attend, and part them again."""
        q, k, v, mask = (
            (x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)).flatten(0, 1)
            for x, axis in zip(inputs[:-1], in_dims, strict=False)
        )
        return fused_attention(q, k, v, mask, inputs[-1]).unflatten(0, (info.batch_size, -1)), 0


class SelfAttention(nn.Module):
    """Multi-head attention softmax(Q Kᵀ / √(d/h) + mask) V, projected (BERT4Rec Sec. 3.3, SASRec Eq. 2)."""

    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if d_model % num_heads:
            got = f"d_model = {d_model}, num_heads = {num_heads}"
            raise EnsembleKDError("SelfAttention", "d_model to be a multiple of num_heads", got, "Change one of them.")
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor, *, newest: bool = False) -> Tensor:
        """x (b, l, d) and an additive mask (b, 1, queries l or 1, keys l) -> (b, l, d).

        With ``newest`` the last position is the only query, and the mask has one row for it: (b, 1, d).
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = q[..., -1:, :] if newest else q
        p, scale = self.dropout if self.training else 0.0, q.shape[-1] ** -0.5
        mask = mask.to(q.dtype)
        if x.device.type != "cpu" or not p:
            mixed = fused_attention(q, k, v, mask, p)
        elif x.shape[1] >= LONG:  # to torch 2.13 at least, the CPU's fused kernel is slower with dropout
            scores = torch.add(mask, q @ k.transpose(-1, -2), alpha=scale)
            mixed = dropout(scores.softmax(-1).to(v.dtype), p) @ v
        else:  # keys stand on the second to last axis, since a softmax over a very short last axis is slow
            scores = torch.add(mask.transpose(-1, -2), k @ q.transpose(-1, -2), alpha=scale)
            mixed = dropout(scores.softmax(-2).to(v.dtype), p).transpose(-1, -2) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
