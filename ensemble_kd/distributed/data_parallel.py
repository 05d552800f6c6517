"""The loss of a batch whose rows are spread over processes, with gradients averaged over them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ensemble_kd.distributed.place import mean_sparse
from ensemble_kd.ensemble import EnsembleKD, Step


class SpreadLoss:
    """``model.loss`` of this process's rows; after ``backward()`` and ``finish()`` gradients are those of all rows.

    Dense gradients are averaged by ``DistributedDataParallel`` while ``backward()`` goes on. It knows no sparse
    gradients but its own modules', so tables that may get such (``negatives=k``) are averaged by ``finish()``: the rows
    that any process has touched. In a process that stands alone, and of a model in shards, it is ``model.loss``.

    Args:
        model: its ``ranks`` say where the other rows are.
        by_length: as of ``EnsembleKD.loss``.

    Examples:
        >>> from ensemble_kd.encoders import SASRec
        >>> model = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=10), n=2)
        >>> loss = SpreadLoss(model)
        >>> loss(torch.tensor([[1, 2, 3], [3, 4, 5]])).total.backward()
        >>> loss.finish()
    """

    def __init__(self, model: EnsembleKD, *, by_length: bool = False) -> None:
        self._run: nn.Module = _Loss(model, by_length)
        self._group = None if model.ranks.sharded else model.ranks.data  # shards are averaged in backward()
        self._tables: list[Tensor] = []
        if self._group is None:
            return
        sampled = getattr(model.objective, "negatives", None) is not None
        trained = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
        tables = {name: p for name, p in trained.items() if sampled and p.ndim > 1 and p.shape[1] >= model.num_items}
        self._tables = list(tables.values())
        for table in self._tables:
            dist.broadcast(table.data, group=self._group, group_src=0)
        # The attributes are the same everywhere, and would be sent before every step.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self._run, [*tables, "model.attribute_table"]
        )
        if len(tables) < len(trained):
            # Losses may leave parameters out. It also keeps the buckets, and so the order of sums, from changing
            # after a process's first step: a resumed run is to end as one never stopped.
            self._run = DistributedDataParallel(self._run, process_group=self._group, find_unused_parameters=True)

    def __call__(self, item_ids: Tensor) -> Step:
        """The loss of checked ids (b, l)."""
        return self._run(item_ids)  # type: ignore[no-any-return]

    def finish(self) -> None:
        """Average what ``backward()`` has not."""
        for table in self._tables:
            assert self._group is not None
            if table.grad is not None and table.grad.is_sparse:
                table.grad = mean_sparse(table.grad, self._group)
            elif table.grad is not None:
                dist.all_reduce(table.grad, group=self._group)
                table.grad /= self._group.size()


class _Loss(nn.Module):
    """What ``DistributedDataParallel`` wraps: a module whose forward is the loss."""

    def __init__(self, model: EnsembleKD, by_length: bool) -> None:
        super().__init__()
        self.model, self.by_length = model, by_length
        if model.ranks.data is not None and not model.ranks.sharded:
            # Never used: DistributedDataParallel warns where it finds nothing unused.
            self.unused = nn.Parameter(torch.zeros_like(model.item_classifier.bias[0, :1]))

    def forward(self, item_ids: Tensor) -> Step:
        return self.model.loss(item_ids, validate=False, by_length=self.by_length)
