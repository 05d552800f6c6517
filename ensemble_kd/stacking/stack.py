"""n copies of any ``nn.Module`` as one: parameters stored once, stacked along a leading member axis.

The stacked parameters live in a tree of plain modules that mirrors the encoder's own, so ``state_dict()`` has the
encoder's own names, and optimizers, ``.to()``, clipping and checkpoints work as on any module. The members themselves
stay as weightless templates that ``torch.func.functional_call`` fills for a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.seeding import seeded
from ensemble_kd.stacking.backends import (
    Backend,
    call_all,
    call_one,
    decide,
    vmap_obstacle,
)
from ensemble_kd.stacking.build import check_members, duplicate, leave_weightless
from ensemble_kd.torch_private import (
    is_batch_norm,
    own_buffers,
    own_children,
    own_parameters,
    unsaved_buffers,
)


class StackedModule(nn.Module):
    """n modules of one architecture that run as one, on stacked parameters.

    Args:
        members: the modules; their weights are taken over (stacked), and they are left without weights of their own.
        backend: "vmap" (one vectorised call), "loop" (one call a member) or "auto".

    Shapes:
        each parameter (n, \\*shape); ``stacked(\\*args)`` gives (n, \\*output shape).

    Examples:
        >>> stacked = StackedModule([nn.Linear(2, 3), nn.Linear(2, 3)])
        >>> stacked(torch.ones(5, 2)).shape, {k: tuple(v.shape) for k, v in stacked.state_dict().items()}
        (torch.Size([2, 5, 3]), {'weight': (2, 3, 2), 'bias': (2, 3)})
    """

    def __init__(self, members: Sequence[nn.Module], *, backend: Backend = "auto") -> None:
        super().__init__()
        check_members(members)
        if backend not in ("auto", "vmap", "loop"):
            raise EnsembleKDError("backend", "'auto', 'vmap' or 'loop'", repr(backend), "Choose one of these.")
        self.requested_backend = backend
        self.decisions: dict[tuple[bool, str], tuple[str, str]] = {}
        # In a tuple, so that nn.Module does not register the templates as children of this module.
        self._templates = tuple(members)
        self._stack(members)
        for member in members:
            leave_weightless(member)
            if not member.training:  # pretrained models come in evaluation mode; a new module is in training mode
                member.train()

    def _stack(self, members: Sequence[nn.Module]) -> None:
        first = members[0]
        lookup = [dict(m.named_parameters(remove_duplicate=False)) for m in members]
        buffers = [dict(m.named_buffers(remove_duplicate=False)) for m in members]
        stacked: dict[int, Tensor] = {}
        nodes: dict[int, nn.Module] = {id(first): self}  # a module used under two names has one node under both
        at: dict[str, nn.Module] = {}
        # Into the registries by hand: the encoder's names may be those of our own methods, "member" say.
        for path, module in first.named_modules(remove_duplicate=False):
            known, prefix = id(module) in nodes and module is not first, f"{path}." if path else ""
            node = at[path] = nodes.setdefault(id(module), nn.Module())
            if path:
                parent, _, leaf = path.rpartition(".")
                own_children(at[parent])[leaf] = node
            if known:
                continue
            for name, parameter in own_parameters(module).items():
                if parameter is None:
                    continue
                if id(parameter) not in stacked:  # tied parameters are stacked once and registered under every name
                    values = torch.stack([m[prefix + name].detach() for m in lookup])
                    stacked[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                own_parameters(node)[name] = stacked[id(parameter)]  # type: ignore[assignment]
            for name, buffer in own_buffers(module).items():
                if buffer is None:
                    continue
                if id(buffer) not in stacked:
                    stacked[id(buffer)] = torch.stack([m[prefix + name].detach() for m in buffers])
                own_buffers(node)[name] = stacked[id(buffer)]
                if name in unsaved_buffers(module):
                    unsaved_buffers(node).add(name)

    def stacked_parameter(self, name: str) -> Tensor | None:
        """The stacked parameter (n, \\*shape) of a dotted name of the encoder's, None where there is none."""
        return dict(self.named_parameters(remove_duplicate=False)).get(name)

    @property
    def mixes_rows(self) -> bool:
        """Whether what a member makes of a row depends on the others now: in training, with BatchNorm."""
        return self.training and any(is_batch_norm(m) for m in self._templates[0].modules())

    def describe(self, first: int = 0) -> dict[str, str]:
        """Return the numbers and words that each module of each member was built with: a dropout rate is no parameter.

        Args:
            first: number of the first of these members in the whole ensemble.

        Examples:
            >>> StackedModule([nn.Linear(2, 3)]).describe()
            {'member 0': 'Linear(in_features=2, out_features=3)'}
        """
        found = {}
        for i, member in enumerate(self._templates, start=first):
            for path, module in member.named_modules():
                plain = ", ".join(
                    f"{name}={value!r}"
                    for name, value in sorted(vars(module).items())
                    if name != "training" and not name.startswith("_") and isinstance(value, bool | int | float | str)
                )
                found[f"member {i}{path and '.' + path}"] = f"{type(module).__qualname__}({plain})"
        return found

    def __len__(self) -> int:
        return len(self._templates)

    def train(self, mode: bool = True) -> StackedModule:
        """Set the mode of every member, as ``nn.Module.train`` does."""
        super().train(mode)
        for template in getattr(self, "_templates", ()):
            template.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackedModule:
        """Convert or move, with the buffers that a forward has registered and that are not stacked."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for template in self._templates:
            for child in template.modules():
                for name, buffer in own_buffers(child).items():
                    if buffer is not None and not buffer.is_meta:
                        own_buffers(child)[name] = fn(buffer)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and deep copies."""
        return {**self.__dict__, "_templates": tuple(duplicate(template) for template in self._templates)}

    def _values(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Stacked parameters and buffers by name, a tied one under each of its names, a module under one path alone.

        So ties hold whatever ``.to()`` made of them, and a call puts no tensor in its place twice.
        """
        parameters: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        for path, node in self.named_modules():
            prefix = f"{path}." if path else ""
            parameters.update({prefix + name: p for name, p in own_parameters(node).items() if p is not None})
            buffers.update({prefix + name: b for name, b in own_buffers(node).items() if b is not None})
        return parameters, buffers

    def member(self, i: int) -> nn.Module:
        """An ordinary module with the weights of member i, on the device of the stack; a copy."""
        if not -len(self) <= i < len(self):
            raise EnsembleKDError("member", f"an index below {len(self)}", str(i), "Count from 0.")
        module = duplicate(self._templates[i])
        parameters, buffers = self._values()
        values = {**parameters, **buffers}
        made: dict[int, Tensor] = {}
        for path, child in module.named_modules():
            prefix = f"{path}." if path else ""
            for registry in (own_parameters(child), own_buffers(child)):
                for name, tensor in registry.items():
                    if tensor is None or prefix + name not in values:  # a buffer that forward has registered
                        continue
                    source = values[prefix + name]
                    if id(source) not in made:
                        own = source.detach()[i].clone()
                        made[id(source)] = (
                            nn.Parameter(own, source.requires_grad) if registry is own_parameters(child) else own
                        )
                    registry[name] = made[id(source)]  # type: ignore[assignment]
        return module

    def forward(self, *args: Tensor) -> Tensor:
        r"""Run every member on the same arguments: (n, \*output shape)."""
        name, _ = self.backend_for(*args)
        return self.vectorised(*args) if name == "vmap" else self.looped(*args)

    def looped(self, *args: Tensor) -> Tensor:
        """Return what ``forward`` does, from one call per member."""
        return torch.stack(self.each(*args))

    def vectorised(self, *args: Tensor) -> Tensor:
        """Return what ``forward`` does, from one call of ``torch.vmap``."""
        parameters, stacked = self._values()
        return call_all(self._templates[0], parameters, stacked, args)

    def each(self, *args: Tensor) -> list[Tensor]:
        """The members' outputs one after the other, each from a call of its own."""
        parameters, buffers = self._values()
        parts: dict[int, tuple[Tensor, ...]] = {}
        for p in parameters.values():  # a tied one is unbound once, and its gradient stacked once
            if id(p) not in parts:
                parts[id(p)] = p.unbind(0)
        return [
            call_one(
                self._templates[i],
                {name: parts[id(p)][i] for name, p in parameters.items()},
                {name: b[i] for name, b in buffers.items()},
                args,
            )
            for i in range(len(self))
        ]

    def call_member(self, i: int, *args: Tensor) -> Tensor:
        """The output of member i alone."""
        parameters, buffers = self._values()
        mine, own = ({name: value[i] for name, value in values.items()} for values in (parameters, buffers))
        return call_one(self._templates[i], mine, own, args)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Run a block under its own seed; the random states, the modes and the buffers are afterwards as they were."""
        roots: tuple[nn.Module, ...] = (self, *self._templates)
        modes = [(module, module.training) for root in roots for module in root.modules()]
        buffers = [(b, b.clone()) for b in self.buffers()]
        try:
            with seeded(0):
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def backend_for(self, *args: Tensor) -> tuple[str, str]:
        """The backend that serves these inputs in the present mode, and why it was chosen.

        Raises:
            EnsembleKDError: ``backend="vmap"`` was asked for, and torch.vmap cannot run this encoder, or runs it
                wrongly.
        """
        device = args[0].device.type if args else "cpu"
        key = (self.training, device)
        if key not in self.decisions:
            self.decisions[key] = decide(
                self.requested_backend, len(self), device, lambda: self.vmap_obstacle(*(a[:2] for a in args))
            )
        return self.decisions[key]

    def vmap_obstacle(self, *args: Tensor) -> str | None:
        """Return why vmap cannot run the members on these inputs as the loop does; None if it can. Leaves no trace."""
        return vmap_obstacle(self, args)
