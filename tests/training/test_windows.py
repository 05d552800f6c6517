"""The windows that ``fit`` trains on where none are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble_kd import EnsembleKD, fit
from ensemble_kd.data import SequenceData
from ensemble_kd.encoders import BERT4Rec, GRU4Rec
from ensemble_kd.objectives import MaskedItem
from ensemble_kd.training import windows
from tests.training.runs import DATA, V, sasrec


class Newest(nn.Module):
    """A network that returns the newest state alone."""

    num_items, max_len = V, 8

    def __init__(self) -> None:
        super().__init__()
        self.all = GRU4Rec(V, d_model=4, max_len=8)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.all(item_ids)[:, -1]


def bert() -> EnsembleKD:
    return EnsembleKD(lambda: BERT4Rec(V, d_model=4, num_layers=1, max_len=8), n=2, losses=0)


@pytest.mark.parametrize(
    ("model", "least", "prefixes"),
    [
        (lambda: sasrec(losses=0), 2, "none"),
        (bert, 1, "one"),
        (lambda: sasrec(losses=0, objective=MaskedItem()), 1, "one"),
        (lambda: EnsembleKD(Newest, n=2, losses=0), 2, "all"),
    ],
)
@pytest.mark.parametrize("step", [None, 3])
def test_a_model_that_predicts_at_the_end_alone_sees_more_ends(
    model: Any, least: int, prefixes: str, step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    train_windows = SequenceData.train_windows
    monkeypatch.setattr(SequenceData, "train_windows", lambda *given: calls.append(given[1:]) or train_windows(*given))
    made = model()
    fit(made, DATA, epochs=2, window_step=step, progress=False, seed=5)
    length = 8 + made.objective.min_items - 1
    drawn = [(5, epoch) for epoch in ([0] if step else [0, 1])]  # with a step they are those of every epoch
    assert calls == [(length, step, least, seed, "none" if step else prefixes) for seed in drawn]


@pytest.mark.parametrize(("more", "prefixes"), [(0, "all"), (-1, "one")])
def test_windows_at_every_item_take_no_more_memory_than_there_should_be(
    more: int, prefixes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    train_windows = SequenceData.train_windows
    monkeypatch.setattr(SequenceData, "train_windows", lambda *given: calls.append(given[-1]) or train_windows(*given))
    monkeypatch.setattr(windows, "MOST_ENTRIES", DATA.num_interactions * 9 + more)
    fit(EnsembleKD(Newest, n=1, losses=0), DATA, epochs=1, progress=False)
    assert calls == [prefixes]


def test_every_item_is_a_target_of_a_network_that_returns_one_state() -> None:
    targets: list[Tensor] = []
    model = EnsembleKD(Newest, n=1, losses=0)
    step = model.loss

    def loss(item_ids: Tensor, **given: Any) -> Any:
        targets.append(item_ids[:, -1])
        return step(item_ids, **given)

    model.loss = loss  # type: ignore[method-assign]
    fit(model, DATA, epochs=1, progress=False)
    items, offsets = DATA.history("train")
    first = torch.zeros(len(items), dtype=torch.bool).index_fill_(0, offsets[:-1], 1)  # nothing to predict them from
    assert sorted(torch.cat(targets).tolist()) == sorted(items[~first].tolist())


def test_batches_are_larger_where_few_items_are_targets() -> None:
    seen: list[dict[str, Any]] = []
    long = SequenceData.from_sequences([[1 + i % V for i in range(u, u + 202)] for u in range(40)], num_items=V)
    for model, batches in (
        (EnsembleKD(lambda: BERT4Rec(V, d_model=4, num_layers=1, max_len=200), n=1, losses=0), 2),  # of 80 windows
        (EnsembleKD(Newest, n=1, losses=0), 32),  # of 40 * 199
    ):
        fit(model, long, epochs=1, progress=False, callback=seen.append)
        assert seen[-1]["step"] == batches
