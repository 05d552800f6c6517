"""Packed hidden states are the padded ones: at their positions, pooled, and contrasted in groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ensemble_kd import functional as F
from ensemble_kd.ensemble.packing import pack

N, D = 2, 3


def encode(item_ids: Tensor) -> Tensor:
    """(rows, w) -> (n, rows, w, d), every state told from every other; at padding, NaN."""
    member, feature = torch.arange(1.0, N + 1), torch.arange(1.0, D + 1)
    real = torch.where(item_ids != 0, item_ids, torch.nan).double()
    return torch.sin(real[None, ..., None] * member[:, None, None, None] + feature)


def newest(item_ids: Tensor) -> Tensor:
    return encode(item_ids)[:, :, -1]


@st.composite
def sequences(draw: Any, at_least: int = 1) -> Tensor:
    """(k, b, l) copies of sequences of any length from 1 to l, no two states of which are equal."""
    k, b, length = draw(st.integers(1, 3)), draw(st.integers(at_least, 6)), draw(st.integers(1, 40))
    lengths = torch.tensor(draw(st.lists(st.integers(1, length), min_size=b, max_size=b)))
    ids = torch.arange(1, k * b * length + 1).view(k, b, length)
    return ids.masked_fill(torch.arange(length) < (length - lengths)[:, None], 0)


worths = st.sampled_from([0, 20, 1 << 40])  # groups as they are, some of them joined, all of them


@given(sequences(), worths)
def test_states_are_found_where_they_stood(ids: Tensor, worth: int) -> None:
    positions = (ids.flatten() != 0).nonzero()[:, 0].flip(0)
    one, other = (pack(encode, ids, by_length=by_length, worth=worth).at(positions) for by_length in (False, True))
    assert torch.equal(one, encode(ids.flatten(0, 1)).flatten(1, 2)[:, positions])
    assert torch.equal(other, one)


@given(sequences(), worths)
def test_the_newest_position_alone_is_one_a_sequence(ids: Tensor, worth: int) -> None:
    rows = torch.arange(ids.shape[0] * ids.shape[1])
    for by_length in (False, True):
        assert torch.equal(pack(newest, ids, by_length=by_length, worth=worth).at(rows), newest(ids.flatten(0, 1)))


@given(sequences(at_least=2), worths)
def test_one_group_alone_is_in_the_order_of_the_batch(ids: Tensor, worth: int) -> None:
    packed = pack(encode, ids, by_length=True, worth=worth)
    if len(packed.groups) == 1:
        assert torch.equal(packed.groups[0].users, torch.arange(ids.shape[1]))


@pytest.mark.parametrize("pool", ["flatten", "mean", "last"])
@pytest.mark.parametrize("encoder", [encode, newest])
@given(ids=sequences())
def test_pooled_states_are_those_of_padded_sequences(encoder: Any, pool: Any, ids: Tensor) -> None:
    hidden, real = encoder(ids.flatten(0, 1)), ids.flatten(0, 1) != 0
    if encoder is newest:
        hidden, real = hidden[:, :, None], real[:, -1:]
    want = F.pool_sequence(hidden, real, pool=pool).unflatten(1, ids.shape[:2])
    for by_length in (False, True):
        torch.testing.assert_close(pack(encoder, ids, by_length=by_length).pooled(pool), want, rtol=1e-12, atol=1e-12)


@given(sequences(at_least=2), st.sampled_from(["paper", "reference_code"]))
def test_contrast_in_groups_is_contrast_of_padded_sequences(ids: Tensor, variant: Any) -> None:
    found = []
    for by_length in (False, True):
        weight = torch.linspace(0.5, 1.5, N * D, dtype=torch.float64).view(N, 1, 1, D).requires_grad_()
        packed = pack(lambda read, w=weight: w * encode(read).nan_to_num(5.0), ids, by_length=by_length)  # type: ignore[misc]
        groups = packed.by_group("flatten")
        icl, ccl = F.contrast([group[:, 0] for group in groups], groups, temperature=0.7, variant=variant)
        (icl + 0.7 * ccl).backward()
        assert weight.grad is not None
        found.append(torch.cat([icl[None], ccl[None], weight.grad.flatten()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_sequences_of_similar_length_are_encoded_together() -> None:
    ids = torch.zeros(1, 9, 20, dtype=torch.int64)
    for row, length in enumerate([20, 2, 3, 17, 5, 9, 8, 1, 20]):
        ids[0, row, -length:] = 1
    shapes: list[tuple[int, ...]] = []

    def spy(item_ids: Tensor) -> Tensor:
        shapes.append(tuple(item_ids.shape))
        return encode(item_ids)

    pack(spy, ids, by_length=True)
    assert shapes == [(3, 3), (2, 8), (1, 9), (3, 20)]
    shapes.clear()
    pack(spy, ids, by_length=False)
    assert shapes == [(9, 20)]


def test_a_copy_may_be_shorter_than_its_sequence() -> None:
    ids = torch.tensor([[[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], [[0] * 8 + [9, 10]]])
    packed = pack(encode, ids, by_length=True)
    assert torch.equal(packed.copies(slice(1, None)).at(torch.tensor([8, 9])), encode(ids[1])[:, 0, 8:])


@given(sequences())
def test_known_lengths_make_the_same_groups(ids: Tensor) -> None:
    known = (ids[0] != 0).sum(1).tolist()
    read, told = (pack(encode, ids, by_length=True, lengths=lengths) for lengths in (None, known))
    assert [g.users.tolist() for g in read.groups] == [g.users.tolist() for g in told.groups]
    torch.testing.assert_close(read.flat, told.flat, equal_nan=True, rtol=0, atol=0)


@given(sequences(), st.integers(0, 200))
def test_a_group_has_to_save_what_it_is_worth(ids: Tensor, worth: int) -> None:
    groups = pack(encode, ids, by_length=True, worth=worth).groups
    assert sorted(user for group in groups for user in group.users.tolist()) == list(range(ids.shape[1]))
    widths = [group.real.shape[2] for group in groups]
    for group, width, wider in zip(groups, widths, widths[1:], strict=False):
        assert len(ids) * len(group.users) * (wider - width) >= worth
