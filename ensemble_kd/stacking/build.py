"""Members from a factory, the check that they can be stacked, and templates without weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import instance, member_seed, own_buffers, own_parameters, seeded, whole

Factory = Callable[[], nn.Module]
Factories = Factory | Sequence[Factory] | Mapping[Factory, int]

MOST = 1000  # members


def factories_of(encoder_fn: Factories, n: int | None = None) -> list[Factory]:
    """Return the factory of every member.

    Args:
        encoder_fn: a factory for all members, one per member, or counts by factory.
        n: members; None: 3 of one factory, or as many as ``encoder_fn`` has.

    Raises:
        EnsembleKDError: something else than factories, none, or another number than n.

    Examples:
        >>> len(factories_of(nn.Identity, 2)), len(factories_of({nn.Identity: 2, nn.Tanh: 1}))
        (2, 3)
    """
    where = "EnsembleKD"
    given: Any = encoder_fn  # whatever the user passed
    if isinstance(given, Mapping):
        counts = {
            factory: whole(where, "the count of a factory", count, least=1, most=MOST)
            for factory, count in given.items()
        }
        found: list[Factory] = [factory for factory, count in counts.items() for _ in range(count)]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        found = list(given)
    else:
        found = [given] * (3 if n is None else whole(where, "n", n, least=1, most=MOST))
    for factory in found:
        if isinstance(factory, nn.Module) or not callable(factory):
            fix = "Wrap the construction: EnsembleKD(lambda: MyEncoder(...))."
            raise EnsembleKDError(where, "a factory () -> nn.Module", type(factory).__name__, fix)
    if not found:
        raise EnsembleKDError(where, "at least one factory", "none", "Pass one factory per member.")
    if n is not None and n != len(found):
        fix = "Leave n out: there are as many members as factories."
        raise EnsembleKDError(where, f"n = {len(found)}, the number of factories", n, fix)
    return found


def build_members(
    encoder_fn: Factories, n: int | None = None, *, seed: int, own: Callable[[int], Iterable[int]] = range
) -> list[nn.Module]:
    """Call each member's factory under a seed of the member's own, and return the modules.

    Args:
        encoder_fn: the factory of all members, or several, see ``factories_of``.
        n: members of the whole ensemble.
        seed: of the ensemble, see ``member_seed``.
        own: from n to the numbers of the members to build; default: all.

    Raises:
        EnsembleKDError: n is not a positive number, a factory is not callable, or returns no module or one twice.

    Examples:
        >>> first, second = build_members(lambda: nn.Linear(1, 1), 2, seed=0)
        >>> torch.equal(first.weight, second.weight)
        False
    """
    factories = factories_of(encoder_fn, n)
    seed = whole("EnsembleKD", "seed", seed, least=0)
    members: list[nn.Module] = []
    for i in own(len(factories)):
        with seeded(member_seed(seed, i)):
            members.append(_called(factories[i]))
    check_modules(members)
    if all(factory is factories[0] for factory in factories):
        check_members(members)
    return members


def _called(encoder_fn: Callable[[], nn.Module]) -> nn.Module:
    try:
        inspect.signature(encoder_fn).bind()
    except TypeError as error:
        fix = "Bind its arguments: EnsembleKD(lambda: MyEncoder(...))."
        raise EnsembleKDError(
            "EnsembleKD", "a factory () -> nn.Module", f"one that needs more ({error})", fix
        ) from error
    except ValueError:  # a function without a signature
        pass
    return encoder_fn()


def check_modules(members: Sequence[nn.Module], *, where: str = "encoder_fn") -> None:
    """Refuse what cannot be members.

    Raises:
        EnsembleKDError: no members, something else than modules, the same module or parameter twice, lazy parameters.

    Examples:
        >>> check_modules([nn.Linear(2, 3), nn.Linear(2, 4)])
    """
    instance(where, "members", members, (list, tuple), "Pass a list of modules.")
    if not members:
        raise EnsembleKDError(where, "at least one member", "none", "Pass one module or more.")
    owners: dict[int, int] = {}
    for i, member in enumerate(members):
        given: object = member  # whatever the user's factory returned
        if not isinstance(given, nn.Module):
            fix = "Return the module that maps item_ids (b, l) to hidden states (b, l, d)."
            raise EnsembleKDError(where, "an nn.Module", type(given).__name__, fix)
        if any(member is other for other in members[:i]):
            fix = "Build a new module for each member, or they would share their weights."
            raise EnsembleKDError(where, "a new module for each member", "the same module twice", fix)
        for name, tensor in (*member.named_parameters(), *member.named_buffers()):
            if nn.parameter.is_lazy(tensor):
                fix = "Run it once on a batch inside the factory, so that its lazy layers take their shapes."
                raise EnsembleKDError(where, "initialised parameters", f"an uninitialised {name!r}", fix)
            if isinstance(tensor, nn.Parameter) and owners.setdefault(id(tensor), i) != i:
                got = f"{name!r} in members {owners[id(tensor)]} and {i}"
                fix = "Create the parameters inside the factory."
                raise EnsembleKDError(where, "members with parameters of their own", got, fix)


def check_members(members: Sequence[nn.Module], *, where: str = "encoder_fn") -> None:
    """Refuse what cannot be stacked: members of several architectures, and what ``check_modules`` refuses.

    Raises:
        EnsembleKDError: no members, something else than modules, the same module or parameter twice, lazy parameters,
            or members that differ in the names, shapes, types, devices, ties or freezing of their tensors.

    Examples:
        >>> check_members([nn.Linear(2, 3), nn.Linear(2, 4)], where="from_members")
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: from_members: expected members of equal shapes, got 'weight': (3, 2) \
torch.float32 on cpu in member 0, (4, 2) torch.float32 on cpu in member 1. All members must have the same \
architecture; only their seeds differ.
    """
    check_modules(members, where=where)
    first = layout(members[0])
    for i, member in enumerate(members[1:], start=1):
        own = layout(member)
        if own != first:
            name = next(name for name in {**first, **own} if first.get(name) != own.get(name))
            got = f"{name!r}: {first.get(name, 'none')} in member 0, {own.get(name, 'none')} in member {i}"
            fix = "All members must have the same architecture; only their seeds differ."
            raise EnsembleKDError(where, "members of equal shapes", got, fix)


def layout(module: nn.Module) -> dict[str, str]:
    """Return shape, type, device, freezing and ties of each parameter and buffer, in words."""
    described: dict[str, str] = {}
    tied: dict[int, str] = {}
    for name, t in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        same = tied.setdefault(id(t), name)
        frozen = " frozen" if isinstance(t, nn.Parameter) and not t.requires_grad else ""
        described[name] = (
            f"{tuple(t.shape)} {t.dtype} on {t.device}{frozen}{'' if same == name else f' tied to {same!r}'}"
        )
    return described


class Absent(nn.Parameter):
    """A parameter of a template between calls: on the meta device, and of no use together with tensors of values.

    Examples:
        >>> Absent(torch.empty(1, device="meta")) + torch.ones(1)
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: encoder: expected a forward that runs within calls alone, got a part of it \
that ran without weights. Switch activation checkpointing off: it runs forward again in backward. Look parameters up \
by their names: a reference kept elsewhere is never trained.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run what concerns parameters alone, such as a copy, and refuse what computes."""
        given = [*args, *(kwargs or {}).values()]
        given += [one for several in given if isinstance(several, list | tuple) for one in several]
        if any(isinstance(one, Tensor) and not isinstance(one, Absent) and not one.is_meta for one in given):
            fix = (
                "Switch activation checkpointing off: it runs forward again in backward. Look parameters up by their "
                "names: a reference kept elsewhere is never trained."
            )
            got = "a part of it that ran without weights"
            raise EnsembleKDError("encoder", "a forward that runs within calls alone", got, fix)
        return nn.Parameter.__torch_function__(func, types, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Stay what it is in pickles."""
        return Absent, (self.detach(), self.requires_grad)


