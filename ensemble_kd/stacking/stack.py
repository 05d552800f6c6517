"""n copies of any ``nn.Module`` as one: parameters stored once, stacked along a leading member axis.

The stacked parameters live in a tree of plain modules that mirrors the encoder's own, so ``state_dict()`` has the
encoder's own names, and optimizers, ``.to()``, clipping and checkpoints work as on any module. The members themselves
stay as weightless templates that ``torch.func.functional_call`` fills for a call.
"""

from __future__ import annotations

import copy
import numbers
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.func import functional_call

from ensemble_kd.errors import EnsembleKDError

Backend = Literal["auto", "vmap", "loop"]


def is_whole(value: object) -> bool:
    """Whether something is an integer, NumPy's among them, and not a bool."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)


def member_seed(seed: int, member: int, stream: int = 0) -> int:
    """The seed of one member. It depends on no other member, so member 0 is the same whatever n is.

    ``stream`` tells the parts of a member apart: 0 is the encoder.

    Raises:
        EnsembleKDError: the seed is not a whole number >= 0.

    Examples:
        >>> member_seed(0, 1) == member_seed(0, 1) != member_seed(0, 2)
        True
    """
    if not is_whole(seed) or seed < 0:
        raise EnsembleKDError("EnsembleKD", "seed as a whole number >= 0", repr(seed), "Pass one, such as seed=0.")
    entropy = np.random.SeedSequence([int(seed), member, stream])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under its own seed for torch, NumPy and ``random``; afterwards all three are as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - encoders may use them
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type
    # All devices are named, since fork_rng warns where it has to choose several by itself.
    with torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=kind):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def build_members(
    encoder_fn: Callable[[], nn.Module], n: int, *, seed: int, own: Callable[[int], Iterable[int]] = range
) -> list[nn.Module]:
    """Call the factory once per member, each under its own seed; ``own`` chooses some of n members.

    Raises:
        EnsembleKDError: n is not a positive number, the factory is not callable, or returns no module or one twice.
    """
    where = "EnsembleKD"
    if not is_whole(n) or n < 1:
        raise EnsembleKDError(where, "n >= 1 members", repr(n), "Pass a whole number, such as n=3.")
    given: object = encoder_fn
    if isinstance(given, nn.Module) or not callable(given):
        fix = "Wrap the construction: EnsembleKD(lambda: MyEncoder(...))."
        raise EnsembleKDError(where, "a factory () -> nn.Module", type(given).__name__, fix)
    members: list[nn.Module] = []
    for i in own(n):
        with seeded(member_seed(seed, i)):
            members.append(encoder_fn())
    check_members(members)
    return members


def check_members(members: Sequence[nn.Module], *, where: str = "encoder_fn") -> None:
    """Refuse what cannot be stacked.

    Raises:
        EnsembleKDError: no members, something else than modules, the same module or parameter twice, lazy parameters,
            or members that differ in the names, shapes, types, devices, ties or freezing of their tensors.
    """
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
    first = _layout(members[0])
    for i, member in enumerate(members[1:], start=1):
        layout = _layout(member)
        if layout != first:
            name = next(name for name in {**first, **layout} if first.get(name) != layout.get(name))
            got = f"{name!r}: {first.get(name, 'none')} in member 0, {layout.get(name, 'none')} in member {i}"
            fix = "All members must have the same architecture; only their seeds differ."
            raise EnsembleKDError(where, "members of equal shapes", got, fix)


def _layout(module: nn.Module) -> dict[str, str]:
    layout: dict[str, str] = {}
    tied: dict[int, str] = {}
    for name, t in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        same = tied.setdefault(id(t), name)
        frozen = " frozen" if isinstance(t, nn.Parameter) and not t.requires_grad else ""
        layout[name] = f"{tuple(t.shape)} {t.dtype} on {t.device}{frozen}{'' if same == name else f' tied to {same!r}'}"
    return layout


def _leave_weightless(module: nn.Module) -> None:
    """Move a template's parameters and buffers to the meta device; tied ones stay tied, plain tensors stay real."""
    moved: dict[int, Tensor] = {}
    kept: list[Tensor] = []  # the id of a freed tensor may be given out again, so all live until the walk is over
    for child in module.modules():
        for registry in (child._parameters, child._buffers):
            for name, tensor in registry.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    empty = torch.empty_like(tensor, device="meta")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    kept.append(tensor)
                registry[name] = moved[id(tensor)]  # type: ignore[assignment]
    for child in module.modules():
        # Parameters that stand in a plain list too, as nn.GRU's do, would stay there with the weights of the start.
        for value in vars(child).values():
            if isinstance(value, list):
                value[:] = [moved.get(id(entry), entry) for entry in value]


