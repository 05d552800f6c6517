"""Weights, gradients and Adam's moments that are too many for one device: each process has a share of every tensor.

The engine is torch's ``fully_shard``: a step gathers all weights, and gives back all but the process's own share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch
from torch import nn

from ensemble_kd.distributed.place import Place
from ensemble_kd.errors import EnsembleKDError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class Placed(Protocol):
    """A model with a place among processes."""

    place: Place

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        ...


M = TypeVar("M", bound=Placed)


def shard(model: M) -> M:
    """Leave this process a share of the weights of an ``EnsembleKD``; ``fit`` then trains on its rows of each batch.

    For item tables of which four copies (weights, gradients, Adam's two moments) do not fit a device. Between steps
    each of W processes has a W-th of every tensor. Within a step it has all weights and their gradients once. Gradients
    are those of one process on the whole batch, as without shards. With ``negatives=k`` gradients are dense: the rows
    that a step leaves out move by Adam's momentum, and the cost of a step grows with the table.

    Call it where ``torch.distributed`` is initialised, on the device where the model is to be trained, before
    optimizers are made. In a process that stands alone nothing happens. best.pt and last.pt of ``fit`` contain all
    weights. Besides ``loss``, whatever reads weights goes into ``with gathered(model):``; ``evaluate`` does so itself.

    Args:
        model: changed in place: its parameters become ``DTensor``.

    Returns:
        The same model.

    Raises:
        EnsembleKDError: the model's members are spread over processes (``mesh``).

    Examples:
        >>> from ensemble_kd import EnsembleKD
        >>> from ensemble_kd.encoders import SASRec
        >>> model = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=10), n=2)
        >>> shard(model) is model
        True
    """
    place = Place.world()
    if model.place.member is not None:
        fix = "Build the model without a mesh, or spread its members and leave their tables whole."
        raise EnsembleKDError("shard", "a model with all its members here", "members in other processes", fix)
    if place.size == 1 or model.place.sharded:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    def placed(p: nn.Parameter) -> Shard:
        even = [dim for dim in range(1, p.ndim) if p.shape[dim] % place.size == 0]  # dimension 0 alone may be uneven
        return Shard(max(even, key=lambda dim: p.shape[dim], default=0))

    module, mesh = cast(nn.Module, model), init_device_mesh(model.device.type, (place.size,))
    fully_shard(module, mesh=mesh, shard_placement_fn=placed)
    register_fsdp_forward_method(module, "loss")
    model.place = replace(place, sharded=True)
    return model


@contextmanager
def gathered(model: Placed) -> Iterator[None]:
    """Give every process all weights within the block, to evaluate and to recommend; without shards, do nothing.

    Examples:
        >>> from ensemble_kd import EnsembleKD
        >>> from ensemble_kd.encoders import SASRec
        >>> import torch
        >>> model = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=10), n=2)
        >>> with gathered(model):
        ...     model.recommend(torch.tensor([[1, 2]]), k=3).items.shape
        torch.Size([1, 3])
    """
    if not model.place.sharded:
        yield
        return
    parts = cast("FSDPModule", model)
    parts.unshard()
    try:
        yield
    finally:
        parts.reshard()
