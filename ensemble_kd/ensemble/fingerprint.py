"""Values that identify a model's settings across processes, so that a run is resumed only under the same."""

from __future__ import annotations

import re
import zlib
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ensemble_kd.ensemble.model import EnsembleKD


def checksum(tensor: Tensor) -> str:
    """Return eight digits that change with a tensor's values.

    Examples:
        >>> import torch
        >>> checksum(torch.zeros(2)) == checksum(torch.zeros(1, 2)) != checksum(torch.ones(2))
        True
    """
    return f"{zlib.crc32(tensor.cpu().numpy().tobytes()):08x}"


def fingerprint(model: EnsembleKD) -> dict[str, str]:
    """Return by name what must be the same in a model for its training to go on exactly.

    Only values go in, never an object's address, so that another process with the same settings gets the same.
    """
    table = model.attribute_table
    return {
        "item_attributes": "None" if table is None else f"a table with checksum {checksum(table)}",
        "objective": without_addresses(model.objective),
        "losses": without_addresses(model.losses),
        "backend": repr(model.encoder.requested_backend),
        **{f"parameter {name}": f"{tuple(p.shape)} {p.dtype}" for name, p in model.named_parameters()},
        **model.encoder.describe(model.place.own_members(len(model))),
    }


def without_addresses(value: object) -> str:
    """Return the ``repr`` of a value without the addresses of objects."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
