"""Trials of both backends on a stack's own members: whether vmap agrees with the loop, and which of them is faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ensemble_kd.errors import first_line
from ensemble_kd.internal import seeded
from ensemble_kd.stacking.backends import call_all, call_each
from ensemble_kd.stacking.templates import Templates

_ROUNDS = 3  # of a measurement, after one that warms up
_LEAST = 1e-2  # share of the largest gradient below which a parameter's gradient may be rounding alone


class Trial(NamedTuple):
    """The members and inputs that both backends are tried on, each run under a seed of its own."""

    templates: Templates
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]  # stacked; every run has copies
    args: tuple[Tensor, ...]

    def looped(self, training: bool) -> Tensor:
        """Return the members' outputs from the loop."""
        with seeded(0), self.templates.lend(training=training) as lent:
            return torch.stack(call_each(lent, self.parameters, _copied(self.buffers), self.args))

    def vectorised(self, training: bool) -> Tensor:
        """Return the members' outputs from vmap."""
        with seeded(0), self.templates.lend(training=training) as lent:
            return call_all(lent[0], self.parameters, _copied(self.buffers), self.args)

    def gradients(self, output: Tensor) -> list[Tensor | None]:
        """Return the gradients of a weighted sum of the outputs, with weights of no regularity."""
        trained = [p for p in {id(p): p for p in self.parameters.values()}.values() if p.requires_grad]
        if not trained or not output.requires_grad:
            return []
        # Plain sums would hide a lot: those of a LayerNorm's outputs are the same whatever its input is.
        weights = torch.arange(1.0, output.numel() + 1, device=output.device).mul_(2.4).sin_().view_as(output)
        found = torch.autograd.grad((output * weights.to(output.dtype)).sum(), trained, allow_unused=True)
        return [x.to_dense() if x is not None and x.is_sparse else x for x in found]


def vmap_obstacle(trial: Trial, *, training: bool) -> str | None:
    """Return why vmap cannot run the members on these inputs as the loop does; None if it can.

    Outputs are compared in evaluation mode, since dropout draws other numbers under vmap. In training mode gradients
    are compared too, and a backward pass with dropout has to run.
    """
    with torch.inference_mode(False):
        trial = trial._replace(args=tuple(a.clone() for a in trial.args))  # normal tensors, also in inference mode
        # The loop first: what it raises is the encoder's own error, and no matter of vmap.
        with torch.no_grad():
            trial.looped(training)
            expected = trial.looped(False)
        grads: list[list[Tensor | None]] = []
        try:
            if training:
                with torch.enable_grad():
                    trial.gradients(trial.vectorised(True))
                    grads = [trial.gradients(run(False)) for run in (trial.vectorised, trial.looped)]
            with torch.no_grad():
                got = trial.vectorised(False)
        except Exception as error:  # whatever an encoder of somebody else's raises under vmap
            return first_line(error)
    exact = expected.dtype in (torch.float32, torch.float64)
    bound = 1e-3 if exact and not torch.is_autocast_enabled(expected.device.type) else 5e-2
    off = _deviation([got], [expected])
    if not off <= bound:
        return f"outputs that differ from the members' own by {off:.1e} (state beside parameters and buffers?)"
    off = _deviation(*grads) if grads else 0.0
    if not off <= 2 * bound:  # a sum over more terms than an output is
        return f"gradients that differ from the loop's by {off:.1e}"
    return None


def seconds_of(trial: Trial, *, training: bool) -> tuple[float, float]:
    """Return the seconds of one call of the loop and of one of vmap: the best of a few.

    In training mode, if gradients are wanted, a call is a forward and a backward pass. If vmap fails on these inputs,
    for want of memory say, its time is infinite.
    """
    device = torch.get_device_module(trial.args[0].device.type)
    with_grad = training and torch.is_grad_enabled()

    def timed(run: Callable[[bool], Tensor]) -> float:
        device.synchronize()
        start = time.perf_counter()
        out = run(training)
        if with_grad:
            trial.gradients(out)
        device.synchronize()
        return time.perf_counter() - start

    best = [float("inf")] * 2
    for i in range(_ROUNDS + 1):
        took = [timed(trial.looped)]
        try:
            took.append(timed(trial.vectorised))
        except RuntimeError:
            return took[0], float("inf")
        if i:
            best = [min(pair) for pair in zip(best, took, strict=True)]
    return best[0], best[1]


def _deviation(found: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float:
    """Return the largest error of a tensor, over its largest value; a small tensor's, over a share of the largest."""
    sizes = [_largest(e) for e in exact]
    least = max(1e-6, _LEAST * max(sizes, default=0.0) if len(sizes) > 1 else 0.0)
    worst = 0.0
    for f, e, size in zip(found, exact, sizes, strict=True):
        error = _largest(f if e is None else e if f is None else f - e)
        worst = max(worst, error / max(size, least)) if error == error else float("inf")
    return worst


def _largest(x: Tensor | None) -> float:
    return float(x.detach().abs().max()) if x is not None and x.numel() else 0.0


def _copied(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, one buffer under two names as one copy."""
    made = {id(b): b.clone() for b in buffers.values()}
    return {name: made[id(b)] for name, b in buffers.items()}
