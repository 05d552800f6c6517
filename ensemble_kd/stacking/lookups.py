"""Look-ups in tables of which a step touches few rows, with sparse gradients.

A dense gradient of an item table takes time in proportion to all its rows, however few a step reads.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_kd.internal import is_vmap_slice
from ensemble_kd.stacking.stack import StackedModule
from ensemble_kd.stacking.templates import LookUp


def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Return the same rows of every member's table. The table's gradient is sparse, with these rows alone.

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
    """``table[members, rows]``; if members is None, ``table[rows]`` of one member's own table (r, \\*rest)."""

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


def item_rows(table: Tensor, items: int) -> Tensor:
    """Return the rows after the first (padding), one per item: (n, v + 1 or more, d) -> (n, v, d), a view.

    The gradient of a slice would pass over the table twice.

    Examples:
        >>> table = torch.zeros(1, 4, 1, requires_grad=True)
        >>> item_rows(table, 2).sum().backward()
        >>> table.grad.flatten()
        tensor([0., 1., 1., 0.])
    """
    return share_table(table, items)[1]


def share_table(table: Tensor, items: int) -> tuple[Tensor, Tensor]:
    """Return a table twice: for look-ups (``sparse_lookups``), and its rows of items for a product.

    Autograd would copy the dense gradient once for every sparse look-up gradient it adds. Here the sparse gradients are
    added up first and then added to the dense one in place.

    Examples:
        >>> table = torch.zeros(1, 4, 1, requires_grad=True)
        >>> lookups, inner = share_table(table, 2)
        >>> (take_rows(lookups, torch.tensor([0, 1, 1])).sum() + inner.sum()).backward()
        >>> table.grad.flatten()
        tensor([1., 3., 1., 0.])
    """
    return _Share.apply(table, items)  # type: ignore[no-any-return, no-untyped-call]


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, items: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.rest = table.shape[1] - 1 - items
        return table.view_as(table), table[:, 1 : 1 + items]

    @staticmethod
    def backward(ctx: Any, lookups: Tensor | None, inner: Tensor | None) -> tuple[Tensor | None, None]:
        if inner is None:
            return lookups, None
        edges = [inner.new_zeros(inner.shape[0], rows, inner.shape[2]) for rows in (1, ctx.rest)]
        grad = torch.cat([edges[0], inner, edges[1]], dim=1)
        return grad if lookups is None else grad.add_(lookups), None


def sparse_lookups(
    encoder: StackedModule, *, at_least: int, shared: tuple[Tensor, Tensor] | None = None
) -> AbstractContextManager[None]:
    """Within the block, embeddings of ``at_least`` rows or more get sparse gradients from this thread's calls.

    Only the look-ups change. If an encoder uses such a weight in another way too (a product with it, say), that adds a
    dense gradient, and the sum is right, but dense. Some gradients stay dense: those of embeddings with a ``forward``
    of their own, ``max_norm`` or ``scale_grad_by_freq``, and of tables that are no ``nn.Embedding``.

    Args:
        encoder: the stack.
        at_least: rows.
        shared: one of the encoder's stacked tables, and what look-ups read in its place, see ``share_table``.

    Examples:
        >>> encoder = StackedModule([nn.Embedding(1000, 4), nn.Embedding(1000, 4)])
        >>> with sparse_lookups(encoder, at_least=1000):
        ...     encoder(torch.tensor([7])).sum().backward()
        >>> encoder.stacked_parameter("weight").grad.is_sparse
        True
    """
    tables: dict[str, Tensor] = dict(encoder.named_parameters(remove_duplicate=False))

    def reader(member: int, name: str, module: nn.Embedding) -> LookUp | None:
        if module.num_embeddings < at_least or module.max_norm is not None or module.scale_grad_by_freq:
            return None
        table = tables.get(f"{name}.weight".lstrip("."))
        if table is None:  # computed from other parameters
            return None
        return partial(_look_up, module, table if shared is None or table is not shared[0] else shared[1], member)

    return encoder.reading(reader)


def _look_up(module: nn.Embedding, table: Tensor, member: int, ids: Tensor) -> Tensor:
    if is_vmap_slice(module.weight):  # vmap's slice of the table
        return _Take.apply(module.weight, None, ids, module.padding_idx)  # type: ignore[no-any-return, no-untyped-call]
    return _Take.apply(table, member, ids, module.padding_idx)  # type: ignore[no-any-return, no-untyped-call]
