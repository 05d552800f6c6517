"""The loss of a batch whose rows are spread over processes, with gradients averaged over them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ensemble_kd.distributed.collectives import mean_sparse
from ensemble_kd.distributed.place import Place
from ensemble_kd.internal import keep_out_of_data_parallel


class SpreadLoss:
    """``model.loss`` of this process's rows; after ``backward()`` and ``finish()`` gradients are those of all rows.

    Dense gradients are averaged by ``DistributedDataParallel`` while ``backward()`` goes on. It does not average sparse
    gradients, so ``finish()`` does, for the rows that any process has touched. For a process that stands alone, and for
    a model in shards, this is ``model.loss``.

    Args:
        model: a module with a method ``loss(item_ids, **options)``.
        place: the place of this process.
        tables: names of the parameters whose gradients may be sparse.
        constant: names of the buffers that are the same everywhere, so that they need not be sent before every step.

    Examples:
        >>> from ensemble_kd import EnsembleKD
        >>> from ensemble_kd.encoders import SASRec
        >>> model = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=10), n=2)
        >>> loss = SpreadLoss(model, Place())
        >>> loss(torch.tensor([[1, 2, 3], [3, 4, 5]]), by_length=True).total.backward()
        >>> loss.finish()
    """

    def __init__(
        self, model: nn.Module, place: Place, *, tables: Collection[str] = (), constant: Collection[str] = ()
    ) -> None:
        self._group = None if place.sharded else place.data  # shards are averaged in backward()
        self._run: nn.Module = _Loss(model, spread=self._group is not None)
        self._tables: list[Tensor] = []
        if self._group is None:
            return
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._tables = [p for name, p in trained.items() if name in tables]
        for table in self._tables:
            dist.broadcast(table.data, group=self._group, group_src=0)
        ignored = [f"model.{name}" for name in (*tables, *constant)]
        keep_out_of_data_parallel(self._run, ignored)
        if len(self._tables) < len(trained):
            # Losses may leave parameters out. It also keeps the buckets, and so the order of sums, from changing
            # after a process's first step: a resumed run must end as one never stopped.
            self._run = DistributedDataParallel(self._run, process_group=self._group, find_unused_parameters=True)

    def __call__(self, item_ids: Tensor, **options: Any) -> Any:
        """Return ``model.loss(item_ids, **options)``."""
        return self._run(item_ids, **options)

    def finish(self) -> None:
        """Average the gradients that ``backward()`` has not averaged."""
        for table in self._tables:
            assert self._group is not None
            if table.grad is not None and table.grad.is_sparse:
                table.grad = mean_sparse(table.grad, self._group)
            elif table.grad is not None:
                dist.all_reduce(table.grad, group=self._group)
                table.grad /= self._group.size()


class _Loss(nn.Module):
    """The module that ``DistributedDataParallel`` wraps: its forward is the loss."""

    def __init__(self, model: nn.Module, *, spread: bool) -> None:
        super().__init__()
        self.model = model
        if spread:  # never used: DistributedDataParallel warns where it finds nothing unused
            self.unused = nn.Parameter(torch.zeros_like(next(model.parameters()).detach().flatten()[:1]))

    def forward(self, item_ids: Tensor, **options: Any) -> Any:
        return self.model.loss(item_ids, **options)  # type: ignore[operator]
