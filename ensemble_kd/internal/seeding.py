"""Random numbers: a seed for each member, blocks under a seed of their own, the state of all generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ensemble_kd.internal.arguments import whole
from ensemble_kd.internal.torch_private import accelerator_devices


def member_seed(seed: int, member: int, stream: int = 0) -> int:
    """Return the seed of one member. It depends on no other member, so member 0 is the same whatever n is.

    Args:
        seed: of the ensemble.
        member: its number, from 0.
        stream: another number for each part that draws: 0 for the encoder.

    Raises:
        EnsembleKDError: the seed is not a whole number >= 0.

    Examples:
        >>> member_seed(0, 1) == member_seed(0, 1) != member_seed(0, 2)
        True
    """
    entropy = np.random.SeedSequence([whole("EnsembleKD", "seed", seed, least=0), member, stream])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under a seed of its own for torch, NumPy and ``random``. Afterwards all three are as they were.

    Examples:
        >>> before = random.getstate()
        >>> with seeded(0):
        ...     first = random.random(), torch.rand(())
        >>> with seeded(0):
        ...     first == (random.random(), torch.rand(()))
        True
        >>> random.getstate() == before
        True
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - encoders may use them
    kind, devices = accelerator_devices()
    # All devices are named, since fork_rng warns where it has to choose several by itself.
    with torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def random_state() -> dict[str, Any]:
    """Return the state of every global random generator that an encoder may use, as tensors, numbers and strings."""
    accelerator, devices = accelerator_devices()
    own = torch.get_device_module(accelerator)
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "accelerators": [own.get_rng_state(i) for i in devices],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": [version, list(words), gauss],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go back to a state that ``random_state`` returned.

    Examples:
        >>> state = random_state()
        >>> drawn = torch.rand(3)
        >>> set_random_state(state)
        >>> torch.equal(torch.rand(3), drawn)
        True
    """
    torch.set_rng_state(state["torch"].cpu())
    accelerator, devices = accelerator_devices()
    for i, one in zip(devices, state["accelerators"], strict=False):  # a run may go on where there are fewer
        torch.get_device_module(accelerator).set_rng_state(one.cpu(), i)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
