"""KD between members of one architecture, or of other ones, in a mixed ensemble: the double loop over those pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import (
    KD,
    ItemLosses,
    Spread,
    item_losses,
    sampled_item_losses,
)
from tests.spec import reference
from tests.spec.strategies import Classified, classified
from tests.spec.test_identities import Identity, agree, close, differentiable, eager, fused_total
from tests.spec.test_mutants import HUNT
from tests.spec.zoo import played

BETWEEN = ("all", "same", "other")


def allowed(between: str, kinds: Sequence[int], x: int, y: int, fault: str = "") -> bool:
    """True if x teaches y."""
    if fault == "between ignored":
        between = "all"
    if fault == "same and other swapped":
        between = {"all": "all", "same": "other", "other": "same"}[between]
    if fault == "kinds of neighbours":
        kinds = [*kinds[1:], kinds[0]]
    if fault == "half of the ordered pairs" and x > y:
        return False
    if fault == "kind 0 teaches all" and between == "same" and kinds[x] == 0:
        return x != y
    return x != y and (between == "all" or (kinds[x] == kinds[y]) == (between == "same"))


def pairwise(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    valid: Tensor | None = None,
    kd_weight: float = 0.0,
    temperature: float = 1.0,
    between: str = "all",
    kinds: Sequence[int] = (),
    fault: str = "",
) -> ItemLosses:
    """The definition, or a wrong one."""
    kept = torch.ones(len(targets), dtype=torch.bool) if valid is None else valid
    p = reference.logits(hidden[:, kept], weight, bias)
    kd, n = p.new_zeros(()), len(p)
    for x in range(n):
        for y in range(n):
            if allowed(between, kinds, x, y, fault):
                pair = reference.kl(p[x], p[y], temperature)
                teachers = sum(allowed(between, kinds, other, y) for other in range(n))
                kd = kd + (pair / teachers if fault == "mean over teachers" else pair)
    if fault == "no gradient between kinds" and between == "other":
        kd = kd.detach()
    ce = reference.mip(p, targets[kept])
    return ItemLosses(ce.sum() + kd_weight * kd, ce.detach(), kd.detach())


def is_the_double_loop(losses: Callable[..., ItemLosses], case: Classified, kinds: list[int], tau: float) -> None:
    kinds = kinds[: len(case.hidden)]
    for between in BETWEEN:
        options: dict[str, Any] = {"kd_weight": 1.5, "temperature": tau, "between": between, "kinds": kinds}
        agree(*(fused_total(f, case, **options) for f in (losses, pairwise)), *differentiable(case))
        got, want = (f(*case[:4], valid=case.valid, **options) for f in (losses, pairwise))
        close(got.kd, want.kd)


INPUTS: dict[str, Any] = {
    "case": classified(n=st.integers(2, 4)),
    "kinds": st.lists(st.integers(0, 2), min_size=4, max_size=4),
    "tau": st.sampled_from([0.5, 1.0, 2.0]),
}
DOUBLE_LOOP = Identity(is_the_double_loop, eager, INPUTS)


def test_mixed_kd_is_the_double_loop() -> None:
    DOUBLE_LOOP.hold(eager)


@pytest.mark.parametrize(
    "fault",
    [
        "between ignored",
        "same and other swapped",
        "kinds of neighbours",
        "half of the ordered pairs",
        "kind 0 teaches all",
        "mean over teachers",
        "no gradient between kinds",
    ],
)
def test_mixed_kd_mutant(fault: str) -> None:
    with pytest.raises(AssertionError):
        DOUBLE_LOOP.hold(partial(pairwise, fault=fault), HUNT)


@given(**INPUTS)
def test_mixed_kd_of_same_and_other_is_that_of_all(case: Classified, kinds: list[int], tau: float) -> None:
    losses = partial(item_losses, compiled=False, kinds=kinds[: len(case.hidden)])

    def both(*x: Tensor) -> Tensor:
        parts = [fused_total(losses, case, kd_weight=2.0, temperature=tau, between=b)(*x) for b in ("same", "other")]
        return sum(parts) - fused_total(losses, case)(*x)  # the cross-entropy stands in both

    agree(both, fused_total(losses, case, kd_weight=2.0, temperature=tau), *differentiable(case))


@settings(max_examples=20)
@given(**INPUTS)
def test_mixed_kd_over_processes(case: Classified, kinds: list[int], tau: float) -> None:
    """Two processes with members of the same kinds, of which one is played by what it would send."""
    n, kinds = len(case.hidden), kinds[: len(case.hidden)]
    other = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.hidden.shape, generator=other, dtype=torch.float64)
    weight = torch.randn(case.weight.shape, generator=other, dtype=torch.float64)

    def over(hidden: Tensor, weight: Tensor, bias: Tensor | None, spread: Spread) -> ItemLosses:
        return item_losses(
            hidden, weight, bias, case.targets, valid=case.valid, kd_weight=1.0, temperature=tau, between=between,
            kinds=kinds, spread=spread,
        )  # fmt: skip

    for between in BETWEEN:
        parts = []
        for mine, theirs in ((0, 1), (1, 0)):
            both = [(case.hidden, case.weight, case.bias), (hidden, weight, case.bias)]
            parts.append(over(*both[mine], played(2 * n, partial(over, *both[theirs]))).kd)
        joined = item_losses(
            torch.cat([case.hidden, hidden]), torch.cat([case.weight, weight]),
            None if case.bias is None else torch.cat([case.bias, case.bias]), case.targets, valid=case.valid,
            kd_weight=1.0, temperature=tau, between=between, kinds=[*kinds, *kinds],
        )  # fmt: skip
        if between == "other" and len(set(kinds)) == 1:
            assert parts == [0, 0]
        close(sum(parts), joined.kd)


def test_mixed_kd_over_candidates() -> None:
    """All items as candidates that count once are no sample."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(3, 5, 4), torch.randn(3, 7, 4), torch.randn(3, 7)
    targets, counts = torch.tensor([0, 3, 6, 2, 2]), torch.ones(7, dtype=torch.long)
    for between in BETWEEN:
        options: Any = {"kd_weight": 1.0, "temperature": 0.5, "between": between, "kinds": (0, 1, 1)}
        got = sampled_item_losses(hidden, weight, bias, targets, counts, **options)
        close(got.kd, item_losses(hidden, weight, bias, targets, **options).kd, 1e-5)


