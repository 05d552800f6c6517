"""The stacked tensors, in a tree of plain modules that mirrors the encoder's own: stacked, listed, handed out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ensemble_kd.internal import own_buffers, own_children, own_parameters, unsaved_buffers


def stack_into(root: nn.Module, members: Sequence[nn.Module]) -> None:
    """Register the members' stacked tensors in ``root``, in a tree of plain modules like that of a member."""
    first = members[0]
    lookup = [dict(m.named_parameters(remove_duplicate=False)) for m in members]
    buffers = [dict(m.named_buffers(remove_duplicate=False)) for m in members]
    stacked: dict[int, Tensor] = {}
    nodes: dict[int, nn.Module] = {id(first): root}  # a module used under two names has one node under both
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


def values_of(root: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return stacked parameters and buffers by name, a tied one under each of its names, a module under one path alone.

    So ties hold whatever ``.to()`` made of them, and a call puts no tensor in its place twice.
    """
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for path, node in root.named_modules():
        prefix = f"{path}." if path else ""
        parameters.update({prefix + name: p for name, p in own_parameters(node).items() if p is not None})
        buffers.update({prefix + name: b for name, b in own_buffers(node).items() if b is not None})
    return parameters, buffers


def fill(module: nn.Module, root: nn.Module, i: int) -> None:
    """Give a template the weights and buffers of member i, as copies."""
    parameters, buffers = values_of(root)
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
