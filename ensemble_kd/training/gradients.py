"""Gradients whose first axis is the members: norms, clipping, and the rows of sparse ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ensemble_kd.distributed import beside, whole
from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import number, shown, sparse_parts

_MERGED = "merged_parts"  # attribute of a gradient whose rows are merged: how many parts it had then


@torch.no_grad()
def clip_members_(parameters: Sequence[Tensor], max_norm: float, rows: MemberRows | None = None) -> Tensor:
    """Scale each member's gradient to a norm of at most ``max_norm``, in place, and return the norms before, (n,).

    A norm over all members would couple them: one member's spike would slow the others.

    Args:
        parameters: each with a gradient (n, \\*rest) or none.
        max_norm: of a member's gradient.
        rows: of a mixed ensemble, see ``member_rows``.

    Raises:
        EnsembleKDError: max_norm <= 0, or parameters without a gradient.

    Examples:
        >>> p = torch.zeros(2, 3, requires_grad=True)
        >>> p.grad = torch.tensor([[3.0, 4.0, 0.0], [0.3, 0.4, 0.0]])
        >>> clip_members_([p], 1.0), p.grad.norm(dim=1)
        (tensor([5.0000, 0.5000]), tensor([1.0000, 0.5000]))
    """
    given: object = parameters
    if not isinstance(given, Iterable) or isinstance(given, Tensor) or not all(isinstance(p, Tensor) for p in given):
        fix = "Pass list(model.parameters())."
        raise EnsembleKDError("clip_members_", "parameters, a list of tensors", shown(given), fix)
    number("clip_members_", "max_norm", max_norm, above=0, most=math.inf)
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = merge_rows(p.grad)
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        raise EnsembleKDError("clip_members_", "parameters with gradients", "none", "Call backward() first.")
    each = [whole(member_norms(g)) for g in grads]
    own: list[Tensor] | None = None
    if rows is not None:
        own = [members for p, members in zip(parameters, rows.members, strict=True) if p.grad is not None]
        each = [norms.new_zeros(rows.n).index_copy(0, at, norms) for norms, at in zip(each, own, strict=True)]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(each), dim=0)
    scale = (max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    if norms.device.type == "cpu" and bool((scale == 1).all()):
        return norms
    for i, grad in enumerate(grads):
        values, factor = grad, scale if own is None else scale[own[i]]
        if grad.is_sparse:
            index, values = sparse_parts(grad)
            factor = factor[index[0]]
        factor = factor.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
        values.mul_(beside(factor, grad))
    return norms


class MemberRows(NamedTuple):
    """The members that rows of parameters belong to."""

    n: int  # members in all
    members: list[Tensor]  # per parameter their numbers, in order


def member_rows(model: EnsembleKD, parameters: Sequence[Tensor]) -> MemberRows | None:
    """Return the members that the rows of parameters belong to; None: every parameter has a row of each member.

    Examples:
        >>> from ensemble_kd.encoders import GRU4Rec, SASRec
        >>> small = {"d_model": 4, "max_len": 5}
        >>> model = EnsembleKD([lambda: SASRec(9, **small), lambda: GRU4Rec(9, **small)])
        >>> rows = member_rows(model, list(model.parameters()))
        >>> rows.members[0].tolist(), rows.members[-1].tolist()
        ([0], [0, 1])
    """
    kinds, groups = model.encoder.kinds, model.encoder.groups
    if len(groups) == 1:
        return None
    of_group = {id(p): kind for kind, group in enumerate(groups) for p in group.parameters()}
    numbers = [[i for i, own in enumerate(kinds) if own == kind] for kind in range(len(groups))]
    found = [numbers[of_group[id(p)]] if id(p) in of_group else list(range(len(kinds))) for p in parameters]
    return MemberRows(len(kinds), [torch.tensor(x, device=p.device) for x, p in zip(found, parameters, strict=True)])


def merge_rows(grad: Tensor) -> Tensor:
    """Return a sparse gradient (n, r, \\*rest) with the parts of each row added up.

    On a CPU every row is in it once. An accelerator would have to report their number to the host, so there the
    first of equal rows has the sum, and the others have 0.
    """
    return grad.coalesce() if grad.device.type == "cpu" else _merge_in_place(grad)


def _merge_in_place(grad: Tensor) -> Tensor:
    index, values = sparse_parts(grad)
    if getattr(grad, _MERGED, None) == len(values):  # clipping has done it, and nothing was added since
        return grad
    keys, order = (index[0] * grad.shape[1] + index[1]).sort(stable=True)
    values = torch.zeros_like(values).index_add_(0, torch.searchsorted(keys, keys), values[order])
    merged = torch.sparse_coo_tensor(index[:, order], values, grad.shape, check_invariants=False)
    setattr(merged, _MERGED, len(values))
    return merged


def member_norms(grad: Tensor) -> Tensor:
    """Return the norm of each member's gradient, (n,). A sparse gradient goes through ``merge_rows`` first.

    Examples:
        >>> member_norms(torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]]).to_sparse(2))
        tensor([5., 1.])
    """
    if not grad.is_sparse:
        norms = torch.linalg.vector_norm(grad, dim=tuple(range(1, grad.ndim))) if grad.ndim > 1 else grad.abs()
        return norms.float()
    index, values = sparse_parts(grad)
    values = values.float()
    squares = values.square().sum(tuple(range(1, values.ndim))) if values.ndim > 1 else values.square()
    return torch.zeros(len(grad), device=grad.device).index_add_(0, index[0], squares).sqrt()
