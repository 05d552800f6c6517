"""Losses as values: the algebra, what ``repr`` shows, what is refused and in which words."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import (
    AP,
    CCL,
    ICL,
    KD,
    Ambiguity,
    Loss,
    LossName,
    Need,
    Term,
    terms_by_name,
)

temperatures = st.floats(1e-3, 1e3)
pools = st.sampled_from(["flatten", "mean", "last"])
variants = st.sampled_from(["paper", "reference_code"])
terms: st.SearchStrategy[Term] = st.one_of(
    st.just(AP()),
    st.just(Ambiguity()),
    st.builds(ICL, temperature=temperatures, pool=pools, variant=variants),
    st.builds(CCL, temperature=temperatures, pool=pools, variant=variants),
    st.builds(
        KD,
        temperature=temperatures,
        scale_by_temperature_squared=st.booleans(),
        part=st.sampled_from(["all", "target"]),
        gate=st.sampled_from(["open", "better"]),
    ),
)
weights = st.floats(0, 100, allow_subnormal=False)
losses: st.SearchStrategy[Loss] = st.recursive(
    terms,
    lambda inner: (
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1])
        | st.tuples(weights, inner).map(lambda pair: pair[0] * pair[1])
    ),
    max_leaves=5,
)


def weighted(loss: Loss) -> dict[Term, float]:
    return {term: weight for weight, term in loss.weighted()}


def same(one: Loss, other: Loss) -> None:
    """Equal terms in any order, weights equal up to rounding."""
    a, b = weighted(one), weighted(other)
    assert a.keys() == b.keys()
    assert all(math.isclose(a[term], b[term], rel_tol=1e-12, abs_tol=1e-300) for term in a)


@given(losses)
def test_repr_is_what_you_would_type(loss: Loss) -> None:
    assert eval(repr(loss)) == loss


@pytest.mark.parametrize("loss", [1 * ICL(), KD() + 0 * KD(), 0.5 * AP() + 0.5 * AP()])
def test_repr_of_a_term_of_weight_one(loss: Loss) -> None:
    assert eval(repr(loss)) == loss


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (AP() + 0.01 * (ICL() + CCL()), "AP() + 0.01 * ICL(temperature=0.3) + 0.01 * CCL(temperature=0.3)"),
        (
            KD(temperature=2.0, scale_by_temperature_squared=True),
            "KD(temperature=2.0, scale_by_temperature_squared=True)",
        ),
        (
            0.5 * ICL(pool="last", variant="reference_code"),
            "0.5 * ICL(temperature=0.3, pool='last', variant='reference_code')",
        ),
        (KD() + KD(), "2.0 * KD(temperature=0.3)"),
    ],
)
def test_repr(loss: Loss, text: str) -> None:
    assert repr(loss) == text


@given(losses, losses, losses, weights, weights)
def test_sums_and_weights_are_those_of_numbers(x: Loss, y: Loss, z: Loss, a: float, b: float) -> None:
    same(x + y, y + x)
    same((x + y) + z, x + (y + z))
    same(a * (x + y), a * x + a * y)
    same(a * x + b * x, (a + b) * x)
    same(a * (b * x), (a * b) * x)
    same(x * a, a * x)
    same(1 * x, x)
    same(sum([x, y, z]), x + y + z)  # type: ignore[arg-type]
    assert x + 0 == x == 0 + x


@pytest.mark.parametrize("kind", [np.float32, np.int64, np.float64, int])
def test_numbers_of_other_kinds_are_numbers(kind: Any) -> None:
    assert repr(KD(temperature=kind(2))) == "KD(temperature=2.0)"
    assert repr(ICL() * kind(2)) == "2.0 * ICL(temperature=0.3)"


@given(losses)
def test_losses_are_values(loss: Loss) -> None:
    assert pickle.loads(pickle.dumps(loss)) == loss == copy.deepcopy(loss)
    assert hash(copy.deepcopy(loss)) == hash(loss)
    assert len({loss, copy.deepcopy(loss)}) == 1


@given(terms)
def test_terms_are_frozen(term: Term) -> None:
    with pytest.raises(AttributeError):
        setattr(term, "temperature", 1.0)  # noqa: B010  the assignment itself does not type-check


def test_only_ambiguity_takes_a_weight_below_0() -> None:
    assert repr(AP() + -0.5 * Ambiguity()) == "AP() + -0.5 * Ambiguity()"
    assert 2 * (-0.5 * Ambiguity()) == -1 * Ambiguity()
    assert eval("-0.5 * Ambiguity() + AP()") == -0.5 * Ambiguity() + AP()
    assert terms_by_name(-1 * Ambiguity() + KD()) == {"ambiguity": (-1.0, Ambiguity()), "kd": (1.0, KD())}
    for loss in (KD(), AP() + Ambiguity(), 0 * KD() + Ambiguity()):
        with pytest.raises(
            EnsembleKDError, match=r"losses: expected the weight of a loss, a finite number >= 0, got -1"
        ):
            -1 * loss
    with pytest.raises(EnsembleKDError, match=r"losses: expected a weight of Ambiguity >= -1, got -1.5"):
        terms_by_name(3 * (-0.5 * Ambiguity()))


def test_terms_of_one_kind_and_setting_merge() -> None:
    assert (0.5 * ICL() + ICL() + KD()).weighted() == ((1.5, ICL()), (1.0, KD()))
    assert len((ICL() + CCL()).weighted()) == 2, "equal fields, yet different losses"


def test_terms_by_name_leaves_out_what_weighs_nothing() -> None:
    assert terms_by_name(0) == {}
    assert terms_by_name(0 * AP() + 2 * KD()) == {"kd": (2.0, KD())}
    assert terms_by_name(0 * ICL(temperature=1.0) + ICL()) == {"icl": (1.0, ICL())}


@pytest.mark.parametrize(
    ("term", "name", "needs"),
    [
        (AP(), "ap", {"anchor", "attributes"}),
        (ICL(), "icl", {"anchor", "views"}),
        (CCL(), "ccl", {"anchor", "views"}),
        (KD(), "kd", {"logits"}),
    ],
)
def test_terms_declare_what_they_need(term: Term, name: LossName, needs: set[Need]) -> None:
    assert term.name == name
    assert term.needs == needs


NAN, INF = float("nan"), float("inf")
REFUSED: dict[str, tuple[Any, str]] = {
    "negative weight": (
        lambda: -0.1 * ICL(),
        "losses: expected the weight of a loss, a finite number >= 0, got -0.1. Pass such a number.",
    ),
    "weight nan": (
        lambda: NAN * ICL(),
        "losses: expected the weight of a loss, a finite number >= 0, got nan. Pass such a number.",
    ),
    "weight inf": (
        lambda: ICL() * INF,
        "losses: expected the weight of a loss, a finite number >= 0, got inf. Pass such a number.",
    ),
    "weight True": (
        lambda: True * ICL(),
        "losses: expected the weight of a loss, a finite number >= 0, got True. Pass such a number.",
    ),
    "temperature 0": (
        lambda: ICL(temperature=0),
        "ICL: expected temperature, a finite number > 0, got 0. Pass such a number.",
    ),
    "temperature negative": (
        lambda: CCL(temperature=-1.0),
        "CCL: expected temperature, a finite number > 0, got -1.0. Pass such a number.",
    ),
    "temperature nan": (
        lambda: KD(temperature=NAN),
        "KD: expected temperature, a finite number > 0, got nan. Pass such a number.",
    ),
    "temperature text": (
        lambda: KD(temperature="0.3"),  # type: ignore[arg-type]
        "KD: expected temperature, a finite number > 0, got '0.3'. Pass such a number.",
    ),
    "pool": (
        lambda: ICL(pool="max"),  # type: ignore[arg-type]
        "ICL: expected pool 'flatten', 'mean' or 'last', got 'max'. Choose one of these.",
    ),
    "variant": (
        lambda: CCL(variant="code"),  # type: ignore[arg-type]
        "CCL: expected variant 'paper' or 'reference_code', got 'code'. Choose one of these.",
    ),
    "two settings": (
        lambda: terms_by_name(KD() + KD(temperature=1.0)),
        "losses: expected one KD term, got KD(temperature=0.3) and KD(temperature=1.0). "
        "Give both the same settings, or leave one out.",
    ),
    "a class": (
        lambda: terms_by_name(KD),  # type: ignore[arg-type]
        "losses: expected a sum of ICL, CCL, KD, Ambiguity, AP, or 0 for none, got <class "
        "'ensemble_kd.losses.terms.KD'>. See ensemble_kd.losses.",
    ),
    "a number": (
        lambda: terms_by_name(1),
        "losses: expected a sum of ICL, CCL, KD, Ambiguity, AP, or 0 for none, got 1. See ensemble_kd.losses.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_to_do(case: str) -> None:
    make, text = REFUSED[case]
    with pytest.raises(EnsembleKDError) as error:
        make()
    assert str(error.value) == text


@pytest.mark.parametrize("make", [lambda: KD() + 1, lambda: KD() + "kd", lambda: KD() * KD()])
def test_other_types_do_not_mix_with_losses(make: Any) -> None:
    with pytest.raises(TypeError):
        make()


@pytest.mark.parametrize(("loss", "option"), [(AP, "temperature"), (KD, "tau"), (ICL, "pooling")])
def test_unknown_options_are_refused(loss: Any, option: str) -> None:
    with pytest.raises(TypeError, match=option):
        loss(**{option: 1.0})
