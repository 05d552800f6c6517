"""Ranks against a loop that sorts nothing and excludes by name, and the metrics against their definitions."""

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
def cases(draw: st.DrawFn, nan: bool = False) -> Case:
    n, b, v, k = (draw(st.integers(1, high)) for high in (2, 3, 7, 5))
    # Few distinct values, so that ties are common.
    values = [-1.0, 0.0, 0.5, 2.0, math.inf, -math.inf] + ([math.nan] if nan else [])
    size = n * b * (v + 1)
    scores = torch.tensor(draw(st.lists(st.sampled_from(values), min_size=size, max_size=size)))
    target = draw(st.lists(st.integers(1, v), min_size=b, max_size=b))
    exclude = draw(st.lists(st.integers(0, v), min_size=b * k, max_size=b * k))
    return Case(scores.view(n, b, v + 1), torch.tensor(target), torch.tensor(exclude).view(b, k))


def rank_by_loop(row: list[float], target: int, excluded: list[int]) -> int:
    """How many rivals are not clearly below the target."""
    rivals = set(range(1, len(row))) - set(excluded) - {target}
    return sum(not row[item] < row[target] for item in rivals)


@quick
@given(cases(nan=True), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_ranks_equal_the_loop(case: Case, dtype: torch.dtype) -> None:
    got = ranks(case.scores.to(dtype), case.target, case.exclude)
    for member, scores in enumerate(case.scores.tolist()):
        for user, row in enumerate(scores):
            want = rank_by_loop(row, int(case.target[user]), case.exclude[user].tolist())
            assert got[member, user] == want


@quick
@given(cases())
def test_no_exclusion_is_an_empty_one(case: Case) -> None:
    plain = ranks(case.scores, case.target)
    assert torch.equal(plain, ranks(case.scores, case.target, case.exclude[:, :0]))
    assert torch.equal(plain, ranks(case.scores, case.target, torch.zeros_like(case.exclude)))
    # The target itself is never excluded.
    assert torch.equal(plain, ranks(case.scores, case.target, case.target.unsqueeze(1)))


@quick
@given(cases())
def test_excluding_one_more_item_never_worsens_a_rank(case: Case) -> None:
    fewer, more = case.exclude[:, :-1], case.exclude
    assert (ranks(case.scores, case.target, more) <= ranks(case.scores, case.target, fewer)).all()


@quick
@given(cases())
def test_repeats_and_order_of_the_excluded_do_not_matter(case: Case) -> None:
    twice = torch.cat([case.exclude, case.exclude.flip(1)], dim=1)
    assert torch.equal(ranks(case.scores, case.target, twice), ranks(case.scores, case.target, case.exclude))


@quick
@given(cases(), st.randoms(use_true_random=False))
def test_renaming_the_items_changes_no_rank(case: Case, random: object) -> None:
    v = case.scores.shape[-1] - 1
    order = list(range(1, v + 1))
    random.shuffle(order)  # type: ignore[attr-defined]
    new_name = torch.tensor([0, *order])
    renamed = torch.empty_like(case.scores)
    renamed[..., new_name] = case.scores
    got = ranks(renamed, new_name[case.target], new_name[case.exclude])
    assert torch.equal(got, ranks(case.scores, case.target, case.exclude))


@quick
@given(cases())
def test_the_padding_column_never_counts(case: Case) -> None:
    want = ranks(case.scores, case.target, case.exclude)
    for value in (math.inf, -math.inf, math.nan):
        scores = case.scores.clone()
        scores[..., 0] = value
        assert torch.equal(ranks(scores, case.target, case.exclude), want)


@quick
@given(cases())
def test_only_the_order_of_the_scores_matters(case: Case) -> None:
    assert torch.equal(ranks(case.scores.atan() * 3 + 1, case.target), ranks(case.scores, case.target))


@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan])
def test_a_constant_scorer_gets_the_worst_rank(value: float) -> None:
    scores = torch.full((2, 3, 6), value)
    target = torch.tensor([1, 3, 5])
    assert ranks(scores, target).eq(4).all()
    assert ranks(scores, target, torch.tensor([[2, 4], [2, 2], [0, 5]])).tolist() == [[2, 3, 4]] * 2


def test_a_nan_target_gets_the_worst_rank() -> None:
    assert ranks(torch.tensor([[0.0, math.nan, 1.0, 2.0]]), torch.tensor([1])).item() == 2


def test_the_best_item_has_rank_0_and_inputs_stay_as_they_were() -> None:
    scores, target, exclude = torch.tensor([[9.0, 1.0, 3.0, 2.0]]), torch.tensor([2]), torch.tensor([[3, 1, 3]])
    copies = [scores.clone(), target.clone(), exclude.clone()]
    assert ranks(scores, target, exclude).item() == 0
    assert all(torch.equal(new, old) for new, old in zip((scores, target, exclude), copies, strict=True))


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
