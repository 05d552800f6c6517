"""Attributes of items: what their rows list, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kd.data import ItemAttributes
from ensemble_kd.errors import EnsembleKDError

quick = settings(deadline=None, max_examples=60)


@quick
@given(st.dictionaries(st.integers(1, 8), st.lists(st.integers(1, 12), max_size=6), min_size=1))
def test_attribute_rows_list_what_each_item_has(attributes: dict[int, list[int]]) -> None:
    if not any(attributes.values()):
        attributes[1] = [1]
    built = ItemAttributes.from_dict(attributes, num_items=8)
    assert built.table.shape == (10, max(len(set(ids)) for ids in attributes.values()))
    assert built.num_attributes == max(max(ids) for ids in attributes.values() if ids)
    assert (len(built), built.num_items) == (8, 8)
    for item, row in enumerate(built.table.tolist()):
        wanted = sorted(attribute - 1 for attribute in set(attributes.get(item, [])))
        assert row == wanted + [-1] * (len(row) - len(wanted))


def test_attributes_refuse() -> None:
    cases = [
        ({3: [1]}, r"item ids in 1\.\.2, got 3"),
        ({0: [1]}, r"item ids in 1\.\.2, got 0"),
        ({1: [0]}, "attribute ids from 1, got 0"),
        ({1: []}, "at least one attribute, got none"),
        ({"1": [1]}, r"item ids in 1\.\.2, got '1'"),
        ({True: [1]}, r"item ids in 1\.\.2, got True"),
        ({1: 5}, "a list of attribute ids per item, got 5 of item 1"),
        ({1: "12"}, "a list of attribute ids per item, got '12' of item 1"),
        ({1: [1.5]}, "a list of attribute ids per item"),
        ({1: [2**62]}, "attribute ids without large gaps, got id 4611686018427387904 among 1"),
        ({1: [2**64]}, "attribute ids from 1, got 18446744073709551616"),
    ]
    for attributes, words in cases:
        with pytest.raises(EnsembleKDError, match=words):
            ItemAttributes.from_dict(attributes, 2)
    with pytest.raises(EnsembleKDError, match="attributes spread over the items, got 600 on item 7"):
        ItemAttributes.from_dict({7: range(1, 601), 8: [1]}, 100_000)
    with pytest.raises(EnsembleKDError, match="-1 throughout the first and the last row"):
        ItemAttributes(1, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(EnsembleKDError, match=r"classes -1\.\.0"):
        ItemAttributes(1, torch.full((3, 1), 5))
    with pytest.raises(EnsembleKDError, match="a table"):
        ItemAttributes(1, torch.zeros(3, 1))
