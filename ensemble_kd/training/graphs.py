"""Whole training steps as CUDA graphs: one call of the host in place of the launches of hundreds of kernels.

A graph repeats kernels on the same memory. So a step's batch is copied into memory of the graph's own, the learning
rate and the share of a schedule are tensors that are filled anew, and batches are padded to a few widths. What else a
step reads of the host, such as the terms that there are, is part of a graph's key: if it changes, another graph is
captured.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_kd.distributed import Place
from ensemble_kd.ensemble import EnsembleKD, ItemLoss, Mutual
from ensemble_kd.errors import EnsembleKDError, first_line

WARM_UP = 3  # steps of a kind that run as they are: they choose backends and build the optimizer's state
COLUMNS = 8  # batches are padded to a multiple of so many columns
MOST = 16  # kinds of steps that are kept


@dataclass
class _Kind:
    """The steps of one shape and one set of fixed settings."""

    ran: int = 0
    graph: Any = None
    batch: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class StepGraphs:
    """A training step that runs as it is a few times, is then captured, and repeated from there.

    The step must not wait for the device. It may not keep tensors that it computes, besides those it returns.

    Args:
        step: from a batch (b, l) int64 on the device, tensors () float64 there, one per number that changes, and what
            is fixed, to the terms to report, detached. It updates the weights.
        device: where the step runs, of a kind that has graphs.
        longest: columns of a batch at most, which the encoder can read.

    Raises:
        EnsembleKDError: a device without graphs.

    Examples:
        >>> StepGraphs(lambda batch: {}, torch.device("cpu"), longest=50)
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: fit: expected a CUDA device for cuda_graphs=True, got cpu. Leave \
cuda_graphs out, or move the model: model.to("cuda").
    """

    def __init__(self, step: Callable[..., Mapping[str, Tensor]], device: torch.device, *, longest: int) -> None:
        self.step, self.longest, self.module = step, longest, torch.get_device_module(device.type)
        if not hasattr(self.module, "CUDAGraph"):
            fix = 'Leave cuda_graphs out, or move the model: model.to("cuda").'
            raise EnsembleKDError("fit", "a CUDA device for cuda_graphs=True", device.type, fix)
        self.stream = self.module.Stream(device)  # autograd wants one for the first steps and the captures
        self.kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self.numbers: list[Tensor] = []  # in double precision, as Python's numbers are
        self.device = device
        self.pool: Any = None  # memory that the graphs share, since only one runs at a time

    def __call__(self, batch: Tensor, *fixed: Hashable, numbers: Sequence[float] = ()) -> dict[str, Tensor]:
        """Run a step. What is fixed is part of its graph, while numbers may change from step to step."""
        while len(self.numbers) < len(numbers):
            self.numbers.append(torch.zeros((), dtype=torch.float64, device=self.device))
        changing = self.numbers[: len(numbers)]
        for tensor, number in zip(changing, numbers, strict=True):
            tensor.fill_(number)
        width = batch.shape[1]
        batch = F.pad(batch, (min(-width % COLUMNS, self.longest - width), 0))
        kind = self._kind((*batch.shape, len(changing), *fixed))
        if kind.graph is None and kind.ran < WARM_UP:
            kind.ran += 1
            self.stream.wait_stream(self.module.current_stream())
            with self.module.stream(self.stream):
                found = dict(self.step(batch, *changing, *fixed))
            self.module.current_stream().wait_stream(self.stream)
            return found
        if kind.graph is None:
            kind.batch = batch.clone()
            self._capture(kind, *changing, *fixed)
        assert kind.batch is not None
        kind.batch.copy_(batch)
        kind.graph.replay()
        return {name: term.clone() for name, term in kind.terms.items()}  # the next one writes there

    def _kind(self, key: Hashable) -> _Kind:
        kind = self.kinds.setdefault(key, _Kind())
        self.kinds.move_to_end(key)
        if len(self.kinds) > MOST:  # the one that was not in use for longest
            self.kinds.popitem(last=False)
        return kind

    def _capture(self, kind: _Kind, *arguments: object) -> None:
        graph = self.module.CUDAGraph()
        try:
            with self.module.graph(graph, pool=self.pool, stream=self.stream):
                kind.terms = self.step(kind.batch, *arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            fix = "Leave cuda_graphs out: something in the step waits for the device, or is not allowed in a graph."
            raise EnsembleKDError("fit", "a step that a CUDA graph can capture", first_line(error), fix) from error
        kind.graph, self.pool = graph, graph.pool() if self.pool is None else self.pool


def check_graphs(model: EnsembleKD, loss: ItemLoss, place: Place) -> None:
    """Check that a graph can repeat the steps of a run.

    Raises:
        EnsembleKDError: names what has other shapes in each step, or meets other processes.
    """
    found = {
        "an objective with negatives": model.objective.negatives is not None,
        f"loss={loss!r}": not isinstance(loss, Mutual),
        f"{place.size} processes": place.size > 1,
    }
    for got, is_so in found.items():
        if is_so:
            expected = "the full softmax, loss=Mutual() and one process for cuda_graphs=True"
            raise EnsembleKDError("fit", expected, got, "Leave cuda_graphs out.")


def set_rate(optimizer: torch.optim.Optimizer, rate: float, device: torch.device | None) -> None:
    """Set the learning rate: as a number, or for graphs on a device as a tensor there, which they read in each step."""
    for group in optimizer.param_groups:
        if device is None:
            group["lr"] = rate
        elif isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"], group["capturable"] = torch.full((), rate, device=device), True
