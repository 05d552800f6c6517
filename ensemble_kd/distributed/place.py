"""``Place``: who this process is among those that train one model, and which rows and members are its own.

Processes along the *data* dimension have other rows of the same batch. Processes along the *member* dimension have
other members of the ensemble.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

R = TypeVar("R", Tensor, tuple[Tensor, ...])


@dataclass(frozen=True, eq=False)
class Place:
    """The place of this process among those that train one model; the default is a process that stands alone.

    Args:
        data: the processes that have other rows of the same batch; None: there are none.
        member: the processes that have other members; None: there are none.
        sharded: between steps each of these processes has a share of every weight, see ``shard``.

    Examples:
        >>> place = Place()
        >>> place.size, place.is_first, list(place.own_members(3))
        (1, True, [0, 1, 2])
    """

    data: ProcessGroup | None = None
    member: ProcessGroup | None = None
    sharded: bool = False

    @classmethod
    def of(cls, mesh: DeviceMesh | None) -> Place:
        """Return the place in a mesh of all processes, with dimensions named "data", "member" or both.

        Raises:
            EnsembleKDError: a mesh of other dimensions, or of some of the processes.
        """
        if mesh is None:
            return cls()
        names = getattr(mesh, "mesh_dim_names", None) or ()
        fix = 'Use init_device_mesh("cpu", (2, 3), mesh_dim_names=("data", "member")).'
        if not names or not set(names) <= {"data", "member"}:
            raise EnsembleKDError("mesh", "dimensions named 'data', 'member' or both", names, fix)
        if mesh.size() != dist.get_world_size():
            raise EnsembleKDError("mesh", f"all {dist.get_world_size()} processes", mesh.size(), fix)
        groups = {name: mesh.get_group(name) for i, name in enumerate(names) if mesh.size(i) > 1}
        return cls(groups.get("data"), groups.get("member"))

    @classmethod
    def world(cls) -> Place:
        """Return the place along the data dimension of all processes, if ``torch.distributed`` is initialised."""
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls(data=dist.group.WORLD if together else None)

    def __deepcopy__(self, _: object) -> Place:
        return self

    @property
    def data_size(self) -> int:
        """W, the number of processes that the rows of a batch are spread over."""
        return 1 if self.data is None else self.data.size()

    @property
    def data_rank(self) -> int:
        """This process among those with other rows, from 0."""
        return 0 if self.data is None else self.data.rank()

    @property
    def member_size(self) -> int:
        """The number of processes that the members are spread over."""
        return 1 if self.member is None else self.member.size()

    @property
    def member_rank(self) -> int:
        """This process among those with other members, from 0."""
        return 0 if self.member is None else self.member.rank()

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.data_size * self.member_size

    @property
    def rank(self) -> int:
        """This process among all, from 0."""
        return 0 if self.size == 1 else dist.get_rank()

    @property
    def is_first(self) -> bool:
        """True in the process that writes files and reports."""
        return self.data_rank == 0 and self.member_rank == 0

    def own(self, rows: R) -> R:
        """Return this process's rows: every W-th, so that lengths are spread evenly."""
        return rows if self.data is None else rows[self.data_rank :: self.data_size]

    def own_members(self, n: int) -> range:
        """Return the numbers of this process's members, of n in all.

        Raises:
            EnsembleKDError: they cannot be spread evenly.
        """
        if n % self.member_size:
            fix = "Every process has as many members: change n, or the mesh."
            raise EnsembleKDError("mesh", f"n in multiples of {self.member_size}", n, fix)
        each = n // self.member_size
        return range(self.member_rank * each, (self.member_rank + 1) * each)

    def require_whole(self, where: str) -> None:
        """Refuse to do what needs every weight in one process.

        Raises:
            EnsembleKDError: other processes have some of the weights.
        """
        if self.sharded:
            fix = "Load the run's best.pt into a model of one process, without shard."
            raise EnsembleKDError(where, "a model with all its weights here", "weights in shards", fix)
        if self.member is not None:
            fix = "Load the run's best.pt into a model without a mesh, in one process."
            raise EnsembleKDError(where, "a model with all its members here", "members in other processes", fix)

    def __str__(self) -> str:
        return f"{self.data_size} data x {self.member_size} member"