@pytest.mark.slow
def test_mixed_kd_compiles() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(3, 5, 4), torch.randn(3, 7, 4), torch.randn(3, 7)
    targets = torch.tensor([0, 3, 6, 2, 2])
    for between in ("same", "other"):
        totals = []
        for compiled in (True, False):
            leaf = hidden.clone().requires_grad_()
            options: Any = {"kd_weight": 1.0, "between": between, "kinds": (0, 1, 1), "compiled": compiled}
            found = item_losses(leaf, weight, bias, targets, **options)
            found.total.backward()
            totals.append((found.total.detach(), leaf.grad))
        for got, want in zip(*totals, strict=True):
            close(got, want, 1e-5)


def test_mixed_kd_needs_kinds() -> None:
    hidden, weight, targets = torch.zeros(2, 1, 1), torch.zeros(2, 3, 1), torch.tensor([0])
    for kinds, got in ((None, "none"), ((0,), "1")):
        with pytest.raises(EnsembleKDError) as error:
            item_losses(hidden, weight, None, targets, between="same", kinds=kinds)
        assert str(error.value) == (
            f"item_losses: expected 2 kinds, one per member, for between='same', got {got}. "
            "Pass kinds=[0, 0, 1], say: equal numbers for members of one architecture."
        )
    with pytest.raises(EnsembleKDError, match="KD: expected between"):
        KD(between="some")  # type: ignore[arg-type]
