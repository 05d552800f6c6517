"""The metrics against their definitions, ranks of scores that are no numbers, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.metrics import (
    disagreement,
    hit_rate,
    metric_row,
    mrr,
    ndcg,
    ranks,
)

quick = settings(deadline=None, max_examples=80)


@dataclass(frozen=True)
class Case:
    scores: Tensor  # (n, b, v + 1)
    target: Tensor  # (b,)
    exclude: Tensor  # (b, k)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n, b, v, k = (draw(st.integers(1, high)) for high in (2, 3, 7, 5))
    # Few distinct values, so that ties are common.
    values = [-1.0, 0.0, 0.5, 2.0, math.inf, -math.inf, math.nan]
    size = n * b * (v + 1)
    scores = torch.tensor(draw(st.lists(st.sampled_from(values), min_size=size, max_size=size)))
    target = draw(st.lists(st.integers(1, v), min_size=b, max_size=b))
    exclude = draw(st.lists(st.integers(0, v), min_size=b * k, max_size=b * k))
    return Case(scores.view(n, b, v + 1), torch.tensor(target), torch.tensor(exclude).view(b, k))


@quick
@given(cases(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_ranks_with_infinities_and_nan(case: Case, dtype: torch.dtype) -> None:
    """NaN is above all for rivals and below all for the target; plain numbers are in the specification."""
    got = ranks(case.scores.to(dtype), case.target, case.exclude)
    for member, scores in enumerate(case.scores.tolist()):
        for user, row in enumerate(scores):
            target, excluded = int(case.target[user]), set(case.exclude[user].tolist())
            rivals = set(range(1, len(row))) - excluded - {target}
            assert got[member, user] == sum(not row[item] < row[target] for item in rivals)


@quick
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 12))
def test_metrics_equal_their_definitions(values: list[int], k: int) -> None:
    tensor = torch.tensor([values, values[::-1]])
    count = len(values)
    wanted = [
        (hit_rate(tensor, k), sum(rank < k for rank in values) / count),
        (ndcg(tensor, k), sum(math.log(2) / math.log(rank + 2) for rank in values if rank < k) / count),
        (mrr(tensor), sum(1 / (rank + 1) for rank in values) / count),
    ]
    for got, want in wanted:
        assert got.shape == (2,)
        assert got.tolist() == pytest.approx([want, want], rel=1e-12)


@quick
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_metric_row_and_its_inequalities(values: list[int]) -> None:
    row = metric_row(torch.tensor(values))
    assert list(row) == ["HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR"]
    assert all(type(value) is float for value in row.values())
    assert 0 <= row["NDCG@5"] <= row["HR@5"] <= row["HR@10"] <= 1
    assert row["NDCG@5"] <= row["NDCG@10"] <= row["HR@10"]
    assert 0 < row["MRR"] <= 1


def test_a_perfect_ranking_is_1_everywhere() -> None:
    assert set(metric_row(torch.zeros(4, dtype=torch.int64)).values()) == {1.0}


TWO = torch.zeros(2, 4)
IDS = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(4), IDS), r"expected scores \(\.\.\., b, v \+ 1\)"),
        ((TWO, torch.tensor([1])), r"expected target of shape \(b,\) = \(2,\), got \(1,\)"),
        ((TWO, IDS.float()), "expected target of dtype int64, got torch.float32"),
        ((TWO, torch.tensor([0, 2])), r"expected target ids in 1\.\.3, got 0\.\.2"),
        ((TWO, torch.tensor([1, 4])), r"expected target ids in 1\.\.3, got 1\.\.4"),
        ((TWO, IDS, torch.tensor([1, 2])), r"expected exclude of shape \(b, k\) = \(2, k\), got \(2,\)"),
        ((TWO, IDS, torch.tensor([[-1], [2]])), r"expected exclude ids in 0\.\.3, got -1\.\.2"),
        ((TWO, IDS, [[1], [2]]), r"expected exclude, a tensor of numbers, got \[\[1\], \[2\]\]"),
        ((TWO, None), "expected target, a tensor of numbers, got None"),
        ((TWO, IDS, torch.tensor([[9], [2]])), r"expected exclude ids in 0\.\.3, got 2\.\.9"),
    ],
)
def test_ranks_refuse(arguments: tuple[Tensor, ...], words: str) -> None:
    with pytest.raises(EnsembleKDError, match=words):
        ranks(*arguments)


def test_metrics_refuse() -> None:
    with pytest.raises(EnsembleKDError, match="hit_rate: expected k, a whole number >= 1, got 0"):
        hit_rate(IDS, 0)
    for metric in (lambda r: hit_rate(r, 5), lambda r: ndcg(r, 5), mrr, metric_row):
        with pytest.raises(EnsembleKDError, match=r"expected ranks \(\.\.\., b\) with b >= 1, got \(0,\)"):
            metric(IDS[:0])
        for wrong in (IDS.tolist(), IDS / 2):
            with pytest.raises(EnsembleKDError, match=r"expected ranks, a tensor of (whole )?numbers"):
                metric(wrong)
    with pytest.raises(EnsembleKDError, match=r"metric_row: expected ranks of shape \(b,\), got \(1, 2\)"):
        metric_row(IDS[None])


@quick
@given(n=st.integers(1, 4), b=st.integers(1, 3), k=st.integers(1, 5), seed=st.integers(0, 999))
def test_disagreement_is_that_of_sets(n: int, b: int, k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    lists = torch.stack([torch.randperm(8, generator=g)[:k] for _ in range(n * b)]).view(n, b, k)
    for user, got in enumerate(disagreement(lists).tolist()):
        sets = [set(lists[i, user].tolist()) for i in range(n)]
        shares = [len(one & other) / len(one | other) for one, other in combinations(sets, 2)]
        assert got == pytest.approx(1 - sum(shares) / len(shares) if shares else 0, abs=1e-6)


def test_disagreement_about_one_user_needs_no_axis_of_users() -> None:
    assert disagreement(torch.tensor([[1, 2], [2, 3]])).item() == pytest.approx(2 / 3)
    with pytest.raises(EnsembleKDError, match=r"disagreement: expected lists \(n, ..., k\), got \(2,\)"):
        disagreement(torch.tensor([1, 2]))
