"""Members without weights: the templates that calls fill with stacked values, used by one thread at a time.

A call puts tensors into its templates, and forward may leave results in their attributes. So no two calls may share
them at a time. Evaluation takes copies while the members are in use; training waits, since what it leaves in
attributes must stay with the members.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_kd.internal import is_view_of
from ensemble_kd.stacking.build import duplicate

LookUp = Callable[[Tensor], Tensor]
Reader = Callable[[int, str, nn.Embedding], LookUp | None]


class Templates:
    """The members of a stack, after ``leave_weightless``.

    Args:
        members: the modules themselves, which no one else runs.

    Examples:
        >>> templates = Templates([nn.Dropout(0.5), nn.Dropout(0.5)])
        >>> with templates.lend(training=False) as lent:
        ...     [module.training for module in lent]
        [False, False]
        >>> [module.training for module in templates.members]
        [True, True]
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.members = tuple(members)
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()  # of the members; a thread may lend what it has
        self._spare: list[tuple[nn.Module, ...]] = []  # copies in evaluation mode, up to date
        self._modules: list[nn.Module] | None = None  # of all members: the walk takes a tenth of a small request
        self._can_be_copied = True
        self._own = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and deep copies."""
        with self._lock:
            return {"members": tuple(map(duplicate, self.members))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.members = state["members"]
        self._start()

    @contextmanager
    def alone(self) -> Iterator[tuple[nn.Module, ...]]:
        """Run a block that may change the members, while no call runs on them. Copies made before are dropped."""
        with self._lock:
            self._spare, self._modules = [], None
            try:
                yield self.members
            finally:
                self._spare, self._modules = [], None

    def let_go(self, stacked: Sequence[Tensor]) -> None:
        """Replace views of stacked tensors that the last call left in attributes by copies.

        nn.GRU keeps its weights in a plain list besides, and a tensor with views cannot be exchanged.
        """

        def own(value: object) -> object:
            return value.detach().clone() if isinstance(value, Tensor) and is_view_of(value, stacked) else value

        with self.alone():
            for space in (vars(module) for member in self.members for module in member.modules()):
                for name, value in space.items():
                    if isinstance(value, list):
                        value[:] = map(own, value)
                    else:
                        space[name] = own(value)

    def copy(self, i: int) -> nn.Module:
        """Return a copy of member i."""
        with self._lock:
            return duplicate(self.members[i])

    @contextmanager
    def lend(self, *, training: bool) -> Iterator[tuple[nn.Module, ...]]:
        """Run a block with templates that no other thread uses meanwhile, in the mode asked for.

        In training, the parts that a member keeps in evaluation mode stay so.
        """
        if torch.compiler.is_compiling():  # a lock cannot be traced
            with _in_mode(self.members, training, self._every()):
                yield self.members
            return
        at_once = self._lock.acquire(blocking=training)
        copies = None if at_once else self._take_copies()
        if copies is not None:
            templates, pool = copies
            try:
                with self._read_otherwise(templates):
                    yield templates
            finally:
                pool.append(templates)
            return
        if not at_once:
            self._lock.acquire()
        try:
            with _in_mode(self.members, training, self._every()), self._read_otherwise(self.members):
                yield self.members
        finally:
            if training:  # forward may have left something in attributes
                self._spare, self._modules = [], None
            self._lock.release()

    def _every(self) -> list[nn.Module]:
        """All modules of all members; the caller has the lock."""
        if self._modules is None:
            self._modules = [module for member in self.members for module in member.modules()]
        return self._modules

    def _take_copies(self) -> tuple[tuple[nn.Module, ...], list[tuple[nn.Module, ...]]] | None:
        """Copies of the members as they are now, and the list to put them back into. None if they cannot be copied."""
        pool = self._spare
        try:
            return pool.pop(), pool
        except IndexError:
            pass
        if not self._can_be_copied:
            return None
        with self._lock, torch.inference_mode(False):  # plain tensors are copied, too, and may meet a gradient
            try:
                return tuple(duplicate(member).eval() for member in self.members), self._spare
            except Exception:  # an encoder may hold anything: such a one is evaluated by one thread at a time
                self._can_be_copied = False
                return None

    @contextmanager
    def reading(self, reader: Reader) -> Iterator[None]:
        """Within the block, this thread's calls look embeddings up otherwise; see ``StackedModule.reading``."""
        before = getattr(self._own, "reader", None)
        self._own.reader = reader
        try:
            yield
        finally:
            self._own.reader = before

    @contextmanager
    def _read_otherwise(self, templates: tuple[nn.Module, ...]) -> Iterator[None]:
        reader: Reader | None = getattr(self._own, "reader", None)
        changed: list[nn.Module] = []
        try:
            for i, path, module in _embeddings(templates) if reader is not None else ():
                look_up = reader(i, path, module)  # type: ignore[misc]
                if look_up is not None:
                    vars(module)["forward"] = look_up
                    changed.append(module)
            yield
        finally:
            for one in changed:
                del vars(one)["forward"]

    def describe(self, numbers: Iterable[int]) -> dict[str, str]:
        """Return the numbers and words that each module was built with; see ``StackedModule.describe``."""
        found = {}
        for i, member in zip(numbers, self.members, strict=True):
            for path, words in settings_of(member).items():
                found[f"member {i}{path and '.' + path}"] = words
        return found


def settings_of(member: nn.Module) -> dict[str, str]:
    """Return the numbers and words that each module of a member was built with, by its dotted name.

    Examples:
        >>> settings_of(nn.Sequential(nn.Dropout(0.5)))
        {'': 'Sequential()', '0': 'Dropout(inplace=False, p=0.5)'}
    """
    found = {}
    for path, module in member.named_modules():
        plain = ", ".join(
            f"{name}={value!r}"
            for name, value in sorted(vars(module).items())
            if name != "training" and not name.startswith("_") and isinstance(value, bool | int | float | str)
        )
        found[path] = f"{type(module).__qualname__}({plain})"
    return found


def _embeddings(templates: Sequence[nn.Module]) -> Iterator[tuple[int, str, nn.Embedding]]:
    """The embeddings whose forward is torch's own, with the member and the dotted name of each."""
    for i, template in enumerate(templates):
        for path, module in template.named_modules():
            if (
                isinstance(module, nn.Embedding)
                and type(module).forward is nn.Embedding.forward
                and "forward" not in vars(module)
            ):
                yield i, path, module


@contextmanager
def _in_mode(templates: Sequence[nn.Module], training: bool, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run a block in a mode; afterwards each of the templates' modules is in its own as before."""
    if all(t.training for t in templates) if training else not any(module.training for module in modules):
        yield
        return
    before = [(module, module.training) for module in modules]
    try:
        for template in templates:
            template.train(training)
        yield
    finally:
        for template in templates:  # by its own method, which may do more than to set the flag
            template.train(not training)
        for module, mode in before:
            module.training = mode
