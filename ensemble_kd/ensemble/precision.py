"""The precision of matrix products: float32, or bfloat16 where the machine is faster with it."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from ensemble_kd.distributed import Place, agree
from ensemble_kd.internal import choice
from ensemble_kd.losses import item_losses

Precision = Literal["auto", "float32", "bfloat16"]
_FASTER = 1.3  # bfloat16 has to be so many times as fast on a CPU: it rounds, and the measurement has noise
_SECONDS = 0.4  # after which a measurement that is not done counts as "not faster"
_ROUNDS = 8
_ROWS = 512  # targets of a measured product with a weight of the encoder
_LOGITS = 1 << 18  # of the measured item loss
_MOST = 4096  # rows and columns of a measured weight: of a larger one, a part, whose seconds count for the whole

_Name = Literal["float32", "bfloat16"]
_Shape = tuple[int, int]  # (out, in) of a weight


@dataclass(frozen=True)
class Chosen:
    """A precision, and why it was chosen.

    Args:
        name: "float32", or "bfloat16": products under autocast, everything else in float32.
        reason: in words.
    """

    name: _Name
    reason: str

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return autocast to bfloat16, or nothing.

        Examples:
            >>> with Chosen("bfloat16", "as asked").autocast(torch.device("cpu")):
            ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
            torch.bfloat16
        """
        return torch.autocast(device.type, torch.bfloat16) if self.name == "bfloat16" else nullcontext()


def choose_precision(
    where: str,
    precision: Precision,
    encoder: nn.Module,
    device: torch.device,
    *,
    num_items: int,
    classes: _Shape | None,
    place: Place,
) -> Chosen:
    """Return the precision that an argument names, or that "auto" finds. All processes call it together.

    "auto" is bfloat16 on a CUDA device (ROCm's, too) that computes it natively. On a CPU the forward and backward
    products of the encoder's own shapes and the item loss are run in both, in under half a second, once per process
    and shapes; bfloat16 is taken only if it is more than 1.3 times as fast, since it rounds. On any other device it is
    float32. The first process decides for all.

    Args:
        where: the public call, for the message.
        precision: "auto", "float32" or "bfloat16".
        encoder: with stacked parameters (n, ...).
        device: of the run.
        num_items: of the catalogue.
        classes: (v, d) of the item classifier that the run multiplies with; None: it does so in float32 anyway.
        place: of this process.

    Raises:
        EnsembleKDError: any other precision.

    Examples:
        >>> options = {"num_items": 20, "classes": None, "place": Place()}
        >>> choose_precision("fit", "bfloat16", nn.Module(), torch.device("cpu"), **options)
        Chosen(name='bfloat16', reason='as asked')
        >>> choose_precision("fit", "auto", nn.Module(), torch.device("meta"), **options).name
        'float32'
    """
    choice(where, "precision", precision, get_args(Precision))
    if precision != "auto":
        return Chosen(precision, "as asked")
    if device.type == "cuda":
        found, reason = torch.cuda.is_bf16_supported(including_emulation=False), "what the device computes natively"
    elif device.type == "cpu":
        gain = speedup(_weights(encoder, num_items), classes, torch.get_num_threads()) if place.is_first else 0.0
        found, reason = gain > _FASTER, f"on this CPU bfloat16 is {gain:.2g} times as fast"
    else:
        found, reason = False, f"bfloat16 is untested on {device.type}"
    decided = agree(found, place)
    return Chosen("bfloat16" if decided else "float32", reason if place.is_first else "the first process's choice")


@lru_cache(maxsize=64)
def speedup(weights: frozenset[_Shape], classes: _Shape | None, threads: int) -> float:
    """Return how many times as fast the CPU is with bfloat16, for one target of a training run; 0 if it is far slower.

    Args:
        weights: of the encoder.
        classes: of the item classifier, or None.
        threads: of torch, now: it is measured with them.
    """
    if not weights and classes is None:
        return 1.0
    deadline = time.perf_counter() + _SECONDS
    fastest: dict[_Name, float] = {}
    with torch.inference_mode(mode=False), torch.enable_grad():
        for done in range(_ROUNDS):
            for name in get_args(_Name):
                taken = _step_seconds(weights, classes, name, threads)
                if done:  # the first round makes kernels and takes memory
                    fastest[name] = min(taken, fastest.get(name, math.inf))
            late = time.perf_counter() > deadline
            if late and not done:
                return 0.0
            if late or (done and 2 * fastest["float32"] < fastest["bfloat16"]):
                break
    return fastest["float32"] / fastest["bfloat16"]


def _step_seconds(weights: frozenset[_Shape], classes: _Shape | None, name: _Name, threads: int) -> float:
    """Return the seconds that one target takes: encoder's products and item loss, forward and backward."""
    seconds = 0.0
    with Chosen(name, "").autocast(torch.device("cpu")):
        for out, inner in sorted(weights):
            x, weight = _filled(_ROWS, inner), _filled(out, inner)
            start = time.perf_counter()
            y = F.gelu(F.layer_norm(F.linear(x, weight), (out,))).float()  # as encoders do: a part that gains nothing
            y.backward(y.detach())
            seconds += (time.perf_counter() - start) / _ROWS
        if classes is not None:
            v, d = classes
            part = min(v, _MOST)
            t = min(_ROWS, _LOGITS // part)
            hidden, weight, targets = _filled(1, t, d), _filled(1, part, d), torch.arange(t) % part
            start = time.perf_counter()
            item_losses(hidden, weight, None, targets, compiled=False).total.backward()
            seconds += (time.perf_counter() - start) / t * v / part
    return seconds


def _filled(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_()


def _weights(encoder: nn.Module, num_items: int) -> frozenset[_Shape]:
    """Return the shapes of the encoder's weights. What has a row per item is a table to look up, and no factor."""
    factors = (p.shape for p in encoder.parameters() if p.ndim > 2 and p.shape[1] < num_items)
    shapes = {(shape[1], math.prod(shape[2:])) for shape in factors}  # no entry is read: shards would be exchanged
    return frozenset((min(out, _MOST), min(inner, _MOST)) for out, inner in shapes)
