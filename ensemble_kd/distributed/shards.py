"""Weights, gradients and Adam's moments that are too many for one device: each process keeps a share of every tensor.

The engine is torch's ``fully_shard``: a step gathers all weights, and gives back all but the process's own share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ensemble_kd.distributed.place import Ranks
from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.errors import EnsembleKDError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def shard(model: EnsembleKD) -> EnsembleKD:
    """Leave this process a share of the model's weights; ``fit`` then trains on its rows of each batch.

    For item tables of which four copies (weights, gradients, Adam's two moments) do not fit a device. Between steps a
    process of W holds a W-th of each; within a step all weights and their gradients once. Gradients are those of one
    process on the whole batch, as without shards. With ``negatives=k`` gradients are dense: the rows that a step leaves
    out move by Adam's momentum, and the cost of a step grows with the table.

    Call it where ``torch.distributed`` is initialised, on the device where the model is to be trained, before
    optimizers are made; in a process that stands alone nothing happens. best.pt and last.pt of ``fit`` hold all
    weights. What else than ``loss`` reads weights goes into ``with gathered(model):``; ``evaluate`` does so itself.

    Args:
        model: changed in place: its parameters become ``DTensor``.

    Returns:
        The same model.

    Raises:
        EnsembleKDError: the model's members are spread over processes (``mesh``).

    Examples:
        >>> from ensemble_kd.encoders import SASRec
        >>> model = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=10), n=2)
        >>> shard(model) is model
        True
    """
    ranks = Ranks.world()
    if model.ranks.member is not None:
        fix = "Build the model without a mesh, or spread its members and leave their tables whole."
        raise EnsembleKDError("shard", "a model with all its members here", "members in other processes", fix)
    if ranks.size == 1 or model.ranks.sharded:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    def placed(p: nn.Parameter) -> Shard:
        even = [dim for dim in range(1, p.ndim) if p.shape[dim] % ranks.size == 0]  # dimension 0 alone may be uneven
        return Shard(max(even, key=lambda dim: p.shape[dim], default=0))

    fully_shard(model, mesh=init_device_mesh(model.device.type, (ranks.size,)), shard_placement_fn=placed)
    register_fsdp_forward_method(cast(nn.Module, model), "loss")
    model.ranks = replace(ranks, sharded=True)
    return model


@contextmanager
def gathered(model: EnsembleKD) -> Iterator[None]:
    """Within the block every process has all weights, to evaluate and to recommend by; nothing to do without shards.

    Examples:
        >>> from ensemble_kd.encoders import SASRec
        >>> import torch
        >>> model = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=10), n=2)
        >>> with gathered(model):
        ...     model.recommend(torch.tensor([[1, 2]]), k=3).items.shape
        torch.Size([1, 3])
    """
    if not model.ranks.sharded:
        yield
        return
    parts = cast("FSDPModule", model)
    parts.unshard()
    try:
        yield
    finally:
        parts.reshard()


def own_shards(state: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Any]:
    """This process's shares of a state dict of whole tensors; ``like`` has their placements under the same names."""
    return {name: _placed(value, like[name]) if name in like else value for name, value in state.items()}


def own_moments(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """This process's shares of an optimizer's state dict, whose tensors are placed as their parameters are."""
    each = {
        i: {name: _placed(value, parameters[i]) for name, value in moments.items()}
        for i, moments in state["state"].items()
    }
    return {**state, "state": each}


def _placed(value: Any, like: Tensor) -> Any:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value  # a step count, say
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
