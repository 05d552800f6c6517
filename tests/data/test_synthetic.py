"""The synthetic catalogue: its form, and the process that draws it, on its own."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ensemble_kd.data import synthetic
from ensemble_kd.data.synthetic import draw_process
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.metrics import metric_row, ranks


def test_synthetic_is_a_function_of_its_arguments() -> None:
    one, two, other = synthetic(300, seed=1), synthetic(300, seed=1), synthetic(300, seed=2)
    assert torch.equal(one.items, two.items)
    assert torch.equal(one.offsets, two.offsets)
    assert not torch.equal(one.items[:1000], other.items[:1000])
    assert one.item_attributes is not None
    assert two.item_attributes is not None
    assert torch.equal(one.item_attributes.table, two.item_attributes.table)


def test_synthetic_has_the_promised_form() -> None:
    data = synthetic()
    lengths = data.offsets.diff()
    assert (data.num_users, data.num_items) == (2000, 600)
    assert (int(lengths.min()), int(lengths.max())) == (5, 40)
    assert 10 < lengths.double().mean() < 16
    histories = [data.items[a:b] for a, b in itertools.pairwise(data.offsets)]
    assert all(history.unique().numel() == history.numel() for history in histories)
    top = data.popularity().sort(descending=True).values
    assert top[:60].sum() > 0.25 * top.sum()  # a tenth of the items, over a quarter of the actions
    assert data.item_attributes is not None
    assert ((data.item_attributes.table[1:-1] >= 0).sum(1) == 3).all()


def test_synthetic_optimum_is_far_from_1_and_far_above_popularity() -> None:
    """The chances of the true process, written from its description, are the best ranking there is."""
    size = (2000, 600, 40, 5, 40)
    data = synthetic(*size[:2])
    process = draw_process(np.random.default_rng(0), *size)
    within = (process.cluster == np.arange(40)[:, None]) * process.popularity
    within /= within.sum(1, keepdims=True)
    history = data.inputs("test", data.max_history)
    last, before = history[:, -1].numpy() - 1, history[:, -2].numpy() - 1
    age = ((process.lengths - 1) / process.lengths)[:, None]
    everyone = np.arange(2000)

    def true_chances(first: np.ndarray, final: np.ndarray) -> np.ndarray:
        chances = 0.1 * process.popularity + 0.3 * ((1 - age) * first + age * final) @ within
        chances += 0.5 * within[process.follows[process.cluster[before] % 3, process.cluster[last]]]
        for rank, odds in enumerate((0.5, 0.3, 0.2)):
            chances[everyone, process.successors[last, rank]] += 0.1 * odds
        return chances

    chances = true_chances(process.early, process.late)
    assert chances.sum(1) == pytest.approx(1)
    target = data.target("test")

    def quality(scores: Tensor) -> float:
        return metric_row(ranks(scores, target, history))["NDCG@10"]

    best = quality(torch.from_numpy(np.pad(chances, ((0, 0), (1, 0)))))
    assert 0.2 < best < 0.35
    assert quality(data.popularity().expand(2000, -1)) < best / 3
    # Calibration: where the process gives the chance p, given what the user already had, the item comes with chance p.
    swapped = true_chances(process.late, process.early)[everyone, target.numpy() - 1]
    assert np.log(chances[everyone, target.numpy() - 1]).mean() > np.log(swapped).mean() + 0.05  # tastes drift
    had = np.zeros((2000, 601), dtype=bool)
    had[everyone[:, None], history.numpy()] = True
    chances = np.where(had[:, 1:], 0.0, chances)
    chances /= chances.sum(1, keepdims=True)
    hit = chances[everyone, target.numpy() - 1]
    expected, spread = (chances**2).sum(), math.sqrt((chances**3).sum() - ((chances**2).sum(1) ** 2).sum())
    assert abs(hit.sum() - expected) < 4 * spread


def test_synthetic_attributes_tell_the_cluster() -> None:
    data = synthetic()
    process = draw_process(np.random.default_rng(0), 2000, 600, 40, 5, 40)
    assert data.item_attributes is not None
    first = data.item_attributes.table[1:-1, 0].numpy()
    assert 0.75 < (first == process.cluster).mean() < 0.95


def test_synthetic_refuses() -> None:
    for arguments in ({"num_users": 0}, {"num_items": 79}, {"seed": -1}, {"min_len": 2}, {"max_len": 4}):
        name, value = next(iter(arguments.items()))
        with pytest.raises(EnsembleKDError, match=f"synthetic: expected {name}, a whole number >= .*, got {value}"):
            synthetic(**arguments)
