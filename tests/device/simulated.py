"""A device simulated in Python: tensors that claim to be on an accelerator, around real values on the CPU.

It refuses what an accelerator refuses, such as operations on tensors of two devices, and counts what an accelerator
waits for: reads by the host, sizes that depend on values, and copies that block. Autograd, autocast and the batching
rules of ``torch.vmap`` are torch's own. It cannot show speed, streams, rounding, or compiled kernels.

    with simulated.device() as log:
        model.to("simulated")
    assert log.waits == []
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from tests.device import graphs
from tests.device.kernels import AUTOCAST_FLOAT32, AUTOCAST_HALF, AUTOCAST_LOW, KERNELS, attention
from tests.device.log import LOG, Log, line_of_package

NAME = "simulated"
aten = torch.ops.aten
_active = False
_library: list[torch.library.Library] = []


class Simulated(Tensor):
    """A tensor on the simulated device; ``inner`` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Simulated:
        made = Tensor._make_subclass(
            cls, inner.detach(), False, dispatch_device=True, device_for_backend_keys=torch.device(NAME, 0)
        )
        made.inner = inner.detach()
        if inner.dtype == torch.float64:
            LOG.doubles.add(line_of_package())
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # so that nn.Module.to() swaps contents, as on CUDA
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Simulated:
        return Simulated(inner["inner"])

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Simulated({self.inner!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = Simulated(self.inner.clone()).requires_grad_(self.requires_grad)
        memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if getattr(self, "_is_param", False) else made
        return memo[id(self)]

    def __reduce_ex__(self, _: Any) -> Any:
        return _rebuilt, (self.inner, self.requires_grad)

    def tolist(self) -> Any:
        LOG.wait("read by the host", "tolist")
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy")


def _rebuilt(inner: Tensor, requires_grad: bool) -> Tensor:
    return Simulated(inner).requires_grad_(requires_grad)


torch.serialization.add_safe_globals([_rebuilt])


class Generator(torch._C.Generator):
    """A generator of the simulated device; its numbers come from the CPU's engine."""

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type != NAME:
            return _HostGenerator(device)
        made = super().__new__(cls, "cpu")
        _generators[made._cdata] = made  # kept, so that its address stays its own
        return made

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)


_HostGenerator = torch._C.Generator
_generators: dict[int, Generator] = {}
_own = [_HostGenerator("cpu").get_state()]  # the state of the device's own generator

DEVICE_OF = torch.ops.prim.device.default
READS = {aten._local_scalar_dense.default, aten.equal.default}
SIZED_BY_VALUES = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "_coalesce", "_to_sparse",
}  # fmt: skip
_PYTHON = torch._C.DispatchKeySet(torch._C.DispatchKey.Python) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.PythonTLSSnapshot
)
MOVES = {"_to_copy", "copy_"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation with a simulated tensor among its arguments, or of a factory that is to make one."""
    if func is DEVICE_OF:  # two calls in three
        return torch.device(NAME, 0) if isinstance(args[0], Simulated) else args[0].device
    name = func._schema.name.split("::")[1]
    leaves = list(_tensors((*args, *kwargs.values())))
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if name in MOVES:
        return _move(func, name, args, kwargs, wanted)
    _refuse_mixed(func, name, args, leaves)
    _refuse_generator(kwargs.get("generator"))
    if func in READS:
        LOG.wait("read by the host", name)
    elif name in SIZED_BY_VALUES or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        LOG.wait("size by values", name)
    elif name in INDEXES and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        LOG.wait("size by values", f"{name} by a mask")
    elif name in ("masked_fill", "masked_fill_") and isinstance(args[2], Simulated):
        LOG.wait("read by the host", f"{name} with a value on the device")
    LOG.count(name)
    if name == "mm":
        LOG.products[(args[0].shape[0], args[1].shape[1])] += 1
    if torch.Tag.inplace_view in func.tags:  # transpose_, for one: the shape of both changes
        func(_plain(args[0]), *args[1:], **kwargs)  # of the shape alone, so that a graph need not repeat it
        with torch._C._ExcludeDispatchKeyGuard(_PYTHON):
            return func(*args, **kwargs)
    plain_args, plain = _mapped(_plain, args), {key: _mapped(_plain, x) for key, x in kwargs.items()}
    if wanted == NAME:
        plain["device"] = "cpu"
    plain.pop("pin_memory", None)
    kernel: Callable[..., Any] = KERNELS.get(name, KERNELS.get(f"{name}.{func._overloadname}", func))
    draws = torch.Tag.nondeterministic_seeded in func.tags and plain.get("generator") is None
    with _own_draws() if draws else nullcontext():
        out = _run(func, kernel, plain_args, plain)
    return _wrapped(func, args, kwargs, out)


def _run(func: Any, kernel: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a kernel on plain tensors, and record it while a graph is captured."""
    if not graphs.capturing:
        return kernel(*args, **kwargs)
    return graphs.capturing[0].record(func, kernel, args, kwargs, lambda: kernel(*args, **kwargs))


@contextmanager
def _own_draws() -> Iterator[None]:
    """Draw from the device's own generator: who forgets its state is found out."""
    host = torch.get_rng_state()
    torch.set_rng_state(_own[0])
    try:
        yield
    finally:
        _own[0] = torch.get_rng_state()
        torch.set_rng_state(host)


graphs.Graph.drawing, graphs.Graph.random = staticmethod(_own_draws), _own


def _plain(x: Any) -> Any:
    return x.inner if type(x) is Simulated else x


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among an operation's arguments, where lists alone nest; torch's pytree takes far longer."""
    for x in values:
        if type(x) in (list, tuple):
            yield from _tensors(x)
        elif isinstance(x, Tensor):
            yield x


def _mapped(change: Callable[[Any], Any], x: Any) -> Any:
    """An operation's arguments or results, each changed."""
    if type(x) in (list, tuple):
        return type(x)([_mapped(change, y) for y in x])
    return change(x)


def _refuse_mixed(func: Any, name: str, args: Any, leaves: list[Tensor]) -> None:
    host = [x for x in leaves if not isinstance(x, Simulated)]
    if len(host) == len(leaves):
        return
    for x in host:
        if name in INDEXES and any(x is i for i in args[1] or ()):
            LOG.wait("copy that blocks", f"{name} by an index of the host")
        elif x.dim() or torch.Tag.pointwise not in func.tags:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME} and cpu: {func}")


