"""``python -m ensemble_kd``: versions, devices, extras and a short self-test, as a report of a bug needs them."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from ensemble_kd.data import synthetic
from ensemble_kd.encoders import SASRec
from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.export import load, save
from ensemble_kd.internal import accelerator_devices
from ensemble_kd.losses import compile_status
from ensemble_kd.training import fit

EXTRAS = (
    *("tqdm", "matplotlib", "polars", "tensorboard", "safetensors", "onnx", "onnxscript", "onnxruntime", "faiss-cpu"),
    *("huggingface_hub", "transformers", "lightning", "recbole"),
)


def facts() -> Iterator[tuple[str, str]]:
    """Yield a name and a value for each thing that a run depends on.

    Examples:
        >>> dict(facts())["torch"] == str(torch.__version__)
        True
    """
    yield "ensemble_kd", _version("ensemble_kd")
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", str(torch.__version__)
    yield "CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    kind, devices = accelerator_devices()
    named = [torch.cuda.get_device_name(i) if kind == "cuda" else f"{kind}:{i}" for i in devices]
    yield "accelerators", ", ".join(named) or "none"
    for name in ("numpy", "einops", *EXTRAS):
        yield name, _version(name)


def self_test() -> Iterator[tuple[str, str]]:
    """Yield a name and an outcome for each step of a short run: train, recommend, save and load.

    Raises:
        RuntimeError: a loaded model whose scores differ.
    """
    data = synthetic(num_users=200, num_items=100)
    model = EnsembleKD(lambda: SASRec(100, d_model=16, max_len=10), n=2)
    start = time.monotonic()
    result = fit(model, data, epochs=1, progress=False)
    yield "fit", f"ok, {time.monotonic() - start:.1f} s, {result.precision}, {model.backend}"
    inputs = data.inputs("test", 10)
    expected = model.recommend(inputs, k=5)
    yield "recommend", f"ok, {len(expected.items)} users"
    if find_spec("safetensors") is None:
        yield "save and load", "left out: pip install 'ensemble_kd[export]' for it"
        return
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "model.safetensors")
        found = load(path, lambda: SASRec(100, d_model=16, max_len=10)).recommend(inputs, k=5)
    if not torch.equal(found.items, expected.items):
        raise RuntimeError("a loaded model recommends other items")
    yield "save and load", "ok"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Print the facts, then the self-test; an error of it ends the process with its traceback."""
    for lines in (facts(), self_test()):
        for name, value in lines:
            print(f"{name:<15} {value}", flush=True)
    print(f"{'tiles':<15} {compile_status()}")


if __name__ == "__main__":
    main()
