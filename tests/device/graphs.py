"""CUDA graphs of the simulated device: operations are recorded, and repeated on the same memory.

As on CUDA, a capture runs nothing that lasts: weights and random states are as before it. What the host computes
meanwhile, a learning rate say, is not repeated. An operation that waits for the device is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass
class Operation:
    """One call of a kernel: its arguments, and the tensors it made, which a repetition writes again."""

    kernel: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    draws: bool
    made: Any  # None: it writes into its arguments

    def run(self) -> None:
        found = self.kernel(*self.args, **self.kwargs)
        if self.made is not None:
            for old, new in zip(pytree.tree_leaves(self.made), pytree.tree_leaves(found), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


class Graph:
    """What ``torch.cuda.CUDAGraph`` is."""

    drawing: Callable[[], Any]  # a block that draws from the device's own generator
    random: list[Tensor]  # the state of that generator

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.own: set[int] = set()  # memory that the capture has made

    def record(self, func: Any, kernel: Any, args: Any, kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Run an operation of the capture, and keep it."""
        writes, given = func._schema.is_mutable, memory_of((args, kwargs))
        if writes:
            for at, storage in given.items():
                self.keep(at, storage)
        out = run()
        if not (func.is_view or func._schema.name.startswith("aten::empty")):
            draws = torch.Tag.nondeterministic_seeded in func.tags
            self.operations.append(Operation(kernel, args, kwargs, draws, None if writes else out))
        self.own.update(memory_of(out).keys() - given.keys())
        return out

    def keep(self, at: int, storage: torch.UntypedStorage) -> None:
        """Keep the content of memory from before the capture, before it is written to."""
        if at not in self.own and at not in self.before:
            self.before[at] = (storage, storage.clone())

    def restore(self) -> None:
        for storage, content in self.before.values():
            storage.copy_(content)
        self.before = {}

    def pool(self) -> int:
        return id(self)

    def replay(self) -> None:
        for operation in self.operations:
            with Graph.drawing() if operation.draws else nullcontext():
                operation.run()


def memory_of(tree: Any) -> dict[int, torch.UntypedStorage]:
    """Return the memory of the tensors in a tree, by address."""
    storages = [x.untyped_storage() for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]
    return {storage.data_ptr(): storage for storage in storages}


capturing: list[Graph] = []


@contextmanager
def capture(graph: Graph, *, pool: Any = None, stream: Any = None) -> Iterator[None]:
    """What ``torch.cuda.graph`` is."""
    assert not capturing
    state = Graph.random[0].clone()
    capturing.append(graph)
    try:
        yield
    finally:
        capturing.clear()
        graph.restore()
        Graph.random[0] = state
