"""The stacked tensors, in a tree of plain modules that mirrors the encoder's own: stacked, listed, handed out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


def parameter_at(root: nn.Module, name: str) -> Tensor | None:
    """Return the parameter of a dotted name, None if there is none.

    Examples:
        >>> parameter_at(nn.Sequential(nn.Linear(2, 1, bias=False)), "0.weight").shape
        torch.Size([1, 2])
        >>> parameter_at(nn.Linear(2, 1), "bias.of.none") is None
        True
    """
    path, _, leaf = name.rpartition(".")
    node = _node_at(root, path)
    return None if node is None else own_parameters(node).get(leaf)


def _node_at(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, by the registries: an encoder's names may be those of methods."""
    node: nn.Module | None = root
    for part in path.split(".") if path else ():
        node = None if node is None else own_children(node).get(part)
    return node


@contextmanager
def filled(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Put tensors in their places in a module for a block. Afterwards ``values`` has what then stands there.

    As ``torch.func.functional_call`` does it, but faster: small requests spend much of their time on that.

    Args:
        module: any.
        values: by dotted name; a module that is used under two names has one of them, see ``values_of``.

    Examples:
        >>> module, values = nn.Linear(1, 1, device="meta"), {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
        >>> with filled(module, values):
        ...     module(torch.ones(1))
        tensor([2.])
        >>> module.weight.device
        device(type='meta')
    """
    nodes: dict[str, nn.Module] = {}
    places: list[tuple[dict[str, Tensor | None], str, str]] = []
    for key in values:
        path, _, name = key.rpartition(".")
        if path not in nodes:
            node = _node_at(module, path)
            assert node is not None
            nodes[path] = node
        registry: dict[str, Tensor | None] = own_parameters(nodes[path])  # type: ignore[assignment]
        places.append((registry if name in registry else own_buffers(nodes[path]), name, key))
    before = [registry[name] for registry, name, _ in places]
    try:
        for registry, name, key in places:
            registry[name] = values[key]
        yield
    finally:
        for (registry, name, key), own in zip(places, before, strict=True):
            value = registry[name]
            registry[name] = own
            if value is not None:
                values[key] = value


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
