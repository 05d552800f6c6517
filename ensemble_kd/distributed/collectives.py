"""Sums, means and gathers over processes, as functions of a tensor and a ``Place``.

In a process that stands alone each gives back its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ensemble_kd.distributed.place import Place
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import sparse_parts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def gather_rows(x: Tensor, place: Place, *, dim: int) -> Tensor:
    """Return the rows of all processes along ``dim``; their numbers may differ.

    The gradient flows to a process's own rows, × W: every process computes the same loss of all rows, and the
    gradients are averaged over the processes.

    Examples:
        >>> gather_rows(torch.ones(2, 3), Place(), dim=1).shape
        torch.Size([2, 3])
    """
    if place.data is None:
        return x
    return _Gather.apply(x, dim, place.data, place.data_size)  # type: ignore[no-any-return, no-untyped-call]


def gather_members(x: Tensor, place: Place, *, dim: int = 0) -> Tensor:
    """Return the values of the members of all processes along ``dim``; the gradient flows to a process's own."""
    return x if place.member is None else _Gather.apply(x, dim, place.member, 1)  # type: ignore[no-untyped-call]


def sum_members_(x: Tensor, place: Place) -> Tensor:
    """Add up a tensor over the processes with other members, in place."""
    if place.member is not None:
        dist.all_reduce(x, group=place.member)
    return x


def mean_members(x: Tensor, place: Place) -> Tensor:
    """Return the mean of the processes' means over members, without a gradient."""
    return x if place.member is None else sum_members_(x.detach().clone(), place) / place.member_size


def sum_rows(x: Tensor, place: Place) -> Tensor:
    """Return the sum of a tensor on the CPU over the processes with other rows."""
    if place.data is None:
        return x
    moved = x.to(host_device(place.data), copy=True)
    dist.all_reduce(moved, group=place.data)
    return moved.to(x.device)


def shares(place: Place, *counts: Tensor | int) -> Tensor:
    """Return the weights of this process's means, (k,): count · W / count of all, so that their mean is exact.

    Every term is a mean over its own things (targets, attributed positions), which processes have in other numbers.
    """
    device = next((count.device for count in counts if isinstance(count, Tensor)), None)
    own = torch.stack([torch.as_tensor(count, dtype=torch.float64, device=device) for count in counts])
    every = own.clone()
    dist.all_reduce(every, group=place.data)
    return own * place.data_size / every.clamp(min=1)


def reduced(terms: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
    """Return each loss term as the mean over processes with other rows, and the sum over those with other members."""
    if place.size == 1 or not terms:
        return dict(terms)
    values = torch.stack([value.detach().double() for value in terms.values()])
    if place.data is not None:
        dist.all_reduce(values, group=place.data)
    sum_members_(values, place)
    return dict(zip(terms, values / place.data_size, strict=True))


def same_draws(generator: torch.Generator | None, place: Place, device: torch.device) -> torch.Generator | None:
    """Return a generator that is the same for all members of the same rows, so that they read the same views."""
    if place.member is None or generator is not None:
        return generator
    seed = torch.randint(1 << 62, (), device=host_device(place.member))
    dist.broadcast(seed, group=place.member, group_src=0)
    return torch.Generator(device).manual_seed(int(seed))


def agree(value: bool, place: Place) -> bool:
    """Return the first process's value: clocks and folders may give each process another one."""
    if place.size == 1:
        return value
    first = torch.tensor(int(value), device=host_device(dist.group.WORLD))
    dist.broadcast(first, 0)
    return bool(first)


def gather_objects(value: T, place: Place) -> list[T]:
    """Return the values of all processes, by rank."""
    found: list[Any] = [value] * place.size
    if place.size > 1:
        dist.all_gather_object(found, value)
    return found


def mean_sparse(grad: Tensor, group: ProcessGroup) -> Tensor:
    """Return the mean over processes of sparse gradients, each with rows of its own: the rows of all, side by side.

    Args:
        grad: (n, r, \\*rest) with two sparse dimensions.
        group: the processes.
    """
    own_index, own_values = sparse_parts(grad)
    index = gather(own_index, 1, group)
    values = gather(own_values, 0, group) / group.size()
    return torch.sparse_coo_tensor(index, values, grad.shape, check_invariants=False)


def gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return the tensors of all processes side by side along ``dim``, where their sizes may differ; no gradient."""
    return torch.cat(_parts(x, dim, group)[0], dim=dim)


def host_device(group: ProcessGroup | None) -> torch.device:
    """Return the device on which the host's own numbers travel: the CPU, unless the group has no backend for it."""
    return torch.device("cpu" if "cpu:" in dist.get_backend_config(group) else "cuda")


def _shapes(x: Tensor, group: ProcessGroup) -> list[list[int]]:
    own = torch.tensor(x.shape, device=host_device(group))
    found = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(found, own, group=group)
    return [shape.tolist() for shape in found]


def _parts(x: Tensor, dim: int, group: ProcessGroup) -> tuple[list[Tensor], list[int]]:
    shapes = _shapes(x, group)
    sizes = [shape[dim] for shape in shapes]
    rest = [[*shape[:dim], *shape[dim + 1 :]] for shape in shapes]
    if any(other != rest[0] for other in rest):
        fix = "Pad the rows of all processes to one length, as place.own of one batch are."
        raise EnsembleKDError("distributed", "tensors of one shape but for their rows", shapes, fix)
    # Of one size, as every backend can send them; what only fills up is cut off.
    missing = x.new_zeros(*x.shape[:dim], max(sizes) - x.shape[dim], *x.shape[dim + 1 :])
    full = torch.cat([x, missing], dim=dim).contiguous()
    parts = [torch.empty_like(full) for _ in sizes]
    dist.all_gather(parts, full, group=group)
    return [part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], sizes


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup, factor: int) -> Tensor:
        parts, sizes = _parts(x.detach(), dim, group)
        ctx.own = (dim, sum(sizes[: group.rank()]), x.shape[dim], factor)
        return torch.cat(parts, dim=dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dim, start, size, factor = ctx.own
        return grad.narrow(dim, start, size) * factor, None, None, None
