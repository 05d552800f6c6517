"""The walk over tiles, by both losses that use it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import ItemLosses, distillation_losses, item_losses, tiles

Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def taught(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, **options: Any) -> ItemLosses:
    """Students of a teacher that is drawn anew, the same for the same sizes."""
    rng = torch.Generator().manual_seed(7)
    t, v = 0 if hidden.ndim < 2 else hidden.shape[1], weight.shape[1]
    teacher = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((t, 6), (v, 6), (v,))]
    return distillation_losses(hidden, weight, bias, *(x.to(bias.dtype) for x in teacher), targets, **options)


LOSSES: dict[str, Callable[..., ItemLosses]] = {
    "item_losses": partial(item_losses, kd_weight=0.5, compiled=False),
    "distillation_losses": partial(taught, kd_weight=0.5, compiled=False),
}
both = pytest.mark.parametrize("name", LOSSES)


def problem(n: int, t: int, d: int, v: int, dtype: torch.dtype = torch.float64) -> Problem:
    rng = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=rng, dtype=dtype).requires_grad_() for shape in ((n, t, d), (n, v, d), (n, v))
    )
    return hidden, weight, bias, torch.randint(0, v, (t,), generator=rng)


def gradients(total: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total, leaves, retain_graph=True)


@both
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_what_asks_for_a_gradient_gets_one(name: str, wanted: int) -> None:
    *inputs, targets = problem(2, 3, 4, 5)
    expected = gradients(LOSSES[name](*inputs, targets).total, *inputs)[wanted]
    frozen = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    LOSSES[name](*frozen, targets).total.backward()
    torch.testing.assert_close(frozen[wanted].grad, expected)
    assert all(x.grad is None for i, x in enumerate(frozen) if i != wanted)


@both
def test_without_gradients_the_losses_are_the_same(name: str) -> None:
    inputs = problem(2, 3, 4, 5)
    expected = LOSSES[name](*inputs)
    assert [x.requires_grad for x in expected] == [True, False, False, False]
    with torch.no_grad():
        actual = LOSSES[name](*inputs)
    assert not actual.total.requires_grad
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@both
def test_a_target_that_does_not_count_may_be_anything(name: str) -> None:
    hidden, weight, bias, targets = problem(2, 3, 4, 5)
    valid = torch.tensor([True, False, True])
    expected = LOSSES[name](hidden, weight, bias, targets, valid=valid)
    for odd in (-7, 5, 1 << 40):
        found = LOSSES[name](hidden, weight, bias, targets.masked_fill(~valid, odd), valid=valid)
        assert torch.equal(found.total, expected.total)


@both
def test_nothing_but_padding_costs_nothing(name: str) -> None:
    hidden, weight, bias, targets = problem(2, 3, 4, 5)
    losses = LOSSES[name](hidden, weight, bias, targets, valid=torch.zeros(3, dtype=torch.bool))
    assert losses.total == 0
    assert all(not grad.any() for grad in gradients(losses.total, hidden, weight, bias))


@both
def test_a_second_derivative_is_refused(name: str) -> None:
    hidden, weight, bias, targets = problem(2, 3, 4, 5)
    total = LOSSES[name](hidden, weight, bias, targets).total
    with pytest.raises(EnsembleKDError, match=f"^{name}: expected one backward pass, got create_graph=True"):
        torch.autograd.grad(total, hidden, create_graph=True)


def error_in_float16(name: str, few: bool) -> float:
    """The largest relative error in the gradients of items that no target is, from float16 products.

    Each is a sum over 400 targets of probabilities over their number, all about 3e-7.
    """
    hidden, weight, bias, targets = problem(2, 400, 4, 90, torch.float32)
    others = torch.arange(90) >= 30
    hidden, weight, bias, targets = 0.1 * hidden, 0.1 * weight, 0.1 * bias - 5.5 * others, targets % 30
    hidden, weight, bias = (x.detach().requires_grad_() for x in (hidden, weight, bias))
    valid = torch.arange(400) % 20 == 0 if few else None
    loss = partial(LOSSES[name], hidden, weight, bias, targets, valid=valid, kd_weight=0.01)  # teachers are not peaked
    half, exact = (gradients(loss(product_dtype=dtype).total, weight, bias) for dtype in (torch.float16, torch.float32))
    parts = [(x[:, others], y[:, others]) for x, y in zip(half, exact, strict=True)]
    return max(float((x - y).norm() / y.norm()) for x, y in parts)


@both
@pytest.mark.parametrize("few", [False, True])
def test_float16_products_keep_the_gradients_of_many_targets(name: str, few: bool) -> None:
    """A probability over a thousand targets lies below float16's smallest number."""
    assert error_in_float16(name, few) < 2.5e-3


