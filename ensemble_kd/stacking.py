"""n copies of any ``nn.Module`` as one: parameters stored once, stacked along a leading member axis.

The stacked parameters live in a tree of plain modules that mirrors the encoder's own, so ``state_dict()`` has the
encoder's own names, and optimizers, ``.to()``, clipping and checkpoints work as on any module. The members themselves
stay as weightless templates that ``torch.func.functional_call`` fills for a call.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ensemble_kd.errors import EnsembleKDError

Backend = Literal["auto", "vmap", "loop"]


def member_seed(seed: int, member: int) -> int:
    """The seed of one member. It depends on no other member, so member 0 is the same whatever n is.

    Examples:
        >>> member_seed(0, 1) == member_seed(0, 1) != member_seed(0, 2)
        True
    """
    return int(np.random.SeedSequence([seed, member]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under its own seed for torch, NumPy and ``random``; afterwards all three are as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - encoders may use them
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def build_members(encoder_fn: Callable[[], nn.Module], n: int, *, seed: int) -> list[nn.Module]:
    """Call the factory once per member, each under its own seed.

    Raises:
        EnsembleKDError: n is not a positive number, the factory is not callable, or returns no module or one twice.
    """
    where = "EnsembleKD"
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise EnsembleKDError(where, "n >= 1 members", repr(n), "Pass a whole number, such as n=3.")
    given: object = encoder_fn
    if isinstance(given, nn.Module) or not callable(given):
        fix = "Wrap the construction: EnsembleKD(lambda: MyEncoder(...))."
        raise EnsembleKDError(where, "a factory () -> nn.Module", type(given).__name__, fix)
    members: list[nn.Module] = []
    for i in range(n):
        with seeded(member_seed(seed, i)):
            members.append(encoder_fn())
    return members


def _check_members(members: Sequence[nn.Module]) -> None:
    where = "encoder_fn"
    if not members:
        raise EnsembleKDError(where, "at least one member", "none", "Pass one module or more.")
    for i, member in enumerate(members):
        given: object = member  # whatever the user's factory returned
        if not isinstance(given, nn.Module):
            fix = "Return the module that maps item_ids (b, l) to hidden states (b, l, d)."
            raise EnsembleKDError(where, "an nn.Module", type(given).__name__, fix)
        if any(member is other for other in members[:i]):
            fix = "Build a new module in each call, or the members would share their weights."
            raise EnsembleKDError(where, "a new module in each call", "the same module twice", fix)
        for name, tensor in member.named_parameters():
            if isinstance(tensor, nn.parameter.UninitializedParameter):
                fix = "Run it once on a batch inside the factory, so that its lazy layers take their shapes."
                raise EnsembleKDError(where, "initialised parameters", f"an uninitialised {name!r}", fix)
    first = _layout(members[0])
    shared = {id(p) for p in members[0].parameters()}
    for i, member in enumerate(members[1:], start=1):
        if any(id(p) in shared for p in member.parameters()):
            fix = "Create the parameters inside the factory."
            raise EnsembleKDError(where, "members with parameters of their own", f"shared ones in member {i}", fix)
        layout = _layout(member)
        if layout != first:
            differing = sorted(set(first.items()) ^ set(layout.items()))
            fix = "All members must have the same architecture; only their seeds differ."
            raise EnsembleKDError(where, "members of equal shapes", f"member {i} differs at {differing[:2]}", fix)


def _layout(module: nn.Module) -> dict[str, tuple[object, ...]]:
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: (tuple(t.shape), str(t.dtype)) for name, t in tensors}


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
        _check_members(members)
        if backend not in ("auto", "vmap", "loop"):
            raise EnsembleKDError("backend", "'auto', 'vmap' or 'loop'", repr(backend), "Choose one of these.")
        self.requested_backend = backend
        self.decisions: dict[tuple[bool, str], tuple[str, str]] = {}
        self._stack(members)
        for member in members:
            _leave_weightless(member)
        # In a tuple, so that nn.Module does not register the templates as children of this module.
        self._templates = tuple(members)

    def _stack(self, members: Sequence[nn.Module]) -> None:
        first = members[0]
        lookup = [dict(m.named_parameters(remove_duplicate=False)) for m in members]
        buffers = [dict(m.named_buffers(remove_duplicate=False)) for m in members]
        stacked: dict[int, Tensor] = {}
        for path, module in first.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in stacked:  # tied parameters are stacked once and registered under every name
                    values = torch.stack([m[prefix + name].detach() for m in lookup])
                    stacked[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                self._node(path).register_parameter(name, stacked[id(parameter)])  # type: ignore[arg-type]
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if id(buffer) not in stacked:
                    stacked[id(buffer)] = torch.stack([m[prefix + name].detach() for m in buffers])
                persistent = name not in module._non_persistent_buffers_set
                self._node(path).register_buffer(name, stacked[id(buffer)], persistent=persistent)

    def _node(self, path: str) -> nn.Module:
        node: nn.Module = self
        for name in path.split(".") if path else ():
            if name not in node._modules:
                node.add_module(name, nn.Module())
            node = node._modules[name]
        return node

    def __len__(self) -> int:
        return len(self._templates)

    def train(self, mode: bool = True) -> StackedModule:
        """Set the mode of every member, as ``nn.Module.train`` does."""
        super().train(mode)
        for template in getattr(self, "_templates", ()):
            template.train(mode)
        return self

    def member(self, i: int) -> nn.Module:
        """An ordinary module with the weights of member i, on the device of the stack; a copy."""
        if not -len(self) <= i < len(self):
            raise EnsembleKDError("member", f"an index below {len(self)}", str(i), "Count from 0.")
        module = copy.deepcopy(self._templates[i])
        values = {
            **dict(self.named_parameters(remove_duplicate=False)),
            **dict(self.named_buffers(remove_duplicate=False)),
        }
        made: dict[int, Tensor] = {}
        for path, child in module.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            for registry in (child._parameters, child._buffers):
                for name, tensor in registry.items():
                    if tensor is None:
                        continue
                    source = values[prefix + name]
                    if id(source) not in made:
                        own = source.detach()[i].clone()
                        made[id(source)] = (
                            nn.Parameter(own, source.requires_grad) if registry is child._parameters else own
                        )
                    registry[name] = made[id(source)]  # type: ignore[assignment]
        return module

    def forward(self, *args: Tensor) -> Tensor:
        """Run every member on the same arguments: (n, \\*output shape)."""
        name, _ = self.backend_for(*args)
        return self._vmap(*args) if name == "vmap" else torch.stack(self.each(*args))

    def each(self, *args: Tensor) -> list[Tensor]:
        """The members' outputs one after the other, each from a call of its own."""
        unbound = {name: p.unbind(0) for name, p in self.named_parameters()}
        return [self._call(i, {name: p[i] for name, p in unbound.items()}, args) for i in range(len(self))]

    def call_member(self, i: int, *args: Tensor) -> Tensor:
        """The output of member i alone."""
        return self._call(i, {name: p[i] for name, p in self.named_parameters()}, args)

    def _call(self, i: int, parameters: dict[str, Tensor], args: tuple[Tensor, ...]) -> Tensor:
        stacked = dict(self.named_buffers())
        buffers = {name: b[i] for name, b in stacked.items()}
        values = {**parameters, **buffers}
        output: Tensor = functional_call(self._templates[i], values, args)
        for name, view in buffers.items():
            if values[name] is not view:  # forward put a new tensor into the buffer's place: keep it
                stacked[name].data[i].copy_(values[name].detach())
        return output

    def _vmap(self, *args: Tensor) -> Tensor:
        template = self._templates[0]

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], *inputs: Tensor) -> Tensor:
            output: Tensor = functional_call(template, {**parameters, **buffers}, inputs)
            return output

        in_dims = (0, 0) + (None,) * len(args)
        with _no_fast_path():
            return torch.vmap(one, in_dims=in_dims, randomness="different")(
                dict(self.named_parameters()), dict(self.named_buffers()), *args
            )

    def backend_for(self, *args: Tensor) -> tuple[str, str]:
        """The backend that serves these inputs in the present mode, and why it was chosen.

        Raises:
            EnsembleKDError: ``backend="vmap"`` was asked for, and torch.vmap cannot run this encoder or runs it wrongly.
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
        training = self.training
        saved = [b.clone() for b in self.buffers()]
        try:
            with seeded(0):
                if training:
                    trained = [p for p in self.parameters() if p.requires_grad]
                    torch.autograd.grad(self._vmap(*args).float().sum(), trained, allow_unused=True)
                self.eval()
                with torch.no_grad():
                    vectorised, looped = self._vmap(*args), torch.stack(self.each(*args))
        except Exception as error:  # whatever an encoder of somebody else's raises under vmap
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        finally:
            self.train(training)
            with torch.no_grad():
                for buffer, before in zip(self.buffers(), saved, strict=True):
                    buffer.copy_(before)
        scale = looped.abs().max().clamp(min=1e-6)
        error_ratio = float((vectorised - looped).abs().max() / scale)
        tolerance = 1e-3 if looped.dtype in (torch.float32, torch.float64) else 5e-2
        if not error_ratio <= tolerance:
            return (
                f"outputs that differ from the members' own by {error_ratio:.1e} (state beside parameters and buffers?)"
            )
        return None


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Switch off the nested-tensor fast path of nn.TransformerEncoder in eval mode: it has no batching rule."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
