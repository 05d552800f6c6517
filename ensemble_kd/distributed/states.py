"""State dicts of a model that is spread over processes: gathered to be written, and cut up after reading.

Tensors with dimensions have the member axis first, as those of models and optimizers do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ensemble_kd.distributed.place import Place

S = TypeVar("S", bound=Mapping[str, Any])


def gather_states(state: S, place: Place) -> S | None:
    """Return a state dict of all members and shares, on the CPU, in the process that writes; None in the others."""
    if place.member is None and not place.sharded:
        return state if place.is_first else None
    if place.member is not None and place.data_rank > 0:
        return None

    def gathered(x: Tensor) -> Tensor:
        if place.sharded:
            full = whole(x)
            return full.cpu() if place.is_first else x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(place.member_size)] if place.is_first else None
        dist.gather(x, parts, group=place.member, group_dst=0)
        return x if parts is None else torch.cat([part.cpu() for part in parts])

    found = _each_tensor(state, gathered)
    return found if place.is_first else None


def own_states(state: S, place: Place) -> S:
    """Return this process's members of a state dict of all."""
    if place.member is None:
        return state
    return _each_tensor(state, lambda x: x[list(place.own_members(len(x)))])  # type: ignore[no-any-return]


def own_shards(state: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return this process's shares of a state dict of whole tensors; ``like`` has their placements by name."""
    return {name: _placed(value, like[name]) if name in like else value for name, value in state.items()}


def own_moments(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Return this process's shares of an optimizer's state dict, whose tensors are placed as their parameters are."""
    each = {
        i: {name: _placed(value, parameters[i]) for name, value in moments.items()}
        for i, moments in state["state"].items()
    }
    return {**state, "state": each}


def whole(x: Tensor) -> Tensor:
    """Return the tensor of which each process has a share, or a plain tensor as it is; all call it together."""
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found


def beside(x: Tensor, other: Tensor) -> Tensor:
    """Return a tensor that is the same in all processes in a form to compute with ``other``, which may be in shards."""
    if not hasattr(other, "device_mesh"):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(x, other.device_mesh, [Replicate()], run_check=False)


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a state dict with each tensor that has dimensions changed, in the same order everywhere."""
    if isinstance(value, Mapping):
        return {name: _each_tensor(below, change) for name, below in value.items()}
    if isinstance(value, list):
        return [_each_tensor(below, change) for below in value]
    return change(value) if isinstance(value, Tensor) and value.ndim else value


def _placed(value: Any, like: Tensor) -> Any:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value  # a step count, say
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
