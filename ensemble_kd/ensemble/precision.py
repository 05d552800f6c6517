"""The precision of matrix products: float32, or bfloat16 where the machine is faster with it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from ensemble_kd.distributed import Place, agree
from ensemble_kd.internal import choice
from ensemble_kd.losses import item_losses

Precision = Literal["auto", "float32", "bfloat16"]
_FASTER = 1.3  # bfloat16 has to be so many times as fast on a CPU: it rounds, and the measurement has noise
_SECONDS = 0.4  # of the whole measurement
_ROUNDS = 3  # of which the fastest counts
_ROWS = (8, 32, 128, 512)  # targets of a measured product, while the time allows
_ITEMS = 2048  # of the measured item loss, whose seconds per item count for all
_LOGITS = 1 << 18  # of it
_MOST = 1024  # rows and columns of a measured weight: of a larger one, a part, whose seconds count for the whole
# The thread's own time, which other processes do not lengthen; Windows counts it in steps of 16 ms.
_clock = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-6 else time.perf_counter

_Name = Literal["float32", "bfloat16"]
_Shape = tuple[int, int]  # (out, in) of a weight
_Part = Callable[[int], float]  # targets -> seconds for each


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
    products of the encoder's own shapes and the item loss are run in both, in under half a second of the processor,
    once per process and shapes; bfloat16 is taken only if it is more than 1.3 times as fast, since it rounds. On any
    other device it is float32. The first process decides for all.

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
def speedup(weights: tuple[_Shape, ...], classes: _Shape | None, threads: int) -> float:
    """Return how many times as fast the CPU is with bfloat16, for one target of a training run.

    Args:
        weights: of one member's encoder, each as often as it has the shape.
        classes: of the item classifier, or None.
        threads: of torch, now: it is measured with them.
    """
    parts: dict[_Part, float] = {partial(_product_s, *shape): count for shape, count in Counter(weights).items()}
    if classes is not None:
        v, d = classes
        parts[partial(_item_loss_s, min(v, _ITEMS), d)] = v / min(v, _ITEMS)
    if not parts:
        return 1.0
    with torch.inference_mode(mode=False), torch.enable_grad():
        for name in get_args(_Name):
            _timed(partial(_product_s, 8, 8), 8, name)  # what the run's first step would wait for, too
        until, seconds = _clock() + _SECONDS, dict.fromkeys(get_args(_Name), 0.0)
        for done, (part, count) in enumerate(parts.items()):
            now = _clock()
            for name, each in _measured(part, now + (until - now) / (len(parts) - done)).items():
                seconds[name] += count * each
    return seconds["float32"] / seconds["bfloat16"]


def _measured(part: _Part, until: float) -> dict[_Name, float]:
    """Return the seconds per target in each precision, from as many targets as the time allows.

    A CPU without bfloat16 may need a hundred times as long with it. So a few targets show if more fit into the time.
    """
    fastest: dict[_Name, float] = {}
    for rows in _ROWS:
        rounds: list[dict[_Name, float]] = []
        least = 0 if fastest else 2  # the first round makes kernels and takes memory
        while len(rounds) < _ROUNDS and (len(rounds) < least or _clock() + rows * sum(fastest.values()) <= until):
            rounds.append({name: _timed(part, rows, name) for name in get_args(_Name)})
        if len(rounds) < 2:
            break
        fastest = {name: min(each[name] for each in rounds) for name in get_args(_Name)}
    return fastest


def _timed(part: _Part, rows: int, name: _Name) -> float:
    """Return the seconds per target of one part of a step."""
    with Chosen(name, "").autocast(torch.device("cpu")):
        return part(rows)


def _product_s(out: int, inner: int, rows: int) -> float:
    """Return the seconds per target of a product with a weight, forward and backward."""
    x, weight = _filled(rows, inner), _filled(out, inner)
    start = _clock()
    y = F.gelu(F.layer_norm(F.linear(x, weight), (out,))).float()  # as encoders do: a part that gains nothing
    y.backward(y.detach())
    return (_clock() - start) / rows


def _item_loss_s(v: int, d: int, rows: int) -> float:
    """Return the seconds per target of the item loss, forward and backward."""
    t = min(rows, _LOGITS // v)
    hidden, weight, targets = _filled(1, t, d), _filled(1, v, d), torch.arange(t) % v
    start = _clock()
    item_losses(hidden, weight, None, targets, compiled=False).total.backward()
    return (_clock() - start) / t


def _filled(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_()


def _weights(encoder: nn.Module, num_items: int) -> tuple[_Shape, ...]:
    """Return the shapes of one member's weights. What has a row per item is a table to look up, and no factor."""
    factors = (p.shape for p in encoder.parameters() if p.ndim > 2 and p.shape[1] < num_items)
    shapes = ((shape[1], math.prod(shape[2:])) for shape in factors)  # no entry is read: shards would be exchanged
    return tuple(sorted((min(out, _MOST), min(inner, _MOST)) for out, inner in shapes))