def leave_weightless(module: nn.Module) -> None:
    """Move a member's parameters and buffers to the meta device. Tied ones stay tied, plain tensors stay real."""
    moved: dict[int, Tensor] = {}
    kept: list[Tensor] = []  # the id of a freed tensor may be given out again, so all live until the walk is over
    for child in module.modules():
        for registry in (own_parameters(child), own_buffers(child)):
            for name, tensor in registry.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    empty = torch.empty_like(tensor, device="meta")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = Absent(empty, tensor.requires_grad) if is_parameter else empty
                    kept.append(tensor)
                registry[name] = moved[id(tensor)]  # type: ignore[assignment]
    for child in module.modules():
        # Parameters that stand in a plain list too, as nn.GRU's do, would stay there with the weights of the start.
        for value in vars(child).values():
            if isinstance(value, list):
                value[:] = [moved.get(id(entry), entry) for entry in value]


def has_keyword(function: Callable[..., object], name: str) -> bool:
    """Return True if a function has an argument of this name.

    Examples:
        >>> has_keyword(lambda x, *, newest=False: x, "newest"), has_keyword(lambda x, **more: x, "newest")
        (True, False)
    """
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function without a signature
        return False


def duplicate(module: nn.Module) -> nn.Module:
    """Return a deep copy, even if forward has left results with a gradient in attributes, which torch will not copy.

    Examples:
        >>> module = nn.Linear(1, 1)
        >>> module.last = module(torch.ones(1, 1))
        >>> duplicate(module).last.requires_grad
        False
    """
    kept = (value for child in module.modules() for value in vars(child).values())
    results = {id(value): value.detach() for value in kept if isinstance(value, Tensor) and value.grad_fn is not None}
    return copy.deepcopy(module, results)
