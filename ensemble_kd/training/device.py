"""The device to train on, if none is named."""

from __future__ import annotations

import torch

from ensemble_kd.internal import accelerator_devices


def best_device() -> torch.device:
    """Return this machine's accelerator (CUDA, ROCm, Apple's MPS, XPU, ...), or the CPU if it has none.

    Examples:
        >>> from ensemble_kd import EnsembleKD
        >>> from ensemble_kd.encoders import SASRec
        >>> model = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=10), n=2).to(best_device())
        >>> model.device.type == best_device().type
        True
    """
    kind, devices = accelerator_devices()
    return torch.device(kind if len(devices) else "cpu")
