"""The source's own ids, their numbers, and the way through JSON."""

from __future__ import annotations

import uuid

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_kd.data import SequenceData, Vocabulary
from ensemble_kd.errors import EnsembleKDError

NAMES = st.one_of(
    st.lists(st.text(), unique=True),
    st.lists(st.integers(), unique=True),
    st.lists(st.uuids(), unique=True),
    st.lists(st.binary(), unique=True),
    st.lists(st.floats(allow_nan=False), unique=True),
)


@given(NAMES)
def test_names_and_numbers_are_inverse_and_survive_json(names: list[object]) -> None:
    vocabulary = Vocabulary(names)  # type: ignore[arg-type]
    assert vocabulary.numbers(names) == list(range(1, len(names) + 1))  # type: ignore[arg-type]
    assert [vocabulary.name(number) for number in range(1, len(names) + 1)] == names
    again = Vocabulary.from_json(vocabulary.to_json())
    assert again == vocabulary
    assert list(map(type, again.names)) == list(map(type, names))


@given(st.lists(st.text(), unique=True), st.lists(st.text()))
def test_old_names_keep_their_numbers(old: list[str], new: list[str]) -> None:
    before = Vocabulary(old)
    after = before.extended(new)
    assert after.begins_with(before)
    assert after.numbers(old) == before.numbers(old)
    assert set(after.names) == {*old, *new}
    assert before.begins_with(after) == (len(before) == len(after))


def test_unknown_names_come_in_one_error_or_are_dropped() -> None:
    vocabulary = Vocabulary(["a", "b"])
    with pytest.raises(EnsembleKDError, match="known items, got 7 unknown: 'c', 'd', 'e', 'f', 'g' and 2 more"):
        vocabulary.numbers(["c", "a", "c", "d", "e", "f", "g", "h", "i"])
    assert vocabulary.numbers(["c", "b", 1, ["a"], "a"], unknown="drop") == [2, 1]  # type: ignore[list-item]
    with pytest.raises(EnsembleKDError, match="1 unknown: 1"):
        Vocabulary(["1"]).numbers([1])
    for names in ("ab", b"a", 3):
        with pytest.raises(EnsembleKDError, match="a list of item ids"):
            vocabulary.numbers(names)  # type: ignore[arg-type]
    with pytest.raises(EnsembleKDError, match="unknown 'error' or 'drop'"):
        vocabulary.numbers(["a"], unknown="ignore")  # type: ignore[arg-type]


def test_numpy_scalars_find_what_they_equal() -> None:
    assert Vocabulary([7, 9]).numbers(np.array([9, 7])) == [2, 1]
    assert Vocabulary(["x", "y"]).numbers(np.array(["y"])) == [2]


def test_what_is_no_vocabulary() -> None:
    for names, words in (
        (["a", "b", "a"], "each item id once, got 'a' again"),
        (["1", 1], "ids of one type, got '1' and 1"),
        ([["a"], ["b"]], "ids that can be keys of a dict"),
    ):
        with pytest.raises(EnsembleKDError, match=words):
            Vocabulary(names)  # type: ignore[arg-type]
    with pytest.raises(EnsembleKDError, match=r"a number in 1\.\.2, got 0"):
        Vocabulary(["a", "b"]).name(0)
    with pytest.raises(EnsembleKDError, match="ids that can be saved, got tuple"):
        Vocabulary([(1, 2)]).to_json()


def test_data_has_the_vocabularies_of_its_names() -> None:
    plain = SequenceData.from_sequences([[1, 2, 3], [3, 2, 1]])
    assert plain.vocabulary is plain.users is None
    ids = tuple(uuid.UUID(int=i) for i in range(3))
    data = SequenceData(plain.items, plain.offsets, 3, item_names=ids, user_names=("u", "w"))
    assert data.vocabulary == Vocabulary(ids)
    assert data.users is not None
    assert data.users.numbers(["w", "u"]) == [1, 0]
