"""The corners of torch that are private, or that differ between its versions: one function each, with its reason.

README lists the versions that they were tested on. Where a newer version fails, this is the file to read first. No
other file of the package uses a name of torch's that starts with an underscore.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn.parallel import DistributedDataParallel


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the registry of a module's own parameters, without those of its children. Changes to it count.

    Reason: ``register_parameter`` refuses names that are attributes already, and the stack's tree must take any name
    that an encoder has. ``named_parameters`` leaves out the names that are registered as None.

    Examples:
        >>> list(own_parameters(nn.Linear(1, 1, bias=False)))
        ['weight', 'bias']
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the registry of a module's own buffers, as ``own_parameters`` does for parameters.

    Examples:
        >>> list(own_buffers(nn.BatchNorm1d(1)))
        ['running_mean', 'running_var', 'num_batches_tracked']
    """
    return module._buffers


def own_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the registry of a module's children, as ``own_parameters`` does for parameters.

    Examples:
        >>> list(own_children(nn.Sequential(nn.ReLU())))
        ['0']
    """
    return module._modules


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Return the names of a module's own buffers that ``state_dict`` leaves out. Changes to the set count.

    Reason: torch has a way to set this (``persistent=False``), and none to read it.

    Examples:
        >>> module = nn.Module()
        >>> module.register_buffer("positions", torch.arange(3), persistent=False)
        >>> unsaved_buffers(module)
        {'positions'}
    """
    return module._non_persistent_buffers_set


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices (sparse dims, c) and values (c, \\*rest) of a sparse tensor; equal rows may stand twice.

    Reason: ``indices()`` and ``values()`` refuse a tensor that is not coalesced. To coalesce sorts, and on an
    accelerator it waits for the number of distinct rows.

    Examples:
        >>> rows = torch.sparse_coo_tensor([[4, 4]], [1.0, 2.0], (9,), check_invariants=False)
        >>> sparse_parts(rows)
        (tensor([[4, 4]]), tensor([1., 2.]))
    """
    return tensor._indices(), tensor._values()


_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 has the second alone


def is_vmap_slice(tensor: Tensor) -> bool:
    """Return True for one member's slice of a tensor over which ``torch.vmap`` runs now.

    Reason: ``torch.func`` has no public way to see from within a function that vmap runs it. torch 2.6 and 2.7 stop at
    the question while they export, and no exported graph has vmap within.

    Examples:
        >>> seen = []
        >>> _ = torch.vmap(lambda x: seen.append(is_vmap_slice(x)) or x)(torch.zeros(2))
        >>> seen, is_vmap_slice(torch.zeros(2))
        ([True], False)
    """
    if _is_exporting():
        return False
    return _functorch.is_batchedtensor(tensor)


def is_transformed(tensor: Tensor) -> bool:
    """Return True for a tensor that lives only within a transform of ``torch.func``, such as vmap or grad.

    Reason: as for ``is_vmap_slice``. Such a tensor is of no use once the transform is over.

    Examples:
        >>> kept = []
        >>> _ = torch.vmap(lambda x: kept.append(x) or x)(torch.zeros(2))
        >>> is_transformed(kept[0]), is_transformed(torch.zeros(2))
        (True, False)
    """
    return _functorch.is_functorch_wrapped_tensor(tensor)


def is_view_of(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    """Return True for a view of one of the others, in the sense of autograd.

    Reason: a view keeps a reference to the tensor that it was made from, which torch shows under a private name alone.

    Examples:
        >>> x = torch.zeros(2, 3)
        >>> is_view_of(x[0], [x]), is_view_of(x, [x]), is_view_of(x[0].clone(), [x])
        (True, False, False)
    """
    return tensor._base is not None and any(tensor._base is other for other in others)


def view_as_int16(x: Tensor) -> Tensor:
    """Return the bits of an int64 tensor (c,) as an int16 tensor (4c,): a view; within ``torch.vmap`` a copy.

    Reason: to torch 2.7 at least, ``Tensor.view(dtype)`` has no batching rule, so vmap cannot run it.

    Examples:
        >>> x = torch.tensor([-1, 2**40 + 5])
        >>> view_as_int16(x).tolist()
        [-1, -1, -1, -1, 5, 0, 256, 0]
        >>> torch.vmap(view_as_int16)(x[None]).tolist()
        [[-1, -1, -1, -1, 5, 0, 256, 0]]
    """
    if not is_vmap_slice(x):
        return x.view(torch.int16)
    return (x[:, None] >> torch.tensor([0, 16, 32, 48])).to(torch.int16).flatten()


@functools.cache
def adds_in_float32(device: torch.device, product: torch.dtype) -> bool:
    """Return True if a device adds a product of matrices of another precision to a float32 one in one kernel.

    Reason: ``torch.addmm(out_dtype=...)`` has come to CUDA alone, in torch 2.8, and takes a float32 sum since a later
    version only. So it is tried once, on matrices of one element.

    Examples:
        >>> adds_in_float32(torch.device("cpu"), torch.bfloat16)
        False
    """
    try:
        one = torch.zeros(1, 1, dtype=product, device=device)
        add_in_float32_(torch.zeros(1, 1, device=device), one, one)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return True


def add_in_float32_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of two matrices to a float32 one in place, where ``adds_in_float32``."""
    torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def accelerator_devices() -> tuple[str, range]:
    """Return the kind of this machine's accelerator and the indices of its devices; ("cuda", range(0)) if it has none.

    Reason: on a CUDA build without a driver ``torch.accelerator`` raises: ``current_accelerator`` in torch 2.6,
    ``device_count`` in 2.6 and 2.7.

    Examples:
        >>> kind, devices = accelerator_devices()
        >>> len(devices) == torch.get_device_module(kind).device_count()
        True
    """
    try:
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return accelerator.type, range(torch.accelerator.device_count())
    except RuntimeError:
        pass
    return "cuda", range(0)


