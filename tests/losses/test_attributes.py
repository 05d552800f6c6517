"""The tiled attribute loss against the plain one, which the identities hold to the paper."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble_kd import EnsembleKDError
from ensemble_kd.functional import attribute_cross_entropy
from ensemble_kd.losses import attribute_losses
from ensemble_kd.losses import attributes as fused_attributes

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@st.composite
def cases(draw: st.DrawFn, scales: tuple[float, ...] = (0.0, 1.0, 60.0)) -> Case:
    n, t, d, a, k = (draw(st.integers(1, high)) for high in (3, 6, 3, 5, 3))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shapes = ((n, t, d), (n, a, d), (n, a))
    hidden, weight, bias = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    rows = [draw(st.lists(st.integers(0, a - 1), max_size=min(k, a), unique=True)) for _ in range(t)]
    attributes = torch.tensor([row + [-1] * (k - len(row)) for row in rows])
    real = torch.tensor([True] + [draw(st.booleans()) for _ in range(t - 1)])
    return hidden * draw(st.sampled_from(scales)), weight, bias, attributes, real


def drawn(n: int, t: int, d: int, a: int) -> Case:
    rng = torch.Generator().manual_seed(0)
    shapes = ((n, t, d), (n, a, d), (n, a))
    hidden, weight, bias = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return hidden, weight, bias, torch.randint(-1, a, (t, 1), generator=rng), torch.arange(t) != 1


def with_gradients(loss: Any, case: Case, factors: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in case[:3]]
    losses = loss(*leaves, *case[3:])
    (losses * factors).sum().backward()
    return [losses.detach(), *(x.grad for x in leaves if x.grad is not None)]


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, attributes: Tensor, real: Tensor) -> Tensor:
    return attribute_cross_entropy(torch.baddbmm(bias[:, None], hidden, weight.mT), attributes, real)


@settings(deadline=None)
@given(cases(), st.integers(1, 40))
def test_losses_and_gradients_are_those_of_the_plain_form(case: Case, tile: int) -> None:
    factors = torch.linspace(0.5, 2, len(case[0]), dtype=torch.float64)  # each member's gradient takes its own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_attributes, "_TILE_BYTES", {"cpu": tile * 4, "cuda": tile * 4})
        found = with_gradients(attribute_losses, case, factors)
    want = with_gradients(plain, case, factors)
    assert len(found) == len(want) == 4
    for x, y in zip(found, want, strict=True):
        # F.softplus, of the plain form, takes x for softplus(x) beyond 20: an error of up to exp(-20) = 2e-9 a term.
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


@settings(deadline=None)
@given(cases(scales=(1.0,)))
def test_padding_may_hold_anything(case: Case) -> None:
    spoilt = case[0].masked_fill(~case[4][:, None], torch.nan)
    factors = torch.ones(len(case[0]), dtype=torch.float64)
    for x, y in zip(
        with_gradients(attribute_losses, (spoilt, *case[1:]), factors),
        with_gradients(attribute_losses, case, factors),
        strict=True,
    ):
        assert torch.equal(x, y)


@settings(deadline=None)
@given(cases(scales=(1.0,)))
def test_bfloat16_products_round_and_no_more(case: Case) -> None:
    case = (*(x.float() for x in case[:3]), *case[3:])  # type: ignore[assignment]
    factors = torch.ones(len(case[0]))

    def rounded(*args: Tensor) -> Tensor:
        return attribute_losses(*args, product_dtype=torch.bfloat16)

    for x, y in zip(with_gradients(rounded, case, factors), with_gradients(plain, case, factors), strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.02)


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, bias = torch.randn(2, 3, 4), torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5)
    attributes, real = torch.tensor([[1], [2], [-1]]), torch.ones(3, dtype=torch.bool)
    assert not attribute_losses(hidden, weight.detach(), bias, attributes, real).requires_grad
    losses = attribute_losses(hidden, weight, bias, attributes, real)
    losses.sum().backward()
    assert weight.grad is not None
    assert hidden.grad is None


def test_a_second_derivative_is_refused() -> None:
    bias = torch.zeros(1, 2, requires_grad=True)
    losses = attribute_losses(
        torch.zeros(1, 1, 3), torch.zeros(1, 2, 3), bias, torch.tensor([[0]]), torch.tensor([True])
    )
    with pytest.raises(EnsembleKDError, match="attribute_losses: expected one backward pass, got create_graph=True"):
        torch.autograd.grad(losses.sum(), bias, create_graph=True)


def test_a_second_backward_repeats_the_first() -> None:
    case = drawn(2, 5, 3, 4)
    leaves = [x.requires_grad_() for x in case[:3]]
    total = attribute_losses(*case).sum()
    once, scaled, again = (torch.autograd.grad(f * total, leaves, retain_graph=True) for f in (1.0, -3.0, 1.0))
    for x, y, z in zip(once, scaled, again, strict=True):
        torch.testing.assert_close(y, -3 * x)
        assert torch.equal(z, x)


def test_nothing_but_padding_costs_nothing() -> None:
    case = drawn(2, 5, 3, 4)
    leaves = [x.requires_grad_() for x in case[:3]]
    losses = attribute_losses(*case[:4], torch.zeros(5, dtype=torch.bool))
    assert losses.eq(0).all()
    assert all(not grad.any() for grad in torch.autograd.grad(losses.sum(), leaves))


@pytest.mark.parametrize("t", [600, 200_000])
def test_float16_products_keep_small_gradients_and_do_not_overflow(t: int) -> None:
    """A gradient of the mean over positions and attributes lies below float16's smallest number."""
    case = drawn(1, t, 2, 50 if t > 1000 else 800)
    case = (*((0.5 * x).float() for x in case[:3]), *case[3:])  # type: ignore[assignment]
    leaves = [x.requires_grad_() for x in case[:3]]
    half, exact = (
        torch.autograd.grad(attribute_losses(*case, product_dtype=dtype).sum(), leaves)
        for dtype in (torch.float16, torch.float32)
    )
    for x, y in zip(half, exact, strict=True):
        assert (x - y).norm() < 3e-3 * y.norm()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden": torch.zeros(5, 3)}, "hidden (n, t, d) with t > 0, got (5, 3)"),
        ({"weight": torch.zeros(2, 4, 2)}, "weight (2, a, 3), got (2, 4, 2)"),
        ({"bias": torch.zeros(2, 3)}, "bias (2, 4), got (2, 3)"),
        ({"bias": torch.zeros(2, 4).long()}, "bias of floating point, got torch.int64"),
        ({"attributes": torch.zeros(4, 2).long()}, "attributes int64 (5, k), got torch.int64 (4, 2)"),
        ({"attributes": torch.zeros(5, 2)}, "attributes int64 (5, k), got torch.float32 (5, 2)"),
        ({"attributes": torch.full((5, 2), 4)}, "attributes in [0, 4), or -1, got 4"),
        ({"real": torch.ones(5)}, "real bool (5,), got torch.float32 (5,)"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Tensor], text: str) -> None:
    given = dict(zip(("hidden", "weight", "bias", "attributes", "real"), drawn(2, 5, 3, 4), strict=True))
    with pytest.raises(EnsembleKDError, match="^" + re.escape(f"attribute_losses: expected {text}. ")):
        attribute_losses(**(given | change))
