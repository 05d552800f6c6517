"""Modules of several architectures as one: those of one architecture are stacked, and the stacks run in turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.stacking.backends import Backend
from ensemble_kd.stacking.build import layout
from ensemble_kd.stacking.stack import StackedModule
from ensemble_kd.stacking.templates import settings_of


def form_of(member: nn.Module) -> str:
    """Return what members of one architecture have in common, in words.

    They have modules of the same names and classes, built with the same numbers and words, and tensors of the same
    shapes, types, ties and freezing.
    """
    classes = [f"{type(module).__module__}.{type(module).__qualname__}" for module in member.modules()]
    return repr((classes, settings_of(member), layout(member)))


def kinds_of(members: Sequence[nn.Module]) -> tuple[int, ...]:
    """Return a number per member, from 0 in the order of their appearance, equal for members of one architecture.

    Examples:
        >>> kinds_of([nn.Linear(2, 3), nn.Linear(2, 4), nn.Linear(2, 3)])
        (0, 1, 0)
    """
    forms = [form_of(member) for member in members]
    seen = list(dict.fromkeys(forms))
    return tuple(seen.index(form) for form in forms)


def stack(
    members: Sequence[nn.Module], *, backend: Backend = "auto", mixed: bool = True
) -> StackedModule | MixedModule:
    """Return the members as one module.

    Args:
        members: the modules; their weights are taken over.
        backend: as of ``StackedModule``, for each group.
        mixed: False: stack them as they are, although the numbers that they were built with may differ.

    Examples:
        >>> type(stack([nn.Linear(1, 1), nn.Linear(1, 1)])).__name__, type(stack([nn.Tanh(), nn.ReLU()])).__name__
        ('StackedModule', 'MixedModule')
    """
    kinds = kinds_of(members) if mixed else (0,)
    return StackedModule(members, backend=backend) if len(set(kinds)) == 1 else MixedModule(members, backend=backend)


class MixedModule(nn.Module):
    """n modules of several architectures that run as one ``StackedModule`` per architecture.

    Members keep the numbers in which they are given. Outputs of unequal width are filled up with zeros at the end, so
    that products with weights that are filled up as well stay the same. In ``state_dict()`` the groups' names begin
    with "0.", "1.", in the order of their first members. Threads and modes of calls are as of ``StackedModule``.

    Args:
        members: the modules. Their weights are taken over, and the modules are left without any.
        backend: "vmap", "loop" or "auto", for each group.

    Shapes:
        ``mixed(\\*args)`` gives (n, \\*output shape), whose last size is that of the widest member.

    Examples:
        >>> mixed = MixedModule([nn.Linear(2, 3), nn.Linear(2, 1), nn.Linear(2, 3)])
        >>> mixed(torch.ones(5, 2)).shape, mixed.kinds, {k: tuple(v.shape) for k, v in mixed.state_dict().items()}
        (torch.Size([3, 5, 3]), (0, 1, 0), {'0.weight': (2, 3, 2), '0.bias': (2, 3), '1.weight': (1, 1, 2), \
'1.bias': (1, 1)})
    """

    def __init__(self, members: Sequence[nn.Module], *, backend: Backend = "auto") -> None:
        super().__init__()
        self.kinds = kinds_of(members)
        self._numbers = [[i for i, kind in enumerate(self.kinds) if kind == group] for group in sorted(set(self.kinds))]
        for group, numbers in enumerate(self._numbers):
            self.add_module(str(group), StackedModule([members[i] for i in numbers], backend=backend))
        joined = [i for numbers in self._numbers for i in numbers]  # the order of the members, group after group
        self._order = None if joined == sorted(joined) else [joined.index(i) for i in range(len(joined))]
        self.requested_backend = self.groups[0].requested_backend

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def groups(self) -> tuple[StackedModule, ...]:
        """The stacks, one per architecture."""
        return tuple(self._modules.values())  # type: ignore[arg-type]

    def forward(self, *args: Tensor, training: bool | None = None) -> Tensor:
        """Run every member on the same arguments: (n, \\*output shape)."""
        outs = [group(*args, training=training) for group in self.groups]
        if len({out.shape[1:-1] for out in outs}) > 1:
            got = ", ".join(
                f"{tuple(out.shape[1:])} of member {i[0]}" for i, out in zip(self._numbers, outs, strict=True)
            )
            fix = "Members of one ensemble return hidden states of the same positions."
            raise EnsembleKDError("encoder output", "outputs of one form", got, fix)
        return self.join(outs)

    def newest(self, *args: Tensor, training: bool | None = None) -> Tensor:
        """Return what ``forward`` gives at the last position, (n, b, d), as ``StackedModule`` does."""
        return self.join([group.newest(*args, training=training) for group in self.groups])

    @property
    def gives_newest(self) -> bool:
        """True if the forward of all members has the keyword ``newest``."""
        return all(group.gives_newest for group in self.groups)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the tensor of all members, (n, ..., d), from those of the groups, (their members, ..., their d).

        Examples:
            >>> mixed = MixedModule([nn.Tanh(), nn.ReLU(), nn.Tanh()])
            >>> mixed.join([torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[9.0]])])
            tensor([[1., 2.],
                    [9., 0.],
                    [3., 4.]])
        """
        widest = max(part.shape[-1] for part in parts)
        joined = torch.cat([F.pad(part, (0, widest - part.shape[-1])) for part in parts])
        return joined if self._order is None else joined[self._order]

    def call_member(self, i: int, *args: Tensor, training: bool | None = None, **options: bool) -> Tensor:
        """Return the output of member i alone, in its own width; ``options``: keywords of its forward."""
        group, within = self._place(i)
        return group.call_member(within, *args, training=training, **options)

    def member(self, i: int) -> nn.Module:
        """Return an ordinary module with a copy of the weights of member i."""
        group, within = self._place(i)
        return group.member(within)

    def _place(self, i: int) -> tuple[StackedModule, int]:
        """The group of member i, and its number there."""
        if not -len(self) <= i < len(self):
            raise EnsembleKDError("member", f"an index below {len(self)}", str(i), "Count from 0.")
        i %= len(self)
        return self.groups[self.kinds[i]], self._numbers[self.kinds[i]].index(i)

    @property
    def mixes_rows(self) -> bool:
        """True if some member's output for a row depends on the other rows now."""
        return any(group.mixes_rows for group in self.groups)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Run a block under a seed of its own. Afterwards random states, modes and buffers are as they were."""
        with ExitStack() as within:
            for group in self.groups:
                within.enter_context(group.undisturbed())
            yield

    @property
    def decisions(self) -> dict[tuple[bool, str], tuple[str, str]]:
        """The backend and its reason, by mode and device, of all groups."""
        found: dict[tuple[bool, str], tuple[str, str]] = {}
        for key in self.groups[0].decisions:
            chosen = [group.decisions[key] for group in self.groups if key in group.decisions]
            names, reasons = (list(dict.fromkeys(part)) for part in zip(*chosen, strict=True))
            found[key] = (" and ".join(names), "; ".join(reasons))
        return found

    def describe(self, numbers: Iterable[int] | None = None) -> dict[str, str]:
        """Return the numbers and words that each module of each member was built with, as ``StackedModule`` does."""
        every = list(range(len(self)) if numbers is None else numbers)
        found: dict[str, str] = {}
        for group, own in zip(self.groups, self._numbers, strict=True):
            found |= group.describe([every[i] for i in own])
        return found
