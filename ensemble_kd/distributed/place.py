"""Several processes that train one model: which of them holds what, and what they tell each other.

Processes along the *data* dimension hold other rows of the same batch, those along the *member* dimension other
members of the ensemble. Every term is a mean over its own things (targets, attributed positions, sequences), so a
process's mean counts by its share of them, and the mean of the processes' gradients is that of the whole batch.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from ensemble_kd.errors import EnsembleKDError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
S = TypeVar("S", bound=Mapping[str, Any])
R = TypeVar("R", Tensor, tuple[Tensor, ...])


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that ``torchrun`` started, for a block; nothing happens in a process that stands alone.

    On one machine, restarted processes meet under a name of their own: torchrun's store still holds the addresses of
    those that were killed. On several, start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for the same.

    Examples:
        >>> with process_group():
        ...     Ranks.world().size
        1
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # machines; several need not count restarts alike
        store = dist.PrefixStore(f"start {_restarts()}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        gc.collect()  # sharded models first: without, 4 of 49 runs aborted at the interpreter's end; with it, 0 of 35
        dist.destroy_process_group()


def restarted() -> bool:
    """Whether ``torchrun --max-restarts`` has started any of the processes anew, so that their run is to be resumed.

    All processes ask together.

    Examples:
        >>> restarted()
        False
    """
    most = torch.tensor(_restarts())
    if dist.is_available() and dist.is_initialized():
        most = most.to(_host(None))
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return bool(most > 0)


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@dataclass(frozen=True, eq=False)
class Ranks:
    """Where this process stands among those that train one model. Alone, as by default, every method does nothing.

    Args:
        data: processes that hold other rows of the same batch; None: there are none.
        member: processes that hold other members; None: there are none.
        sharded: between steps each of these processes holds a share of every weight, see ``sharding``.

    Examples:
        >>> ranks = Ranks()
        >>> ranks.size, ranks.is_first, ranks.gather_rows(torch.ones(2, 3), dim=1).shape
        (1, True, torch.Size([2, 3]))
    """

    data: ProcessGroup | None = None
    member: ProcessGroup | None = None
    sharded: bool = False

    @classmethod
    def of(cls, mesh: DeviceMesh | None) -> Ranks:
        """The place in a mesh of all processes, with dimensions named "data", "member" or both.

        Raises:
            EnsembleKDError: a mesh of other dimensions, or of some of the processes.
        """
        if mesh is None:
            return cls()
        names = mesh.mesh_dim_names or ()
        fix = 'Use init_device_mesh("cpu", (2, 3), mesh_dim_names=("data", "member")).'
        if not names or not set(names) <= {"data", "member"}:
            raise EnsembleKDError("mesh", "dimensions named 'data', 'member' or both", names, fix)
        if mesh.size() != dist.get_world_size():
            raise EnsembleKDError("mesh", f"all {dist.get_world_size()} processes", mesh.size(), fix)
        groups = {name: mesh.get_group(name) for i, name in enumerate(names) if mesh.size(i) > 1}
        return cls(groups.get("data"), groups.get("member"))

    @classmethod
    def world(cls) -> Ranks:
        """All processes along the data dimension, where ``torch.distributed`` is initialised."""
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls(data=dist.group.WORLD if together else None)

    def __deepcopy__(self, _: object) -> Ranks:
        return self

    @property
    def data_size(self) -> int:
        """W, over how many processes the rows of a batch are spread."""
        return 1 if self.data is None else self.data.size()

    @property
    def member_size(self) -> int:
        """Over how many processes the members are spread."""
        return 1 if self.member is None else self.member.size()

    def own_members(self, n: int) -> range:
        """Which of n members this process holds.

        Raises:
            EnsembleKDError: they cannot be spread evenly.
        """
        if n % self.member_size:
            fix = "Every process holds as many members: change n, or the mesh."
            raise EnsembleKDError("mesh", f"n in multiples of {self.member_size}", n, fix)
        each = n // self.member_size
        first = 0 if self.member is None else self.member.rank() * each
        return range(first, first + each)

    def require_whole(self, where: str) -> None:
        """Refuse what needs every weight in one process.

        Raises:
            EnsembleKDError: other processes hold some.
        """
        if self.sharded:
            fix = "Load the run's best.pt into a model of one process, without shard."
            raise EnsembleKDError(where, "a model with all its weights here", "weights in shards", fix)
        if self.member is not None:
            fix = "Load the run's best.pt into a model without a mesh, in one process."
            raise EnsembleKDError(where, "a model with all its members here", "members in other processes", fix)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.data_size * self.member_size

    @property
    def rank(self) -> int:
        """This process among all, from 0."""
        return 0 if self.size == 1 else dist.get_rank()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return all(group is None or group.rank() == 0 for group in (self.data, self.member))

    @property
    def part(self) -> tuple[int, int]:
        """(rank, W) along the data dimension: of the rows of a batch, every W-th is this process's."""
        return (0 if self.data is None else self.data.rank()), self.data_size

    def own(self, rows: R) -> R:
        """Those of the rows that are this process's: every W-th, so that lengths are spread evenly."""
        return rows if self.data is None else rows[self.data.rank() :: self.data.size()]

    def shares(self, *counts: Tensor | int) -> Tensor:
        """What this process's means count, (k,): count · W / count of all, so that the mean over processes is exact."""
        device = next((count.device for count in counts if isinstance(count, Tensor)), None)
        own = torch.stack([torch.as_tensor(count, dtype=torch.float64, device=device) for count in counts])
        every = own.clone()
        dist.all_reduce(every, group=self.data)
        return own * self.data_size / every.clamp(min=1)

    def gather_rows(self, x: Tensor, dim: int) -> Tensor:
        """The rows of all processes along ``dim``, which may differ in number.

        The gradient flows to a process's own rows, × W: every process computes the same loss of them, and the
        gradients are averaged over processes.
        """
        if self.data is None:
            return x
        return _Gather.apply(x, dim, self.data, self.data_size)  # type: ignore[no-any-return, no-untyped-call]

    def gather_members(self, x: Tensor, dim: int = 0) -> Tensor:
        """What the members of all processes have, along ``dim``; the gradient flows to a process's own."""
        return x if self.member is None else _Gather.apply(x, dim, self.member, 1)  # type: ignore[no-untyped-call]

    def sum_members_(self, x: Tensor) -> Tensor:
        """The sum over the processes that hold other members, in place."""
        if self.member is not None:
            dist.all_reduce(x, group=self.member)
        return x

    def mean_members(self, x: Tensor) -> Tensor:
        """The mean of the processes' means over members, without a gradient."""
        return x if self.member is None else self.sum_members_(x.detach().clone()) / self.member_size

    def same_draws(self, generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
        """A generator that is the same for all who hold members of the same rows: they are shown the same views."""
        if self.member is None or generator is not None:
            return generator
        seed = torch.randint(1 << 62, (), device=_host(self.member))
        dist.broadcast(seed, group=self.member, group_src=0)
        return torch.Generator(device).manual_seed(int(seed))

    def reduced(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each term as the mean over processes that hold other rows, and the sum over those with other members."""
        if self.size == 1 or not terms:
            return dict(terms)
        values = torch.stack([value.detach().double() for value in terms.values()])
        if self.data is not None:
            dist.all_reduce(values, group=self.data)
        self.sum_members_(values)
        return dict(zip(terms, values / self.data_size, strict=True))

    def sum_rows(self, x: Tensor) -> Tensor:
        """The sum over the processes that hold other rows; of a tensor on the CPU."""
        if self.data is None:
            return x
        moved = x.to(_host(self.data), copy=True)
        dist.all_reduce(moved, group=self.data)
        return moved.to(x.device)

    def gather_states(self, state: S) -> S | None:
        """A state dict of all members and shares, on the CPU, in the process that writes; None in the others.

        Its tensors with dimensions have the member axis first, as those of models and optimizers do.
        """
        if self.member is None and not self.sharded:
            return state if self.is_first else None
        if self.member is not None and self.data is not None and self.data.rank() > 0:
            return None
        whole = _each_tensor(state, self._gather_shards if self.sharded else self._gather_state)
        return whole if self.is_first else None

    def _gather_shards(self, x: Tensor) -> Tensor:
        full = whole(x)
        return full.cpu() if self.is_first else x

    def _gather_state(self, x: Tensor) -> Tensor:
        assert self.member is not None
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.member_size)] if self.is_first else None
        dist.gather(x, parts, group=self.member, group_dst=0)
        return x if parts is None else torch.cat([part.cpu() for part in parts])

    def own_states(self, state: S) -> S:
        """This process's members of a state dict of all."""
        if self.member is None:
            return state
        return _each_tensor(state, lambda x: x[list(self.own_members(len(x)))])  # type: ignore[no-any-return]

    def agree(self, value: bool) -> bool:
        """What the first process says: clocks and folders may tell each something else."""
        if self.size == 1:
            return value
        told = torch.tensor(int(value), device=_host(dist.group.WORLD))
        dist.broadcast(told, 0)
        return bool(told)

    def gather_objects(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def __str__(self) -> str:
        return f"{self.data_size} data x {self.member_size} member"


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A state dict with each tensor that has dimensions changed, in the same order everywhere."""
    if isinstance(value, Mapping):
        return {name: _each_tensor(below, change) for name, below in value.items()}
    if isinstance(value, list):
        return [_each_tensor(below, change) for below in value]
    return change(value) if isinstance(value, Tensor) and value.ndim else value


def whole(x: Tensor) -> Tensor:
    """The tensor of which each process holds a share, or a plain tensor as it is; all processes ask together."""
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found


def beside(x: Tensor, other: Tensor) -> Tensor:
    """A tensor that is the same in all processes, to compute with ``other``, which may be in shards."""
    if not hasattr(other, "device_mesh"):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(x, other.device_mesh, [Replicate()], run_check=False)


def mean_sparse(grad: Tensor, group: ProcessGroup) -> Tensor:
    """The mean over processes of sparse gradients, each with rows of its own: the rows of all, side by side.

    Args:
        grad: (n, r, \\*rest) with two sparse dimensions.
        group: the processes.
    """
    index = gather(grad._indices(), 1, group)
    values = gather(grad._values(), 0, group) / group.size()
    return torch.sparse_coo_tensor(index, values, grad.shape, check_invariants=False)


def gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The tensors of all processes side by side along ``dim``, where their sizes may differ; without a gradient."""
    return torch.cat(_parts(x, dim, group)[0], dim=dim)


def _host(group: ProcessGroup | None) -> torch.device:
    """Where the host's own numbers travel: the CPU, unless the group has no backend for it."""
    return torch.device("cpu" if "cpu:" in dist.get_backend_config(group) else "cuda")


def _shapes(x: Tensor, group: ProcessGroup) -> list[list[int]]:
    own = torch.tensor(x.shape, device=_host(group))
    found = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(found, own, group=group)
    return [shape.tolist() for shape in found]


def _parts(x: Tensor, dim: int, group: ProcessGroup) -> tuple[list[Tensor], list[int]]:
    shapes = _shapes(x, group)
    sizes = [shape[dim] for shape in shapes]
    rest = [[*shape[:dim], *shape[dim + 1 :]] for shape in shapes]
    if any(other != rest[0] for other in rest):
        fix = "Pad the rows of all processes to one length, as ranks.own of one batch are."
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
