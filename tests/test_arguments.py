"""Checks of single arguments: what passes, as which type, and the wording of what does not."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble_kd import EnsembleKDError
from ensemble_kd.internal import (
    choice,
    is_whole,
    number,
    ratio,
    whole,
)

INTEGERS = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32)]
NOT_WHOLE = [True, np.True_, np.array(True), torch.tensor(True), 3.0, np.float64(3), torch.tensor(3.0), "3", b"3", None]
NOT_WHOLE += [[3], np.array([3]), torch.tensor([3]), torch.tensor(3, device="meta"), Decimal(3), 3 + 0j, math.nan]
NUMBERS = [0.5, np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)]
NOT_NUMBERS = [
    True,
    np.True_,
    torch.tensor(True),
    "0.5",
    None,
    [0.5],
    np.array([0.5]),
    torch.tensor([0.5]),
    1j,
    10**400,
]
NOT_NUMBERS += [math.nan, math.inf, -math.inf, np.float64("nan"), torch.tensor(math.nan), np.datetime64("2020")]


@pytest.mark.parametrize("value", INTEGERS, ids=lambda value: type(value).__name__)
def test_whole_numbers_of_every_kind_come_out_as_int(value: object) -> None:
    result = whole("call", "k", value, least=3, most=3)
    assert type(result) is int
    assert result == 3
    assert is_whole(value)


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_nothing_else_is_a_whole_number(value: object) -> None:
    assert not is_whole(value)
    with pytest.raises(EnsembleKDError, match=r"call: expected k, a whole number, got .*. Pass such a number."):
        whole("call", "k", value)


@given(value=st.integers(), least=st.none() | st.integers(), most=st.none() | st.integers())
def test_bounds_of_whole_numbers_belong_to_the_range(value: int, least: int | None, most: int | None) -> None:
    fits = (least is None or least <= value) and (most is None or value <= most)
    if fits:
        assert whole("call", "k", value, least=least, most=most) == value
    else:
        with pytest.raises(EnsembleKDError):
            whole("call", "k", value, least=least, most=most)


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [(None, None, "number,"), (1, None, "number >= 1,"), (None, 9, "number <= 9,"), (1, 9, "number in 1..9,")],
)
def test_the_message_names_the_bounds_of_whole_numbers(least: int | None, most: int | None, words: str) -> None:
    with pytest.raises(EnsembleKDError) as error:
        whole("call", "k", "x", least=least, most=most)
    assert words in str(error.value)


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: type(value).__name__)
def test_real_numbers_of_every_kind_come_out_as_float(value: object) -> None:
    result = number("call", "lr", value)
    assert type(result) is float
    assert result == 0.5


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: repr(value)[:20])
def test_nothing_else_is_a_number(value: object) -> None:
    with pytest.raises(EnsembleKDError, match=r"call: expected lr, a finite number, got .*. Pass such a number."):
        number("call", "lr", value)


def test_infinity_passes_only_if_it_is_the_upper_bound() -> None:
    assert number("call", "seconds", math.inf, least=0, most=math.inf) == math.inf
    for value in (math.nan, -math.inf):
        with pytest.raises(EnsembleKDError, match="expected seconds, a number, got"):
            number("call", "seconds", value, most=math.inf)
    with pytest.raises(EnsembleKDError, match="expected seconds, a finite number >= 0, got inf"):
        number("call", "seconds", math.inf, least=0)


@given(value=st.integers(-3, 3), low=st.integers(-3, 3), high=st.integers(-3, 3))
def test_open_and_closed_bounds(value: int, low: int, high: int) -> None:
    for closed_low in (True, False):
        for closed_high in (True, False):
            bounds = {"least" if closed_low else "above": low, "most" if closed_high else "below": high}
            fits = (low <= value if closed_low else low < value) and (value <= high if closed_high else value < high)
            if fits:
                assert number("call", "x", value, **bounds) == value
            else:
                interval = f"{'[' if closed_low else '('}{low}, {high}{']' if closed_high else ')'}"
                with pytest.raises(EnsembleKDError) as error:
                    number("call", "x", value, **bounds)
                assert f"x, a number in {interval}, got {value}." in str(error.value)


def test_the_message_names_single_bounds() -> None:
    for bounds, words in (({"least": 0}, ">= 0"), ({"above": 0}, "> 0"), ({"most": 0}, "<= 0"), ({"below": 0}, "< 0")):
        with pytest.raises(EnsembleKDError) as error:
            number("call", "x", math.nan, **bounds)
        assert f"x, a finite number {words}, got nan" in str(error.value)


def test_a_ratio_is_a_share_of_one() -> None:
    assert [ratio("call", "share", value) for value in (0, 0.25, 1)] == [0.0, 0.25, 1.0]
    for value in (-1e-9, 1 + 1e-9, math.nan, True):
        with pytest.raises(EnsembleKDError, match=r"share, a number in \[0, 1\]"):
            ratio("call", "share", value)
    with pytest.raises(EnsembleKDError, match=r"share, a number in \(0, 1\]"):
        ratio("call", "share", 0, above_zero=True)


def test_a_choice_is_one_of_the_choices_and_of_their_type() -> None:
    assert choice("call", "how", "a", ("a", "b")) == "a"
    for value in ("c", None, 1, ["a"], np.array(["a", "b"]), torch.zeros(2)):
        with pytest.raises(EnsembleKDError, match=r"call: expected how 'a' or 'b', got .*. Choose one of these."):
            choice("call", "how", value, ("a", "b"))
    with pytest.raises(EnsembleKDError, match="expected how 1, got True"):
        choice("call", "how", True, (1,))
    with pytest.raises(EnsembleKDError, match="expected how 'a', 'b' or None, got 'c'"):
        choice("call", "how", "c", ("a", "b", None))


def test_messages_stay_short() -> None:
    with pytest.raises(EnsembleKDError) as error:
        whole("call", "k", list(range(10_000)))
    assert len(str(error.value)) < 150
    with pytest.raises(EnsembleKDError, match=r"got ndarray \(1000, 2\) float64"):
        whole("call", "k", np.zeros((1000, 2)))
