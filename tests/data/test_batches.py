"""Batches: every window once, in an order that a seed gives; and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble_kd.data import BatchPlan, synthetic
from ensemble_kd.errors import EnsembleKDError

quick = settings(deadline=None, max_examples=60)


@st.composite
def window_sets(draw: st.DrawFn) -> Tensor:
    """Windows whose first column holds nothing and whose last column names the window."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=40))
    return torch.tensor(
        [[0] * (7 - length) + [99] * (length - 1) + [number] for number, length in enumerate(lengths, start=1)]
    )


@quick
@given(window_sets(), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_each_window_is_in_one_batch_and_batches_are_trimmed(windows: Tensor, size: int, seed: int, epoch: int) -> None:
    plan = BatchPlan(windows, size, seed, epoch)
    batches = list(plan)
    assert len(batches) == len(plan)
    assert sorted(torch.cat([batch[:, -1] for batch in batches]).tolist()) == list(range(1, len(windows) + 1))
    for index, batch in enumerate(batches):
        assert (batch[:, 0] != 0).any()  # no column of padding alone
        whole = windows[plan.rows(index)]
        assert torch.equal(batch, whole[:, -batch.shape[1] :])
        assert int((whole != 0).sum()) == int((batch != 0).sum())


def test_no_window_is_alone_and_other_batches_are_full() -> None:
    for count, size in itertools.product(range(2, 20), range(2, 8)):
        sizes = sorted(map(len, BatchPlan(torch.ones(count, 3, dtype=torch.int64), size, 0, 0)))
        full, rest = divmod(count, size)
        wanted = [size] * full + [rest] * (rest > 0)
        if rest == 1 and full:
            wanted = [size] * (full - 1) + [size + 1]
        assert sizes == sorted(wanted)
    assert [len(batch) for batch in BatchPlan(torch.ones(3, 1, dtype=torch.int64), 1, 0, 0)] == [1, 1, 1]


@quick
@given(window_sets(), st.integers(1, 9), st.integers(0, 50))
def test_a_plan_resumes_where_it_stopped(windows: Tensor, size: int, start: int) -> None:
    whole = list(BatchPlan(windows, size, seed=3, epoch=1))
    rest = list(BatchPlan(windows, size, seed=3, epoch=1).batches(start))
    assert len(rest) == max(len(whole) - start, 0)
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_plans_differ_by_seed_and_epoch_and_leave_the_global_generators_alone() -> None:
    windows = torch.arange(1, 201).unsqueeze(1)
    before = torch.get_rng_state()
    orders = [torch.cat(list(BatchPlan(windows, 8, seed, epoch))) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(orders[0], orders[3])
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[1], orders[2])


def test_batches_do_not_go_by_length() -> None:
    """A batch of short windows alone would let their items count more."""
    windows = synthetic(num_users=1000).train_windows(30)[:640]
    means = [float((batch != 0).sum()) / len(batch) for batch in BatchPlan(windows, 64, 0, 0)]
    assert max(means) < 1.5 * min(means)


def test_a_plan_refuses() -> None:
    windows = torch.ones(4, 2, dtype=torch.int64)
    for bad in (windows.float(), windows[0], windows[:0]):
        with pytest.raises(EnsembleKDError, match=r"BatchPlan: expected windows \(w, l\) int64"):
            BatchPlan(bad, 2, 0, 0)
    for numbers in ((0, 0, 0), (2, -1, 0), (2, 0, -1)):
        with pytest.raises(EnsembleKDError, match=r"BatchPlan: expected .*, a whole number >= "):
            BatchPlan(windows, *numbers)
    with pytest.raises(IndexError):
        BatchPlan(windows, 2, 0, 0)[2]


def test_lengths_are_those_of_the_rows() -> None:
    windows = torch.tensor([[0, 0, 1], [0, 2, 3], [4, 5, 6], [0, 0, 7], [0, 8, 9]])
    for part in ((0, 1), (0, 2), (1, 2)):
        plan = BatchPlan(windows, 3, seed=1, epoch=0, part=part)
        for index, batch in enumerate(plan):
            assert plan.lengths(index) == (batch != 0).sum(1).tolist()
