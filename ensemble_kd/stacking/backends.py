"""Two ways to run the members, one call per member (the loop) or one call for all (vmap), and the choice between them.

Both work on templates: modules without weights, which are filled for a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import is_transformed, own_buffers, without_fast_path
from ensemble_kd.stacking.tree import filled

Backend = Literal["auto", "vmap", "loop"]
_NONE: Mapping[str, bool] = {}


def call_one(
    template: nn.Module,
    parameters: dict[str, Tensor],
    buffers: dict[str, Tensor],
    args: tuple[Tensor, ...],
    options: Mapping[str, bool] = _NONE,
) -> Tensor:
    """Return the output of one member, whose buffers are views of the stack's."""
    values = {**parameters, **buffers}
    output: Tensor
    if torch.compiler.is_compiling():  # which knows this way to fill a module
        output = functional_call(template, values, args, dict(options), tie_weights=False)
    else:
        with filled(template, values):
            output = template(*args, **options)
    for name, view in buffers.items():
        if values[name] is not view:  # forward put a new tensor into the buffer's place: keep it
            _overwrite(name, view, values[name])
    return output


def call_each(
    templates: Sequence[nn.Module],
    parameters: dict[str, Tensor],
    stacked: dict[str, Tensor],
    args: tuple[Tensor, ...],
    options: Mapping[str, bool] = _NONE,
) -> list[Tensor]:
    """Return the members' outputs from stacked values, each from a call of its own."""
    parts: dict[int, tuple[Tensor, ...]] = {}
    for p in parameters.values():  # a tied one is unbound once, and its gradient stacked once
        if id(p) not in parts:
            parts[id(p)] = p.unbind(0)
    return [
        call_one(
            template,
            {name: parts[id(p)][i] for name, p in parameters.items()},
            {name: b[i] for name, b in stacked.items()},
            args,
            options,
        )
        for i, template in enumerate(templates)
    ]


def call_all(
    template: nn.Module, parameters: dict[str, Tensor], stacked: dict[str, Tensor], args: tuple[Tensor, ...]
) -> Tensor:
    """Return the outputs of all members from one call of ``torch.vmap`` over their stacked values."""

    def one(
        parameters: dict[str, Tensor], buffers: dict[str, Tensor], *inputs: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        values = {**parameters, **buffers}
        output: Tensor = functional_call(template, values, inputs, tie_weights=False)
        return output, {name: values[name] for name, b in buffers.items() if values[name] is not b}

    in_dims = (0, 0) + (None,) * len(args)
    with without_fast_path(), _no_batched_state(template):
        run = torch.vmap(one, in_dims=in_dims, randomness="different")
        output, replaced = run(parameters, stacked, *args)
    for name, value in replaced.items():
        _overwrite(name, stacked[name], value)
    return output


def decide(
    asked: Backend,
    members: int,
    device: str,
    obstacle_to_vmap: Callable[[], str | None],
    seconds: Callable[[], tuple[float, float]],
) -> tuple[Literal["vmap", "loop"], str]:
    """Return the backend that serves, and why it was chosen.

    Args:
        asked: by the user.
        members: their number.
        device: its kind.
        obstacle_to_vmap: finds out why vmap cannot serve; called where the answer matters.
        seconds: measures a call of the loop and one of vmap; called if either could serve.

    Raises:
        EnsembleKDError: "vmap" was asked for, and there is an obstacle.
    """
    if asked == "loop":
        return "loop", "asked for"
    if asked == "auto" and device == "cpu":
        return "loop", "on a CPU the loop is faster than vmap"
    if members == 1 and asked == "auto":
        return "loop", "there is one member"
    obstacle = obstacle_to_vmap()
    if asked == "vmap":
        if obstacle is None:
            return "vmap", "asked for"
        fix = 'Use backend="loop" (or "auto"), which runs any encoder.'
        raise EnsembleKDError("backend='vmap'", "an encoder that torch.vmap can run", obstacle, fix)
    if obstacle is not None:
        return "loop", f"vmap cannot serve: {obstacle}"
    loop, vmap = seconds()
    if vmap < loop:
        return "vmap", f"vmap agrees with the loop, and took {vmap * 1e3:.2g} ms to its {loop * 1e3:.2g} ms"
    return "loop", f"the loop took {loop * 1e3:.2g} ms to vmap's {vmap * 1e3:.2g} ms"


def _overwrite(name: str, buffer: Tensor, value: Tensor) -> None:
    """Keep the tensor that forward has put into a buffer's place."""
    if value.shape != buffer.shape:
        fix = "Keep a tensor that grows as a plain attribute instead."
        got = f"{name!r} from {tuple(buffer.shape)} to {tuple(value.shape)}"
        raise EnsembleKDError("encoder", "buffers that keep their shape", got, fix)
    buffer.data.copy_(value.detach())


@contextmanager
def _no_batched_state(template: nn.Module) -> Iterator[None]:
    """Afterwards, undo what forward stored in attributes under vmap (caches, attention weights): its use is over."""
    before = [(space, dict(space)) for child in template.modules() for space in (vars(child), own_buffers(child))]
    try:
        yield
    finally:
        for space, old in before:
            for name in [k for k, v in space.items() if isinstance(v, Tensor) and is_transformed(v)]:
                if name in old:
                    space[name] = old[name]
                else:
                    del space[name]
