"""A check of the tensors that callers pass: kind, axes, sizes shared between arguments; what a device can compute."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal.arguments import shown

CACHE_BYTES = 12 << 20  # about a core's share of a CPU's last-level cache: what is read again soon should fit

KINDS = {
    "floating": "floating-point numbers",
    "whole": "whole numbers",
    "int64": "int64",
    "bool": "truth values",
    "any": "numbers",
}


def tensor(
    where: str,
    name: str,
    value: object,
    axes: str = "...",
    kind: str = "any",
    sizes: dict[str, int] | None = None,
    *,
    empty: bool = False,
) -> None:
    """Check that a value is a dense tensor with some axes.

    Args:
        where: the public call, for the message.
        name: the argument's name.
        value: what the caller passed.
        axes: a letter or word per axis, such as "n t v"; "..." in front stands for any number of further ones.
        kind: of its elements, a key of ``KINDS``.
        sizes: of axes that are known already; those of this tensor are added.
        empty: an axis may have size 0.

    Raises:
        EnsembleKDError: anything else.

    Examples:
        >>> sizes = {}
        >>> tensor("item_cross_entropy", "logits", torch.zeros(2, 3, 4), "n t v", "floating", sizes)
        >>> sizes
        {'n': 2, 't': 3, 'v': 4}
        >>> tensor("item_cross_entropy", "targets", torch.tensor([1]), "t", "int64", sizes)
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: item_cross_entropy: expected targets, a tensor (t) of int64, t = 3, got \
Tensor (1,) torch.int64. Pass such a tensor.
    """
    sizes = {} if sizes is None else sizes
    names = axes.replace("...", "").split()
    if isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided:
        shape = value.shape[value.ndim - len(names) :] if axes.startswith("...") else value.shape
        fits = len(shape) == len(names) and value.ndim >= len(names) and (0 not in shape or empty or axes == "...")
        if fits and _is_kind(value, kind) and all(sizes.get(a, s) == s for a, s in zip(names, shape, strict=True)):
            sizes.update(zip(names, shape, strict=True))
            return
    known = "".join(f", {axis} = {sizes[axis]}" for axis in names if axis in sizes)
    of = f" ({', '.join(axes.split())})" if axes != "..." else ""
    expected = f"{name}, a tensor{of} of {KINDS[kind]}{known}"
    raise EnsembleKDError(where, expected, shown(value), "Pass such a tensor.")


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device without it.

    Examples:
        >>> widest(torch.device("cpu")), widest(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


def _is_kind(value: Tensor, kind: str) -> bool:
    number = not value.is_complex() and value.dtype != torch.bool
    return {
        "floating": value.is_floating_point(),
        "whole": number and not value.is_floating_point(),
        "int64": value.dtype == torch.int64,
        "bool": value.dtype == torch.bool,
        "any": True,
    }[kind]
