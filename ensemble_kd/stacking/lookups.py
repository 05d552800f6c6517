"""Tables of which a step touches few rows: sparse gradients, and Adam for the touched rows alone.

A dense gradient of an item table, and Adam over it, cost time in proportion to all its rows, however few a step reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

from ensemble_kd.stacking.stack import StackedModule


def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """The same rows of every member's table; the table's gradient is sparse and holds these rows alone.

    Args:
        table: (n, r, \\*rest).
        rows: (c,) int64 in [0, r).

    Returns:
        (n, c, \\*rest).

    Examples:
        >>> table = torch.zeros(2, 1000, 4, requires_grad=True)
        >>> take_rows(table, torch.tensor([7, 9, 7])).sum().backward()
        >>> table.grad.is_sparse, len(table.grad.coalesce().values())
        (True, 4)
    """
    members = torch.arange(len(table), device=rows.device)[:, None]
    return _Take.apply(table, members, rows, None)  # type: ignore[no-any-return, no-untyped-call]


class _Take(torch.autograd.Function):
    """``table[members, rows]``; where members is None, ``table[rows]`` of one member's own table (r, \\*rest)."""

    @staticmethod
    def forward(table: Tensor, members: Tensor | int | None, rows: Tensor, padding: int | None) -> Tensor:
        if isinstance(members, Tensor):
            keys, table = members * table.shape[1] + rows, table.flatten(0, 1)
        else:
            keys, table = rows, table if members is None else table[members]
        return table.index_select(0, keys.flatten()).view(*keys.shape, *table.shape[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        table, members, rows, ctx.padding = inputs
        ctx.shape, ctx.is_alone = table.shape, members is None
        if not isinstance(members, Tensor):
            members = torch.full_like(rows, members or 0)
        ctx.save_for_backward(members, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        members, rows = torch.broadcast_tensors(*ctx.saved_tensors)
        index = torch.stack([members.flatten(), rows.flatten()])[int(ctx.is_alone) :]
        values = grad.reshape(index.shape[1], *ctx.shape[len(index) :])
        if ctx.padding is not None:
            where = (index[-1] == ctx.padding).view(-1, *[1] * (values.ndim - 1))
            values = values.masked_fill(where, 0)
        return torch.sparse_coo_tensor(index, values, ctx.shape, check_invariants=False), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], table: Tensor, members: None, rows: Tensor, padding: int | None
    ) -> tuple[Tensor, int]:
        """All members at once, from the stacked table itself: it is neither sliced nor copied."""
        assert in_dims[0] == 0
        rows = rows[None] if in_dims[2] is None else rows.movedim(in_dims[2], 0)
        each = torch.arange(info.batch_size, device=rows.device).view(-1, *[1] * (rows.ndim - 1))
        return _Take.apply(table, each, rows, padding), 0  # type: ignore[no-untyped-call]


def inner_rows(table: Tensor) -> Tensor:
    """All rows but the first and the last, padding's and [mask]'s: (n, v + 2, d) -> (n, v, d), a view.

    As a slice its gradient would pass over the table twice.

    Examples:
        >>> table = torch.zeros(1, 4, 1, requires_grad=True)
        >>> inner_rows(table).sum().backward()
        >>> table.grad.flatten()
        tensor([0., 1., 1., 0.])
    """
    return share_table(table)[1]


def share_table(table: Tensor) -> tuple[Tensor, Tensor]:
    """A table that both look-ups and a product read: itself for ``sparse_lookups``, and its inner rows.

    Summed by autograd, each sparse gradient of a look-up would cost a copy of the product's dense one. Here the sparse
    ones meet first, and then go into the dense one in place.

    Examples:
        >>> table = torch.zeros(1, 4, 1, requires_grad=True)
        >>> lookups, inner = share_table(table)
        >>> (take_rows(lookups, torch.tensor([0, 1, 1])).sum() + inner.sum()).backward()
        >>> table.grad.flatten()
        tensor([1., 3., 1., 0.])
    """
    return _Share.apply(table)  # type: ignore[no-any-return, no-untyped-call]


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return table.view_as(table), table[:, 1:-1]

    @staticmethod
    def backward(ctx: Any, lookups: Tensor | None, inner: Tensor | None) -> Tensor | None:
        if inner is None:
            return lookups
        edge = inner.new_zeros(inner.shape[0], 1, inner.shape[2])
        grad = torch.cat([edge, inner, edge], dim=1)
        return grad if lookups is None else grad.add_(lookups)


@contextmanager
def sparse_lookups(
    encoder: StackedModule, *, at_least: int, shared: tuple[Tensor, Tensor] | None = None
) -> Iterator[None]:
    """Within the block, embeddings of ``at_least`` rows or more get sparse gradients.

    ``shared`` is one of the encoder's stacked tables and what look-ups are to read in its place, see ``share_table``.

    Only their look-ups change: what else an encoder does with such a weight (a product with it, say) adds a dense
    gradient, and the sum is right, but dense. So are the gradients of embeddings with a ``forward`` of their own,
    ``max_norm`` or ``scale_grad_by_freq``, and of tables that are no ``nn.Embedding``.
    """
    changed: list[nn.Module] = []
    try:
        for i, template in enumerate(encoder._templates):
            for path, module in template.named_modules():
                if not isinstance(module, nn.Embedding) or module.num_embeddings < at_least:
                    continue
                table = encoder.stacked_parameter(f"{path}.weight".lstrip("."))
                if shared is not None and table is shared[0]:
                    table = shared[1]
                plain = type(module).forward is nn.Embedding.forward and "forward" not in vars(module)
                if table is not None and plain and module.max_norm is None and not module.scale_grad_by_freq:
                    vars(module)["forward"] = partial(_look_up, module, table, i)
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _look_up(module: nn.Embedding, table: Tensor, member: int, ids: Tensor) -> Tensor:
    if is_batchedtensor(module.weight):  # vmap's slice of the table
        return _Take.apply(module.weight, None, ids, module.padding_idx)  # type: ignore[no-any-return, no-untyped-call]
    return _Take.apply(table, member, ids, module.padding_idx)  # type: ignore[no-any-return, no-untyped-call]


def merge_rows(grad: Tensor) -> Tensor:
    """A sparse gradient (n, r, \\*rest) with each row's parts added up.

    On a CPU every row stands in it once. An accelerator would have to report their number to the host, so there the
    first of equal rows holds the sum, and the others hold 0.
    """
    return grad.coalesce() if grad.device.type == "cpu" else _merge_in_place(grad)


def _merge_in_place(grad: Tensor) -> Tensor:
    index, values = grad._indices(), grad._values()
    keys, order = (index[0] * grad.shape[1] + index[1]).sort(stable=True)
    values = torch.zeros_like(values).index_add_(0, torch.searchsorted(keys, keys), values[order])
    return torch.sparse_coo_tensor(index[:, order], values, grad.shape, check_invariants=False)


def member_norms(grad: Tensor) -> Tensor:
    """The norm of each member's gradient, (n,); of a sparse one after ``merge_rows``.

    Examples:
        >>> member_norms(torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]]).to_sparse(2))
        tensor([5., 1.])
    """
    if not grad.is_sparse:
        norms = torch.linalg.vector_norm(grad, dim=tuple(range(1, grad.ndim))) if grad.ndim > 1 else grad.abs()
        return norms.float()
    values = grad._values().float()
    squares = values.square().sum(tuple(range(1, values.ndim))) if values.ndim > 1 else values.square()
    return torch.zeros(len(grad), device=grad.device).index_add_(0, grad._indices()[0], squares).sqrt()


class RowAdamW(torch.optim.AdamW):
    """AdamW that updates only the touched rows of a parameter (n, r, \\*rest) whose gradient is sparse.

    Each row has an Adam of its own that counts only the steps that touch the row: its moments and its weight decay
    rest meanwhile, and its bias correction follows its own count. ``torch.optim.AdamW`` would move an untouched row on
    by momentum; ``torch.optim.SparseAdam`` corrects by the count of all steps, so that the first step of a rare row is
    up to three times as long as that of a frequent one. Dense gradients are left to ``torch.optim.AdamW``.

    Args:
        params: as of any optimizer.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled.

    Examples:
        >>> table = nn.Parameter(torch.zeros(1, 1000, 2))
        >>> optimizer = RowAdamW([table], lr=0.1)
        >>> take_rows(table, torch.tensor([5])).sum().backward()
        >>> optimizer.step()
        >>> table.detach()[0, 4:6]
        tensor([[ 0.0000,  0.0000],
                [-0.1000, -0.1000]])
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # a GradScaler is to unscale the gradients itself, the sparse ones too

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters; ``closure`` may compute the loss and the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                by_rows = "step" in self.state[p] and self.state[p]["step"].ndim > 0
                if by_rows and not grad.is_sparse:
                    grad = grad.to_sparse(2)
                elif grad.is_sparse and self.state[p] and not by_rows:  # dense before: it goes on so
                    p.grad = grad = grad.to_dense()
                if grad.is_sparse:
                    self._step_rows(p, grad, group)
                    sparse.append((p, p.grad))
                    p.grad = None
        super().step()
        for p, grad in sparse:
            p.grad = grad
        return loss

    def _step_rows(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.zeros(p.shape[:2], dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        grad = merge_rows(grad)
        at, g = tuple(grad._indices()), grad._values()
        if not grad.is_coalesced():  # equal rows are to write the same value
            keys = at[0] * p.shape[1] + at[1]
            g = g[torch.searchsorted(keys, keys)]
        step = state["step"][at] + 1
        mean = state["exp_avg"][at].lerp_(g, 1 - beta1)
        square = state["exp_avg_sq"][at].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        state["step"][at], state["exp_avg"][at], state["exp_avg_sq"][at] = step, mean, square
        step = step.to(g.dtype).view(-1, *[1] * (g.ndim - 1))
        # 1 - beta ** step, which in float32 would be wrong in its fifth digit at the first step.
        correction1, correction2 = (-torch.expm1(step * math.log(beta)) for beta in (beta1, beta2))
        denominator = square.div_(correction2).sqrt_().add_(group["eps"])
        moved = p[at].mul_(1 - group["lr"] * group["weight_decay"])
        p[at] = moved.addcdiv_(mean.div_(correction1), denominator, value=-group["lr"])
