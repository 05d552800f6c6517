"""The item losses where they are special: extreme logits, low precision, compilation, tied classifiers.

That they equal the plain formulas is the specification's to say, see ``tests/spec``.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from ensemble_kd.losses import ItemLosses, compile_status, item_losses


def problem(n: int, t: int, d: int, v: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=rng, dtype=dtype).requires_grad_() for shape in ((n, t, d), (n, v, d), (n, v))
    )
    return hidden, weight, bias, torch.randint(0, v, (t,), generator=rng)


def log_probabilities(logits: Tensor) -> Tensor:
    return logits - torch.logsumexp(logits, -1, keepdim=True)


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = torch.einsum("ntd,nvd->ntv", hidden, weight)
    return logits if bias is None else logits + bias[:, None]


def stored(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropies (n,) and KD () from logits held in full: mean over targets, sum over ordered pairs."""
    n, t, _ = logits.shape
    cross_entropy = torch.stack([-log_probabilities(member)[torch.arange(t), targets].mean() for member in logits])
    kd = logits.new_zeros(())
    for x in range(n):
        for y in range(n):
            if x != y:
                teacher = log_probabilities(logits[x].detach() / temperature)
                student = log_probabilities(logits[y] / temperature)
                kd = kd + (teacher.exp() * (teacher - student)).sum(-1).mean()
    return cross_entropy, kd


def gradients(total: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(total, [x for x in inputs if x is not None], retain_graph=True))


def assert_same(actual: ItemLosses | list[Tensor], expected: ItemLosses | list[Tensor], **tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


def test_kd_is_computed_only_where_it_counts():
    hidden, weight, bias, targets = problem(2, 3, 4, 5)
    assert item_losses(hidden, weight, bias, targets).kd == 0
    shown = item_losses(hidden, weight, bias, targets, temperature=0.5, compute_kd=True)
    torch.testing.assert_close(shown.kd, stored(logits_of(hidden, weight, bias), targets, 0.5)[1].detach())
    silent = item_losses(hidden, weight, bias, targets)
    assert_same(gradients(shown.total, hidden, weight, bias), gradients(silent.total, hidden, weight, bias))
    assert_same(shown[:2], silent[:2])


def test_one_member_has_nobody_to_learn_from():
    hidden, weight, bias, targets = problem(1, 3, 4, 5)
    losses = item_losses(hidden, weight, bias, targets, kd_weight=1.0, compute_kd=True)
    assert losses.kd == 0
    torch.testing.assert_close(losses.total, losses.cross_entropy.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(dtype):
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]], dtype=dtype, requires_grad=True)
    weight = torch.eye(3, dtype=dtype).repeat(2, 1, 1).requires_grad_()
    losses = item_losses(logits, weight, None, torch.tensor([1]), kd_weight=1.0, temperature=0.1)
    torch.testing.assert_close(losses.cross_entropy, torch.tensor([2e4, 0], dtype=dtype))
    torch.testing.assert_close(losses.kd, torch.tensor(4e5, dtype=dtype))
    assert all(gradient.isfinite().all() for gradient in gradients(losses.total, logits, weight))


def test_tied_classifiers_pass_a_view_and_its_source_learns():
    hidden, _, bias, targets = problem(3, 4, 5, 6)
    table = torch.randn(3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    copied = table.detach()[:, 1:7].clone().requires_grad_()
    tied = item_losses(hidden, table[:, 1:7], bias, targets, kd_weight=0.5)
    plain = item_losses(hidden, copied, bias, targets, kd_weight=0.5)
    assert_same(tied, plain)
    (gradient,) = gradients(tied.total, table)
    torch.testing.assert_close(gradient[:, 1:7], *gradients(plain.total, copied))
    assert not gradient[:, [0, 7]].any()


def relative(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - e).norm() / e.norm()) for a, e in zip(actual, exact, strict=True)]


@pytest.mark.parametrize(("product", "slack"), [(torch.float32, 1.0), (torch.bfloat16, 1.5)])
def test_error_is_no_more_than_that_of_stored_logits(product, slack):
    """Against float64, beside logits stored from products of the same precision."""
    inputs = problem(3, 96, 16, 700, seed=5, dtype=torch.float32)
    hidden, weight, bias, targets = inputs
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]

    def everything(cross_entropy: Tensor, kd: Tensor, total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [cross_entropy.detach(), kd.detach(), *gradients(total, *leaves)]

    cross_entropy, kd = stored(logits_of(*exact_inputs), targets, 0.3)
    exact = everything(cross_entropy, kd, cross_entropy.sum() + 0.1 * kd, exact_inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=product == torch.bfloat16):
        logits = torch.bmm(hidden, weight.mT).float()
    cross_entropy, kd = stored(logits + bias[:, None], targets, 0.3)
    plain = everything(cross_entropy, kd, cross_entropy.sum() + 0.1 * kd, [hidden, weight, bias])
    losses = item_losses(
        hidden, weight, bias, targets, kd_weight=0.1, temperature=0.3, product_dtype=product, tile_rows=40
    )
    fused = everything(losses.cross_entropy, losses.kd, losses.total, [hidden, weight, bias])
    for name, ours, theirs in zip(
        ("ce", "kd", "dh", "dw", "db"), relative(fused, exact), relative(plain, exact), strict=True
    ):
        assert ours <= slack * theirs + torch.finfo(torch.float32).eps, (name, ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_chooses_the_products_and_nothing_else(dtype):
    inputs = problem(2, 5, 4, 6, dtype=torch.float32)
    asked = item_losses(*inputs, kd_weight=0.5, product_dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        cast = item_losses(*inputs, kd_weight=0.5)
    assert cast.total.dtype == torch.float32
    assert_same(cast, asked, rtol=0, atol=0)
    actual = gradients(cast.total, *inputs[:3])
    assert_same(actual, gradients(asked.total, *inputs[:3]), rtol=0, atol=0)
    full = item_losses(*inputs, kd_weight=0.5)
    assert not torch.equal(full.total, cast.total)  # the products did change
    assert_same(actual, gradients(full.total, *inputs[:3]), rtol=0.05, atol=0.01)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("default")  # torch's compiler warns about its own deprecations
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(product):
    for t in (7, 5):  # one compilation serves any number of targets, a last tile with a single row included
        inputs = problem(2, t, 4, 37, dtype=torch.float32)
        eager, compiled = (
            item_losses(*inputs, kd_weight=0.5, temperature=0.3, product_dtype=product, tile_rows=3, compiled=flag)
            for flag in (False, True)
        )
        assert_same(compiled, eager)
        # One unit in the last place of bfloat16 may fall either way.
        tolerance = {} if product == torch.float32 else {"rtol": 0.02, "atol": 1e-3}
        assert_same(gradients(compiled.total, *inputs[:3]), gradients(eager.total, *inputs[:3]), **tolerance)
    assert compile_status() == "compiled"