def duplicate(module: nn.Module) -> nn.Module:
    """A deep copy, also of a module whose forward has left results with a gradient in its attributes."""
    kept = (value for child in module.modules() for value in vars(child).values())
    results = {id(value): value.detach() for value in kept if isinstance(value, Tensor) and value.grad_fn is not None}
    return copy.deepcopy(module, results)


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
            _leave_weightless(member)
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
                at[parent]._modules[leaf] = node
            if known:
                continue
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in stacked:  # tied parameters are stacked once and registered under every name
                    values = torch.stack([m[prefix + name].detach() for m in lookup])
                    stacked[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                node._parameters[name] = stacked[id(parameter)]  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if id(buffer) not in stacked:
                    stacked[id(buffer)] = torch.stack([m[prefix + name].detach() for m in buffers])
                node._buffers[name] = stacked[id(buffer)]
                if name in module._non_persistent_buffers_set:
                    node._non_persistent_buffers_set.add(name)

    def stacked_parameter(self, name: str) -> Tensor | None:
        """The stacked parameter (n, \\*shape) of a dotted name of the encoder's, None where there is none."""
        return dict(self.named_parameters(remove_duplicate=False)).get(name)

    @property
    def mixes_rows(self) -> bool:
        """Whether what a member makes of a row depends on the others now: in training, with BatchNorm."""
        return self.training and any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self._templates[0].modules()
        )

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
                for name, buffer in child._buffers.items():
                    if buffer is not None and not buffer.is_meta:
                        child._buffers[name] = fn(buffer)
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
            parameters.update({prefix + name: p for name, p in node._parameters.items() if p is not None})
            buffers.update({prefix + name: b for name, b in node._buffers.items() if b is not None})
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
            for registry in (child._parameters, child._buffers):
                for name, tensor in registry.items():
                    if tensor is None or prefix + name not in values:  # a buffer that forward has registered
                        continue
                    source = values[prefix + name]
                    if id(source) not in made:
                        own = source.detach()[i].clone()
                        made[id(source)] = (
                            nn.Parameter(own, source.requires_grad) if registry is child._parameters else own
                        )
                    registry[name] = made[id(source)]
        return module

    def forward(self, *args: Tensor) -> Tensor:
        """Run every member on the same arguments: (n, \\*output shape)."""
        name, _ = self.backend_for(*args)
        return self._vmap(*args) if name == "vmap" else torch.stack(self.each(*args))

    def each(self, *args: Tensor) -> list[Tensor]:
        """The members' outputs one after the other, each from a call of its own."""
        parameters, buffers = self._values()
        parts: dict[int, tuple[Tensor, ...]] = {}
        for p in parameters.values():  # a tied one is unbound once, and its gradient stacked once
            if id(p) not in parts:
                parts[id(p)] = p.unbind(0)
        return [
            self._call(i, {name: parts[id(p)][i] for name, p in parameters.items()}, buffers, args)
            for i in range(len(self))
        ]

    def call_member(self, i: int, *args: Tensor) -> Tensor:
        """The output of member i alone."""
        parameters, buffers = self._values()
        return self._call(i, {name: p[i] for name, p in parameters.items()}, buffers, args)

    def _call(
        self, i: int, parameters: dict[str, Tensor], stacked: dict[str, Tensor], args: tuple[Tensor, ...]
    ) -> Tensor:
        buffers = {name: b[i] for name, b in stacked.items()}
        values = {**parameters, **buffers}
        output: Tensor = functional_call(self._templates[i], values, args, tie_weights=False)
        for name, view in buffers.items():
            if values[name] is not view:  # forward put a new tensor into the buffer's place: keep it
                _overwrite(name, view, values[name])
        return output

    def _vmap(self, *args: Tensor) -> Tensor:
        template = self._templates[0]
        parameters, stacked = self._values()

        def one(
            parameters: dict[str, Tensor], buffers: dict[str, Tensor], *inputs: Tensor
        ) -> tuple[Tensor, dict[str, Tensor]]:
            values = {**parameters, **buffers}
            output: Tensor = functional_call(template, values, inputs, tie_weights=False)
            return output, {name: values[name] for name, b in buffers.items() if values[name] is not b}

        in_dims = (0, 0) + (None,) * len(args)
        with _no_fast_path(), _no_batched_state(template):
            run = torch.vmap(one, in_dims=in_dims, randomness="different")
            output, replaced = run(parameters, stacked, *args)
        for name, value in replaced.items():
            _overwrite(name, stacked[name], value)
        return output

    @torch.no_grad()
    def _evaluate(self, run: Callable[[], Tensor]) -> Tensor:
        with self.undisturbed():
            self.eval()
            return run()

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
            self.decisions[key] = self._decide(device, args)
        return self.decisions[key]

    def _decide(self, device: str, args: tuple[Tensor, ...]) -> tuple[str, str]:
        if self.requested_backend == "loop":
            return "loop", "asked for"
        if self.requested_backend == "auto" and device == "cpu":
            return "loop", "on a CPU the loop is faster than vmap"
        if len(self) == 1 and self.requested_backend == "auto":
            return "loop", "there is one member"
        obstacle = self._vmap_obstacle(*(a[:2] for a in args))
        if obstacle is None:
            return "vmap", "asked for" if self.requested_backend == "vmap" else "vmap agrees with the loop"
        if self.requested_backend == "vmap":
            fix = 'Use backend="loop" (or "auto"), which runs any encoder.'
            raise EnsembleKDError("backend='vmap'", "an encoder that torch.vmap can run", obstacle, fix)
        return "loop", f"vmap cannot serve: {obstacle}"

    def _vmap_obstacle(self, *args: Tensor) -> str | None:
        """Why vmap cannot run the members on these inputs as the loop does; None if it can. Leaves no trace."""
        with torch.inference_mode(False):
            args = tuple(a.clone() for a in args)  # normal tensors, where the caller is in inference mode
            # The loop first: what it raises is the encoder's own error, and no matter of vmap.
            with self.undisturbed(), torch.no_grad():
                torch.stack(self.each(*args))
            expected = self._evaluate(lambda: torch.stack(self.each(*args)))
            try:
                if self.training:
                    with self.undisturbed(), torch.enable_grad():
                        out = self._vmap(*args)
                        trained = [p for p in self.parameters() if p.requires_grad]
                        if trained and out.requires_grad:
                            torch.autograd.grad(out.sum(), trained, allow_unused=True)
                vectorised = self._evaluate(lambda: self._vmap(*args))
            except Exception as error:  # whatever an encoder of somebody else's raises under vmap
                return first_line(error)
        error_ratio = float((vectorised - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        exact = expected.dtype in (torch.float32, torch.float64)
        if not error_ratio <= (1e-3 if exact and not torch.is_autocast_enabled(expected.device.type) else 5e-2):
            return (
                f"outputs that differ from the members' own by {error_ratio:.1e} (state beside parameters and buffers?)"
            )
        return None


def first_line(error: Exception) -> str:
    """Class and first line of an error of somebody else's, for a text of ours."""
    text = (str(error).strip().splitlines() or ["no text"])[0]
    return f"{type(error).__name__}: {text.rstrip('. ')}"


def _overwrite(name: str, buffer: Tensor, value: Tensor) -> None:
    """Keep the tensor that forward has put into a buffer's place."""
    if value.shape != buffer.shape:
        fix = "Keep a tensor that grows as a plain attribute instead."
        got = f"{name!r} from {tuple(buffer.shape)} to {tuple(value.shape)}"
        raise EnsembleKDError("encoder", "buffers that keep their shape", got, fix)
    buffer.data.copy_(value.detach())


@contextmanager
def _no_batched_state(template: nn.Module) -> Iterator[None]:
    """Take back the tensors of vmap that forward stored in attributes (caches, attention weights): they die with it."""
    before = [(space, dict(space)) for child in template.modules() for space in (vars(child), child._buffers)]
    try:
        yield
    finally:
        for space, old in before:
            for name in [k for k, v in space.items() if isinstance(v, Tensor) and is_functorch_wrapped_tensor(v)]:
                if name in old:
                    space[name] = old[name]
                else:
                    del space[name]


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Switch off the nested-tensor fast path of nn.TransformerEncoder in eval mode: it has no batching rule."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
