"""Adam for parameters of which a step touches few rows.

Adam over an item table takes time in proportion to all its rows, however few of them a step reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import number, shown, sparse_parts
from ensemble_kd.training.gradients import merge_rows


def _parameters(params: Any) -> list[Any]:
    """Tensors, or the groups of any optimizer."""
    given = list(params) if isinstance(params, Iterable) and not isinstance(params, Tensor) else []
    if not given or not all(isinstance(p, Tensor | dict | tuple) for p in given):
        raise EnsembleKDError("RowAdamW", "params, a list of tensors", shown(params), "Pass model.parameters().")
    return given


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

    Raises:
        EnsembleKDError: an argument that cannot be used.

    Examples:
        >>> from ensemble_kd.stacking import take_rows
        >>> table = torch.nn.Parameter(torch.zeros(1, 1000, 2))
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
        where = "RowAdamW"
        lr, eps = number(where, "lr", lr, least=0), number(where, "eps", eps, least=0)
        weight_decay = number(where, "weight_decay", weight_decay, least=0)
        if not (isinstance(betas, tuple | list) and len(betas) == 2):
            raise EnsembleKDError(where, "betas, two numbers in [0, 1)", shown(betas), "Pass (0.9, 0.999).")
        first, second = (number(where, "betas", beta, least=0, below=1) for beta in betas)
        betas = (first, second)
        params = _parameters(params)
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
        index, g = sparse_parts(grad)
        at = tuple(index)
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
