"""The losses of students where they are special: compilation, low precision, a teacher that does not fit."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import distillation_losses

COMPILER = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")


def drawn(n: int, t: int, d: int, e: int, v: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    targets = torch.randint(v, (t,), generator=g)
    return {
        "hidden": normal(n, t, d), "weight": normal(n, v, d), "bias": normal(n, v),
        "queries": normal(t, e), "keys": normal(v, e), "key_bias": normal(v), "targets": targets,
    }  # fmt: skip


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[COMPILER, pytest.mark.slow])])
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_gradients_are_those_of_the_teachers_kl(tau: float, compiled: bool) -> None:
    """autograd through KL(teacher || student) alone, of logits that are all there."""
    parts = drawn(2, 11, 3, 6, 8, seed=4)
    leaves = {name: parts[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    valid = torch.arange(11) != 5
    found = distillation_losses(
        **parts, valid=valid, ce_weight=2.0, kd_weight=0.3, temperature=tau, tile_rows=4, compiled=compiled
    )
    got = torch.autograd.grad(3 * found.total, tuple(leaves.values()))

    students = (parts["hidden"] @ parts["weight"].mT + parts["bias"][:, None])[:, valid]
    p = ((parts["queries"] @ parts["keys"].T + parts["key_bias"])[valid] / tau).softmax(-1)
    total = torch.tensor(0.0, dtype=torch.float64)
    for student in students:
        ce = torch.nn.functional.cross_entropy(student, parts["targets"][valid])
        kl = (p * (p.log() - (student / tau).log_softmax(-1))).sum(-1).mean()
        total = total + 2.0 * ce + 0.3 * kl
    expected = torch.autograd.grad(3 * total, tuple(leaves.values()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_bfloat16_products_stay_near() -> None:
    parts = {name: x.float() if x.is_floating_point() else x for name, x in drawn(2, 40, 16, 24, 300, 1).items()}
    exact = distillation_losses(**parts)
    near = distillation_losses(**parts, product_dtype=torch.bfloat16)
    torch.testing.assert_close(near.total, exact.total, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"queries": torch.zeros(3, 3)}, r"queries of floating point \(4, 3\), got torch.float32 \(3, 3\)"),
        ({"queries": torch.tensor(0.0)}, r"queries of floating point \(4, 0\), got torch.float32 \(\)"),
        ({"queries": torch.zeros(4)}, r"queries of floating point \(4, 4\), got torch.float32 \(4,\)"),
        ({"keys": torch.zeros(4, 3)}, r"keys of floating point \(5, 3\), got torch.float32 \(4, 3\)"),
        ({"keys": torch.zeros(5, 3).long()}, r"keys of floating point \(5, 3\), got torch.int64 \(5, 3\)"),
        ({"key_bias": torch.zeros(5, 1)}, r"key_bias of floating point \(5,\), got torch.float32 \(5, 1\)"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(change: dict[str, Tensor], text: str) -> None:
    with pytest.raises(EnsembleKDError, match=f"^distillation_losses: expected {text}. Give the teacher a row for"):
        distillation_losses(**(drawn(2, 4, 2, 3, 5, seed=0) | change))