@both
def test_float16_products_need_the_gain_for_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "gain_for", lambda *_: 1.0)
    assert error_in_float16(name, few=False) > 1e-2


@both
@pytest.mark.parametrize("few", [False, True])
def test_float16_products_do_not_overflow(name: str, few: bool) -> None:
    """Neither a row's gradient if few of many targets count, nor the sum over a tile of many rows."""
    *inputs, targets = problem(1, 200_000, 1, 3, torch.float32)
    valid = torch.arange(200_000) == 5 if few else None
    half, exact = (
        gradients(LOSSES[name](*inputs, targets, valid=valid, product_dtype=dtype).total, *inputs)
        for dtype in (torch.float16, torch.float32)
    )
    for x, y in zip(half, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=float(0.02 * y.abs().max()))


@both
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden": torch.zeros(2, 0, 4)}, "hidden (n, t, d) with t > 0, got (2, 0, 4)"),
        ({"hidden": torch.zeros(())}, "hidden (n, t, d) with t > 0, got ()"),
        ({"hidden": torch.zeros(2, 3, 4).long()}, "hidden of floating point, got torch.int64"),
        ({"weight": torch.zeros(2, 5, 3)}, "weight (2, v, 4), got (2, 5, 3)"),
        ({"bias": torch.zeros(2, 6)}, "bias (2, 5), got (2, 6)"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets int64 (3,), got torch.int64 (4,)"),
        ({"targets": torch.zeros(3)}, "targets int64 (3,), got torch.float32 (3,)"),
        ({"targets": torch.tensor([0, 5, 1])}, "targets in [0, 5), got 0..5"),
        ({"targets": torch.tensor([0, -1, 1])}, "targets in [0, 5), got -1..1"),
        ({"valid": torch.ones(3)}, "valid bool (3,), got torch.float32 (3,)"),
        ({"temperature": 0.0}, "temperature, a finite number > 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature, a finite number > 0, got nan"),
        ({"temperature": "1"}, "temperature, a finite number > 0, got '1'"),
        ({"ce_weight": float("inf")}, "ce_weight, a finite number, got inf"),
        ({"kd_weight": True}, "kd_weight, a finite number, got True"),
        ({"tile_rows": 0}, "tile_rows, a whole number >= 1, got 0"),
        ({"tile_rows": 1.5}, "tile_rows, a whole number >= 1, got 1.5"),
    ],
)
def test_bad_input_is_refused(name: str, change: dict[str, Any], text: str) -> None:
    given = dict(zip(("hidden", "weight", "bias", "targets"), problem(2, 3, 4, 5), strict=True))
    with pytest.raises(EnsembleKDError, match="^" + re.escape(f"{name}: expected {text}. ")):
        LOSSES[name](**(given | change))


@pytest.mark.slow
def test_only_a_compilation_loads_the_compiler() -> None:
    """It would take over a second of every import."""
    code = """
import sys
import torch
from ensemble_kd.losses import item_losses
hidden, weight = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(2, 5, 4)
item_losses(hidden, weight, None, torch.tensor([0, 4, 2]), kd_weight=0.5).total.backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_members_that_do_not_meet_are_walked_as_if_alone(dtype: torch.dtype) -> None:
    """Bit for bit: without KD each by itself; with KD between equals, one kind after the other, in any order."""
    inputs = problem(4, 7, 4, 5, dtype=torch.float32)
    *tensors, targets = inputs
    for kinds, between, kd_weight in (((0, 1, 2, 3), "all", 0.0), ((0, 1, 0, 2), "same", 0.7)):
        options: dict[str, Any] = {"product_dtype": dtype, "tile_rows": 3, "kd_weight": kd_weight, "temperature": 0.5}
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        together = item_losses(*leaves, targets, between=between, kinds=kinds, **options)
        together.total.backward()
        total, kd = torch.zeros(()), torch.zeros(())
        for kind in dict.fromkeys(kinds):
            own = [i for i, other in enumerate(kinds) if other == kind]
            part = [x.detach()[own].clone().requires_grad_() for x in tensors]
            alone = item_losses(*part, targets, **options)
            alone.total.backward()
            assert torch.equal(alone.cross_entropy, together.cross_entropy[own])
            for x, y in zip(part, leaves, strict=True):
                assert torch.equal(x.grad, y.grad[own])  # type: ignore[index, arg-type]
            total, kd = total + alone.total.detach(), kd + alone.kd
        torch.testing.assert_close(together.total.detach(), total)
        torch.testing.assert_close(together.kd, kd)
