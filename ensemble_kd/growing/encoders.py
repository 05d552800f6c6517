"""Encoders for a larger catalogue: their tables extended in place, or a larger encoder filled with their weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.growing.rows import Initial, grown_rows
from ensemble_kd.internal import own_buffers, own_parameters


def fill_larger(larger: nn.Module, member: nn.Module, *, old: int, new: int, initial: Initial) -> None:
    """Copy an encoder's weights into one for more items.

    Raises:
        EnsembleKDError: they differ in more than the number of items.
    """
    own, given = _named_tensors(member), _named_tensors(larger)
    with torch.no_grad():
        for name in {**own, **given}:
            before, after = own.get(name), given.get(name)
            if before is not None and after is not None and before.shape == after.shape:
                after.copy_(before)
            elif _is_larger(before, after, old=old, new=new):
                after.copy_(grown_rows(before, old, initial))  # type: ignore[union-attr, arg-type]
            elif isinstance(before, nn.Parameter) or isinstance(after, nn.Parameter):
                sizes = [None if tensor is None else tuple(tensor.shape) for tensor in (before, after)]
                fix = "Pass the factory of the model with num_items as its only change."
                got = f"{name!r}: {sizes[0]} before, {sizes[1]} from the factory"
                raise EnsembleKDError("grow", f"the encoder for {new} items in place of {old}", got, fix)
    for before, after in zip(member.parameters(), larger.parameters(), strict=True):
        after.requires_grad_(before.requires_grad)


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_buffers()), **dict(module.named_parameters())}


def _is_larger(before: Tensor | None, after: Tensor | None, *, old: int, new: int) -> bool:
    """Return True for two forms of a table of items. A buffer with a row per item is left as the factory built it."""
    if not isinstance(before, nn.Parameter) or after is None or not before.ndim:
        return False
    return 0 <= len(before) - old <= 2 and after.shape == (len(before) + new - old, *before.shape[1:])


def extend(member: nn.Module, old: int, new: int, initial: Initial) -> None:
    """Extend the embeddings of an encoder in place.

    Raises:
        EnsembleKDError: it holds sizes of the catalogue elsewhere, so that only its factory can build a larger one.
    """
    made: dict[int, nn.Parameter] = {}
    has_mask = any(p.ndim >= 1 and len(p) == old + 2 for p in member.parameters())
    rows = old + 2 if has_mask else old + 1  # padding and the items alone
    counts = {"num_items": old, "n_items": old + 1, "num_embeddings": rows}  # attributes that grow with the catalogue
    for path, module in member.named_modules():
        for name, value in _plain_numbers(module):
            if value == counts.get(name):
                continue
            if old <= value <= old + 2:
                raise _refused(f"{path}.{name}".lstrip("."), str(value))
        for name, tensor in _tensors(module):
            is_table = isinstance(tensor, nn.Parameter) and tensor.ndim >= 1 and len(tensor) == rows
            sizes = tensor.shape[1:] if is_table else tensor.shape
            if any(old <= size <= old + 2 for size in sizes):
                raise _refused(f"{path}.{name}".lstrip("."), f"of shape {tuple(tensor.shape)}")
            if is_table and id(tensor) not in made:
                table = grown_rows(tensor.detach(), old, initial)
                made[id(tensor)] = nn.Parameter(table, requires_grad=tensor.requires_grad)
    if not made:
        raise _refused("no embedding", f"of {old + 2} or {old + 1} rows")
    for module in member.modules():
        for name, parameter in own_parameters(module).items():
            if id(parameter) in made:
                own_parameters(module)[name] = made[id(parameter)]
        for name, number in _plain_numbers(module):
            if number == counts.get(name):
                setattr(module, name, number + new - old)


def _plain_numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    for name, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, value


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for registry in (own_parameters(module), own_buffers(module)):
        for name, value in registry.items():
            if value is not None:
                yield name, value


def _refused(name: str, value: str) -> EnsembleKDError:
    fix = "Pass encoder_fn, the factory for the larger catalogue."
    return EnsembleKDError(
        "grow", "an encoder that embeds v + 2 or v + 1 ids and counts items nowhere else", f"{name} {value}", fix
    )