def _refuse_generator(generator: Any) -> None:
    if generator is not None and generator._cdata not in _generators:
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu'")


def _move(func: Any, name: str, args: Any, kwargs: dict[str, Any], wanted: str | None) -> Any:
    if name == "copy_":
        target, source, *rest = args
        crosses = isinstance(target, Simulated) != isinstance(source, Simulated)
        if crosses and not ((rest and rest[0]) or kwargs.get("non_blocking")):
            LOG.wait("read by the host" if isinstance(source, Simulated) else "copy that blocks", name)
        _run(func, func, (_plain(target), _plain(source)), {})
        return target
    x, on = args[0], isinstance(args[0], Simulated)
    options = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format") and v is not None}
    if wanted == "meta":
        return func(_plain(x), **options, device="meta")
    made = _run(func, func, (_plain(x),), options)
    if wanted in (None, NAME) if on else wanted == NAME:
        if not on and not kwargs.get("non_blocking"):
            LOG.wait("copy that blocks", f"{name} {tuple(x.shape)}")
        return Simulated(made.clone() if made is _plain(x) else made)
    if on:
        LOG.wait("read by the host", f"{name} {tuple(x.shape)}")
    return made.clone() if made is _plain(x) else made


def _wrapped(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    returns = func._schema.returns
    if returns and returns[0].alias_info is not None and returns[0].alias_info.is_write:  # in place: the same object
        written = [
            kwargs.get(a.name, args[i] if i < len(args) else None)
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        return written[0] if len(written) == 1 else tuple(written)
    return _mapped(lambda x: Simulated(x) if isinstance(x, Tensor) else x, out)


class _Mode(TorchDispatchMode):
    """Sends the device's factories and copies, which have no simulated tensor among their arguments, to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF:
            return run(func, args, {})
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        here = wanted is not None and torch.device(wanted).type == NAME
        if here or any(type(x) is Simulated for x in _tensors((*args, *(kwargs.values())))):
            return run(func, args, kwargs)
        if (generator := kwargs.get("generator")) is not None and generator._cdata in _generators:
            raise RuntimeError(f"Expected a 'cpu' device type for generator but found {NAME!r}")
        return func(*args, **kwargs)


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        """There is one stream alone."""


class _Module(backend_registration._DummyBackendModule):
    """``torch.simulated``."""

    def device_count(self) -> int:
        return int(_active)

    def is_available(self) -> bool:
        return _active

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return _own[0].clone()

    def set_rng_state(self, state: Tensor, *_: Any) -> None:
        _own[0] = state.clone()

    def manual_seed(self, seed: int) -> None:
        _own[0] = _HostGenerator("cpu").manual_seed(seed).get_state()

    def manual_seed_all(self, seed: int) -> None:
        self.manual_seed(seed)

    def synchronize(self, *_: Any) -> None:
        LOG.wait("synchronize", "")

    CUDAGraph, graph = graphs.Graph, staticmethod(graphs.capture)

    def Stream(self, *_: Any) -> _Stream:
        return _Stream()

    def current_stream(self) -> _Stream:
        return _Stream()

    def stream(self, _: Any) -> Any:
        return nullcontext()

    def is_bf16_supported(self) -> bool:
        return True


def register() -> None:
    """Register the device, before any backward pass of the process; without ``device()`` there are none of its kind."""
    if _library:
        return
    hooks = type("Hooks", (backend_registration._DummyPrivateUse1Hook,), {"is_available": lambda _: _active})
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), hooks())
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    rules = torch.library.Library("aten", "IMPL")
    for names, cast in ((AUTOCAST_LOW, None), (AUTOCAST_HALF, torch.float16), (AUTOCAST_FLOAT32, torch.float32)):
        for name in names:
            rules.impl(name, _autocast(name, cast), "AutocastPrivateUse1")
    _library.extend([fallback, rules])


def _autocast(name: str, dtype: torch.dtype | None) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    func = getattr(getattr(aten, packet), overload or "default")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(x: Any) -> Any:
        to = torch.get_autocast_dtype(NAME) if dtype is None else dtype
        return x.to(to) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

    def run_cast(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            return func(*_mapped(cast, args), **{key: _mapped(cast, x) for key, x in kwargs.items()})

    return run_cast


@contextmanager
def device() -> Iterator[Log]:
    """Have one simulated accelerator within the block; yields the log of what it waited for, empty at the start."""
    global _active
    register()
    LOG.clear()
    pin = Tensor.pin_memory
    Tensor.pin_memory = lambda x, *_: x  # type: ignore[method-assign]
    attend, threads, _active = F.scaled_dot_product_attention, torch.autograd.is_multithreading_enabled(), True
    load = torch.load
    torch.load = lambda *args, map_location=None, **kwargs: load(*args, map_location="cpu", **kwargs)
    torch._C._set_only_lift_cpu_tensors(True)
    torch.autograd.set_multithreading_enabled(False)
    torch.Generator = Generator  # type: ignore[misc, assignment]
    F.scaled_dot_product_attention = attention(attend, NAME)  # type: ignore[assignment]
    try:
        with _Mode():
            yield LOG
    finally:
        _active = False
        torch._C._set_only_lift_cpu_tensors(False)
        torch.autograd.set_multithreading_enabled(threads)
        torch.load = load
        Tensor.pin_memory = pin  # type: ignore[method-assign]
        torch.Generator = _HostGenerator  # type: ignore[misc]
        F.scaled_dot_product_attention = attend
