"""The precision of matrix products: float32, or bfloat16 on an accelerator that computes it natively."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ensemble_kd.distributed import Place, agree
from ensemble_kd.internal import choice

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Chosen:
    """A precision, and why it was chosen.

    Args:
        name: "float32", or "bfloat16": products under autocast, everything else in float32.
        reason: in words.
    """

    name: Literal["float32", "bfloat16"]
    reason: str

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return autocast to bfloat16, or nothing.

        Examples:
            >>> with Chosen("bfloat16", "as asked").autocast(torch.device("cpu")):
            ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
            torch.bfloat16
        """
        return torch.autocast(device.type, torch.bfloat16) if self.name == "bfloat16" else nullcontext()


def choose_precision(where: str, precision: Precision, device: torch.device, *, place: Place) -> Chosen:
    """Return the precision that an argument names, or that "auto" finds. All processes call it together.

    "auto" is bfloat16 on a CUDA device (ROCm's, too) that computes it natively, and float32 elsewhere. On a CPU,
    bfloat16 costs about one per cent of accuracy, and products alone do not tell how fast it is: on one with
    instructions for it, epochs took from .6 to 2 times as long. The first process decides for all.

    Args:
        where: the public call, for the message.
        precision: "auto", "float32" or "bfloat16".
        device: of the run.
        place: of this process.

    Raises:
        EnsembleKDError: any other precision.

    Examples:
        >>> choose_precision("fit", "bfloat16", torch.device("cpu"), place=Place())
        Chosen(name='bfloat16', reason='as asked')
        >>> choose_precision("fit", "auto", torch.device("cpu"), place=Place())
        Chosen(name='float32', reason='bfloat16 costs accuracy, and is often slower on a CPU')
    """
    choice(where, "precision", precision, get_args(Precision))
    if precision != "auto":
        return Chosen(precision, "as asked")
    if device.type == "cuda":
        found, reason = torch.cuda.is_bf16_supported(including_emulation=False), "what the device computes natively"
    elif device.type == "cpu":
        found, reason = False, "bfloat16 costs accuracy, and is often slower on a CPU"
    else:
        found, reason = False, f"bfloat16 is untested on {device.type}"
    decided = agree(found, place)
    return Chosen("bfloat16" if decided else "float32", reason if place.is_first else "the first process's choice")
