"""n copies of any ``nn.Module`` as one: parameters stored once, stacked along a leading member axis.

The stacked parameters live in a tree of plain modules that mirrors the encoder's own, so ``state_dict()`` has the
encoder's own names, and optimizers, ``.to()``, clipping and checkpoints work as on any module. The members themselves
stay as templates without weights, which are filled for a call. See README.md beside this file for what to mind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import choice, is_batch_norm, own_buffers, seeded
from ensemble_kd.stacking.backends import (
    Backend,
    call_all,
    call_each,
    call_one,
    decide,
)
from ensemble_kd.stacking.build import check_members, has_keyword, leave_weightless
from ensemble_kd.stacking.templates import Reader, Templates
from ensemble_kd.stacking.tree import fill, parameter_at, stack_into, values_of
from ensemble_kd.stacking.trial import Trial, seconds_of, vmap_obstacle


class StackedModule(nn.Module):
    """n modules of one architecture that run as one, on stacked parameters.

    Calls take tensors, and ``training``: True or False runs a call in that mode, None in the stack's own. The
    mode is the call's, not a flag that other threads see. Any number of threads may run calls in evaluation mode at a
    time, while one trains. The first call decides on the backend; make it before other threads start.

    Args:
        members: the modules. Their weights are taken over (stacked), and the modules are left without any.
        backend: "vmap" (one vectorised call), "loop" (one call per member) or "auto".

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
        self.requested_backend: Backend = choice("EnsembleKD", "backend", backend, ("auto", "vmap", "loop"))
        self.decisions: dict[tuple[bool, str], tuple[str, str]] = {}
        self.gives_newest = all(has_keyword(member.forward, "newest") for member in members)
        stack_into(self, members)
        for member in members:
            leave_weightless(member)
            if not member.training:  # pretrained models come in evaluation mode; a new module is in training mode
                member.train()
        # No nn.Module, so that the templates are not registered as children of this module.
        self._templates = Templates(members)

    def __len__(self) -> int:
        return len(self._templates.members)

    # ------------------------------------------------------------------------------------------------------- calls

    def forward(self, *args: Tensor, training: bool | None = None) -> Tensor:
        """Run every member on the same arguments: (n, \\*output shape)."""
        name, _ = self.backend_for(*args, training=training)
        run = self.vectorised if name == "vmap" else self.looped
        return run(*args, training=training)

    def looped(self, *args: Tensor, training: bool | None = None) -> Tensor:
        """Return what ``forward`` does, from one call per member."""
        return torch.stack(self.each(*args, training=training))

    def vectorised(self, *args: Tensor, training: bool | None = None) -> Tensor:
        """Return what ``forward`` does, from one call of ``torch.vmap``."""
        parameters, buffers = values_of(self)
        with self._templates.lend(training=self._mode(training)) as templates:
            return call_all(templates[0], parameters, buffers, args)

    def each(self, *args: Tensor, training: bool | None = None, **options: bool) -> list[Tensor]:
        """Return the members' outputs, each from a call of its own; ``options``: keywords of their forward."""
        parameters, buffers = values_of(self)
        with self._templates.lend(training=self._mode(training)) as templates:
            return call_each(templates, parameters, buffers, args, options)

    def newest(self, *args: Tensor, training: bool | None = None) -> Tensor:
        """Return what ``forward`` gives at the last position: (n, b, d) of (n, b, l, d).

        Members whose forward has the keyword ``newest`` compute no other position where that saves time: in evaluation
        mode, called one by one.

        Examples:
            >>> class Sums(nn.Module):
            ...     def forward(self, x, *, newest=False):
            ...         return x.sum(dim=1) if newest else x.cumsum(dim=1)
            >>> StackedModule([Sums(), Sums()]).newest(torch.ones(1, 3, 1), training=False)
            tensor([[[3.]],
            <BLANKLINE>
                    [[3.]]])
        """
        if self.gives_newest and not self._mode(training) and self.backend_for(*args, training=training)[0] == "loop":
            return torch.stack(self.each(*args, training=training, newest=True))
        return self(*args, training=training)[:, :, -1]  # type: ignore[no-any-return]

    def call_member(self, i: int, *args: Tensor, training: bool | None = None, **options: bool) -> Tensor:
        """Return the output of member i alone; ``options``: keywords of its forward."""
        weights, buffers = ({name: value[i] for name, value in values.items()} for values in values_of(self))
        with self._templates.lend(training=self._mode(training)) as templates:
            return call_one(templates[i], weights, buffers, args, options)

    def _mode(self, training: bool | None) -> bool:
        return self.training if training is None else training

    def reading(self, reader: Reader) -> AbstractContextManager[None]:
        """Within the block, the calls of this thread look embeddings up otherwise.

        Args:
            reader: is given the member's number, the dotted name and the module of every ``nn.Embedding`` whose
                forward is torch's own. It returns a function from ids to rows, which replaces the forward for the
                length of a call; or None, to leave the embedding as it is.

        Examples:
            >>> stacked = StackedModule([nn.Embedding(5, 1), nn.Embedding(5, 1)])
            >>> with stacked.reading(lambda i, name, module: lambda ids: torch.full((*ids.shape, 1), float(i))):
            ...     stacked(torch.tensor([3]))
            tensor([[[0.]],
            <BLANKLINE>
                    [[1.]]])
        """
        return self._templates.reading(reader)

    # ----------------------------------------------------------------------------------------------------- backend

    def backend_for(self, *args: Tensor, training: bool | None = None) -> tuple[str, str]:
        """Return the backend that serves these inputs in this mode, and why it was chosen.

        Raises:
            EnsembleKDError: ``backend="vmap"`` was asked for, and torch.vmap cannot run this encoder, or runs it
                wrongly.
        """
        device = args[0].device.type if args else "cpu"
        key = (self._mode(training), device)
        if key not in self.decisions:
            self.decisions[key] = decide(
                self.requested_backend,
                len(self),
                device,
                lambda: self.vmap_obstacle(*(a[:2] for a in args), training=training),
                lambda: seconds_of(self._trial(args), training=self._mode(training)),
            )
        return self.decisions[key]

    def vmap_obstacle(self, *args: Tensor, training: bool | None = None) -> str | None:
        """Return why vmap cannot run the members on these inputs as the loop does; None if it can. Leaves no trace."""
        return vmap_obstacle(self._trial(args), training=self._mode(training))

    def _trial(self, args: tuple[Tensor, ...]) -> Trial:
        return Trial(self._templates, *values_of(self), args)

    # ----------------------------------------------------------------------------------------------------- members

    def member(self, i: int) -> nn.Module:
        """Return an ordinary module with a copy of the weights of member i, on the device of the stack."""
        if not -len(self) <= i < len(self):
            raise EnsembleKDError("member", f"an index below {len(self)}", str(i), "Count from 0.")
        module = self._templates.copy(i)
        fill(module, self, i)
        return module

    @property
    def groups(self) -> tuple[StackedModule, ...]:
        """The stacks that this one consists of: itself. A ``MixedModule`` has several."""
        return (self,)

    @property
    def kinds(self) -> tuple[int, ...]:
        """The number of each member's group: 0."""
        return (0,) * len(self)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the tensor of all members from those of the groups: the one that there is."""
        (part,) = parts
        return part

    def stacked_parameter(self, name: str) -> Tensor | None:
        """Return the stacked parameter (n, \\*shape) of a dotted name of the encoder's, None if there is none."""
        return parameter_at(self, name)

    @property
    def mixes_rows(self) -> bool:
        """True if a member's output for a row depends on the other rows now: in training mode, with BatchNorm."""
        return self.training and any(is_batch_norm(m) for m in self._templates.members[0].modules())

    def describe(self, numbers: Iterable[int] | None = None) -> dict[str, str]:
        """Return the numbers and words that each module of each member was built with: a dropout rate is no parameter.

        Args:
            numbers: of these members in the whole ensemble; None: from 0.

        Examples:
            >>> StackedModule([nn.Linear(2, 3)]).describe()
            {'member 0': 'Linear(in_features=2, out_features=3)'}
        """
        return self._templates.describe(range(len(self)) if numbers is None else numbers)

    # ------------------------------------------------------------------------------------------------------- state

    def train(self, mode: bool = True) -> StackedModule:
        """Set the mode of every member, as ``nn.Module.train`` does."""
        super().train(mode)
        if "_templates" in vars(self):  # before that there are no members to set
            with self._templates.alone() as templates:
                for template in templates:
                    template.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackedModule:
        """Convert or move, also the buffers that a forward has registered and that are not stacked."""
        with self._templates.alone() as templates:
            self._templates.let_go([*self.parameters(), *self.buffers()])
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for child in (child for template in templates for child in template.modules()):
                for name, buffer in own_buffers(child).items():
                    if buffer is not None and not buffer.is_meta:
                        own_buffers(child)[name] = fn(buffer)
        return self

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Run a block under a seed of its own. Afterwards random states, modes and buffers are as they were."""
        with self._templates.alone() as templates, seeded(0):
            modes = [(module, module.training) for root in (self, *templates) for module in root.modules()]
            buffers = [(b, b.clone()) for b in self.buffers()]
            try:
                yield
            finally:
                for module, mode in modes:
                    module.training = mode
                with torch.no_grad():
                    for buffer, before in buffers:
                        buffer.copy_(before)
