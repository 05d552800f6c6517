"""Random numbers: a seed for each member, blocks under a seed of their own, the state of all generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ensemble_kd.arguments import is_whole
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.torch_private import accelerator_devices


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
    """The state of every global random generator that an encoder may use."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": [version, list(words), gauss],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go back to a state that ``random_state`` returned."""
    torch.set_rng_state(state["torch"].cpu())
    for i, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one.cpu(), i)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