def onnx_fixes_recurrent_batches() -> bool:
    """Return True if ``torch.onnx`` writes the example's batch size into the graph of a recurrent layer.

    Reason: torch 2.6 does so without a word, and such a graph fails on batches of any other size.

    Examples:
        >>> onnx_fixes_recurrent_batches() == torch.__version__.startswith("2.6.")
        True
    """
    return torch.__version__ < "2.7"  # no string: it compares as a version


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device, without waiting for it.

    Reason: ``tensor.to(device)`` waits for all that the device has still to do, unless the memory is pinned.

    Examples:
        >>> to_device(torch.tensor([1]), torch.device("cpu"))
        tensor([1])
    """
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


_fast_path_lock = threading.Lock()
_fast_path_blocks = 0  # blocks that run now, in all threads
_fast_path_before = True


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Run a block without the nested-tensor fast path of ``nn.TransformerEncoder`` in evaluation mode.

    Reason: the fast path has no batching rule, so vmap cannot run it. The switch, ``torch.backends.mha``, is of the
    whole process: the first block of any thread turns it off, and the last one that ends turns it back.

    Examples:
        >>> with without_fast_path(), without_fast_path():
        ...     torch.backends.mha.get_fastpath_enabled()
        False
        >>> torch.backends.mha.get_fastpath_enabled()
        True
    """
    global _fast_path_blocks, _fast_path_before
    with _fast_path_lock:
        if not _fast_path_blocks:
            _fast_path_before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _fast_path_blocks += 1
    try:
        yield
    finally:
        with _fast_path_lock:
            _fast_path_blocks -= 1
            if not _fast_path_blocks:
                torch.backends.mha.set_fastpath_enabled(_fast_path_before)


def is_batch_norm(module: nn.Module) -> bool:
    """Return True for BatchNorm of any number of dimensions, synchronised or not.

    Reason: their common base class has no public name.

    Examples:
        >>> is_batch_norm(nn.BatchNorm1d(2)), is_batch_norm(nn.LayerNorm(2))
        (True, False)
    """
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def dropout_rate(module: nn.Module) -> float:
    """Return the rate of a dropout layer of any kind, 0 for another module.

    Reason: their common base class has no public name.

    Examples:
        >>> dropout_rate(nn.Dropout1d(0.3)), dropout_rate(nn.Linear(1, 1))
        (0.3, 0.0)
    """
    return module.p if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0


def keep_out_of_data_parallel(module: nn.Module, names: Iterable[str]) -> None:
    """Make a ``DistributedDataParallel`` that is built around the module later leave some of its tensors alone.

    Reason: the constructor has no argument for parameters that others average.

    Args:
        module: what will be wrapped.
        names: of parameters and buffers, dotted.

    Examples:
        >>> module = nn.Linear(1, 1)
        >>> keep_out_of_data_parallel(module, ["bias"])
        >>> module._ddp_params_and_buffers_to_ignore
        ['bias']
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Let the size of a dimension vary between calls of a compiled function, without compiling anew.

    Reason: ``torch.compile(dynamic=True)`` lets all sizes vary, and code for that is slower; ``mark_dynamic`` raises
    where the compiler finds that a size is fixed after all.

    Examples:
        >>> mark_dynamic(torch.zeros(2, 3), 1)
    """
    import torch._dynamo  # only those who compile pay for its import

    torch._dynamo.maybe_mark_dynamic(tensor, dim)
