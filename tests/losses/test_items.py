"""The fused loss against the plain formula: float64, stored logits, one pair of members at a time."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import ItemLosses, compile_status, item_losses

settings.register_profile("fused", deadline=None, max_examples=40)
settings.load_profile("fused")

sizes = st.tuples(*(st.integers(1, top) for top in (4, 9, 5, 12)))  # n, t, d, v
temperatures = st.floats(0.1, 5)
seeds = st.integers(0, 2**31)


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


@given(sizes, temperatures, seeds, st.booleans(), st.floats(0, 2), st.floats(0.01, 2), st.booleans())
def test_equals_the_stored_formula(sizes, temperature, seed, with_bias, ce_weight, kd_weight, squared):
    hidden, weight, bias, targets = problem(*sizes, seed)
    bias = bias if with_bias else None
    cross_entropy, kd = stored(logits_of(hidden, weight, bias), targets, temperature)
    kd = kd * (temperature**2 if squared else 1)
    total = ce_weight * cross_entropy.sum() + kd_weight * kd
    losses = item_losses(
        hidden,
        weight,
        bias,
        targets,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        temperature=temperature,
        scale_by_temperature_squared=squared,
    )
    assert_same(losses, ItemLosses(total, cross_entropy, kd), rtol=1e-9, atol=1e-10)
    assert_same(gradients(losses.total, hidden, weight, bias), gradients(total, hidden, weight, bias))
    assert not losses.cross_entropy.requires_grad
    assert not losses.kd.requires_grad


@given(sizes, temperatures, seeds)
def test_gradient_in_the_logits_is_linear_in_the_members(sizes, temperature, seed):
    """With the identity as classifier the hidden states are the logits: (N z_y − S) / τ / t, rows summing to 0."""
    n, t, _, v = sizes
    logits = problem(n, t, v, v, seed)[0]
    losses = item_losses(
        logits,
        torch.eye(v, dtype=torch.float64).expand(n, v, v),
        None,
        torch.zeros(t, dtype=torch.int64),
        ce_weight=0.0,
        kd_weight=1.0,
        temperature=temperature,
    )
    (actual,) = gradients(losses.total, logits)
    z = log_probabilities(logits.detach() / temperature).exp()
    torch.testing.assert_close(actual, (n * z - z.sum(0)) / temperature / t)
    torch.testing.assert_close(actual.sum(-1), torch.zeros(n, t, dtype=torch.float64))


@given(sizes, seeds, st.integers(1, 12))
def test_tiles_of_any_size_agree(sizes, seed, tile_rows):
    hidden, weight, bias, targets = problem(*sizes, seed)
    whole, tiled = (
        item_losses(hidden, weight, bias, targets, kd_weight=0.5, temperature=0.3, tile_rows=rows)
        for rows in (len(targets), tile_rows)
    )
    assert_same(tiled, whole)
    assert_same(gradients(tiled.total, hidden, weight, bias), gradients(whole.total, hidden, weight, bias))


@given(sizes, seeds, st.data())
def test_padded_targets_count_nowhere(sizes, seed, data):
    hidden, weight, bias, targets = problem(*sizes, seed)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(targets), max_size=len(targets))))
    assume(bool(valid.any()))
    options = {"kd_weight": 0.5, "temperature": 0.3}
    expected = item_losses(hidden[:, valid], weight, bias, targets[valid], **options)
    expected_gradients = gradients(expected.total, hidden, weight, bias)
    with torch.no_grad():
        hidden[:, ~valid] = torch.nan
    padded = item_losses(hidden, weight, bias, targets.masked_fill(~valid, -7), valid=valid, tile_rows=2, **options)
    assert_same(padded, expected)
    assert_same(gradients(padded.total, hidden, weight, bias), expected_gradients)


def test_nothing_but_padding_costs_nothing():
    hidden, weight, bias, targets = problem(2, 3, 4, 5)
    losses = item_losses(hidden, weight, bias, targets, valid=torch.zeros(3, dtype=torch.bool), kd_weight=1.0)
    assert losses.total == 0
    assert all(not gradient.any() for gradient in gradients(losses.total, hidden, weight, bias))


@given(sizes, seeds)
def test_each_member_pushes_its_bias_by_nothing_in_sum(sizes, seed):
    hidden, weight, bias, targets = problem(*sizes, seed)
    losses = item_losses(hidden, weight, bias, targets, kd_weight=0.5, temperature=0.3)
    (gradient,) = gradients(losses.total, bias)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(len(bias), dtype=torch.float64))


@given(sizes, seeds)
def test_permuting_members_permutes_the_result(sizes, seed):
    hidden, weight, bias, targets = problem(*sizes, seed)
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed))
    losses = item_losses(hidden, weight, bias, targets, kd_weight=0.5)
    permuted = item_losses(hidden[order], weight[order], bias[order], targets, kd_weight=0.5)
    assert_same(permuted, ItemLosses(losses.total, losses.cross_entropy[order], losses.kd))


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


def test_identical_members_have_no_kd():
    hidden, weight, bias, targets = problem(1, 3, 4, 5)
    hidden, weight, bias = (torch.cat([x, x, x]) for x in (hidden, weight, bias))
    assert abs(item_losses(hidden, weight, bias, targets, kd_weight=1.0, temperature=0.2).kd) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(dtype):
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]], dtype=dtype, requires_grad=True)
    weight = torch.eye(3, dtype=dtype).repeat(2, 1, 1).requires_grad_()
    losses = item_losses(logits, weight, None, torch.tensor([1]), kd_weight=1.0, temperature=0.1)
    torch.testing.assert_close(losses.cross_entropy, torch.tensor([2e4, 0], dtype=dtype))
    torch.testing.assert_close(losses.kd, torch.tensor(4e5, dtype=dtype))
    assert all(gradient.isfinite().all() for gradient in gradients(losses.total, logits, weight))


def test_gradcheck():
    hidden, weight, bias, targets = problem(2, 3, 2, 4)
    # Cross-entropy alone: finite differences know nothing of teachers that are cut off.
    assert torch.autograd.gradcheck(
        lambda *x: item_losses(*x, targets, tile_rows=2, ce_weight=1.5).total, (hidden, weight, bias)
    )


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


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_what_asks_for_a_gradient_gets_one(wanted):
    *inputs, targets = problem(2, 3, 4, 5)
    expected = gradients(item_losses(*inputs, targets, kd_weight=0.5).total, *inputs)[wanted]
    frozen = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    item_losses(*frozen, targets, kd_weight=0.5).total.backward()
    torch.testing.assert_close(frozen[wanted].grad, expected)
    assert all(x.grad is None for i, x in enumerate(frozen) if i != wanted)


def test_without_gradients_the_losses_are_the_same():
    hidden, weight, bias, targets = problem(2, 3, 4, 5)
    expected = item_losses(hidden, weight, bias, targets, kd_weight=0.5)
    with torch.no_grad():
        actual = item_losses(hidden, weight, bias, targets, kd_weight=0.5)
    assert not actual.total.requires_grad
    assert_same(actual, ItemLosses(*(x.detach() for x in expected)))


def test_upstream_gradients_scale_and_a_second_backward_agrees():
    hidden, weight, bias, targets = problem(2, 3, 4, 5)
    total = item_losses(hidden, weight, bias, targets, kd_weight=0.5).total
    once = gradients(total, hidden, weight, bias)
    assert_same(gradients(-3 * total, hidden, weight, bias), [-3 * x for x in once])
    assert_same(gradients(total, hidden, weight, bias), once)


def test_double_backward_is_refused():
    hidden, weight, bias, targets = problem(2, 3, 4, 5)
    total = item_losses(hidden, weight, bias, targets, kd_weight=0.5).total
    with pytest.raises(EnsembleKDError, match="create_graph"):
        torch.autograd.grad(total, hidden, create_graph=True)


def test_inputs_and_the_global_rng_are_untouched():
    hidden, weight, bias, targets = problem(2, 3, 4, 5)
    before = [x.detach().clone() for x in (hidden, weight, bias, targets)]
    state = torch.get_rng_state()
    item_losses(hidden, weight, bias, targets, kd_weight=0.5).total.backward()
    assert_same([x.detach() for x in (hidden, weight, bias, targets)], before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


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


def test_float16_products_keep_the_gradients_of_many_targets():
    """A probability over a thousand targets lies below float16's smallest number."""
    inputs = problem(2, 1000, 4, 3000, dtype=torch.float32)
    half, full = (
        gradients(item_losses(*inputs, product_dtype=dtype).total, *inputs[:3]) for dtype in (torch.float16, None)
    )
    assert max(relative(half, [x.double() for x in full])) < 2e-3


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


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden": torch.zeros(2, 0, 4)}, "expected hidden .n, t, d. with t > 0"),
        ({"weight": torch.zeros(2, 5, 3)}, "expected weight .2, v, 4."),
        ({"bias": torch.zeros(2, 6)}, "expected bias .2, 5."),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "expected targets int64 .3,."),
        ({"targets": torch.zeros(3)}, "expected targets int64 .3,."),
        ({"targets": torch.tensor([0, 5, 1])}, r"expected targets in \[0, 5\), got 0..5"),
        ({"targets": torch.tensor([0, -1, 1])}, r"expected targets in \[0, 5\), got -1..1"),
        ({"valid": torch.ones(3)}, "expected valid bool .3,."),
        ({"temperature": 0.0}, "expected temperature > 0"),
        ({"temperature": float("nan")}, "expected temperature > 0"),
        ({"tile_rows": 0}, "expected tile_rows >= 1"),
    ],
)
def test_bad_input_is_refused(change, text):
    hidden, weight, bias, targets = problem(2, 3, 4, 5)
    options = {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets} | change
    with pytest.raises(EnsembleKDError, match=f"^item_losses: {text}"):
        item_losses(**options)
