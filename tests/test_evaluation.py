"""Evaluation against a loop over users, in Python numbers."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ensemble_kd import EnsembleKD, EnsembleKDError, MaskedItem, serving
from ensemble_kd.data import SequenceData, synthetic
from ensemble_kd.encoders import BERT4Rec, GRU4Rec, SASRec
from ensemble_kd.evaluation import evaluate, evaluate_popularity, table

V = 60
DATA = synthetic(num_users=60, num_items=V, num_clusters=10, max_len=20)


def model_of(kind: str, max_len: int = 8, n: int = 2) -> EnsembleKD:
    """In float64, so that the order of sums decides no rank; with logits far enough apart."""

    def encoder() -> nn.Module:
        if kind == "gru4rec":
            return GRU4Rec(V, d_model=8).double()
        cls = SASRec if kind == "sasrec" else BERT4Rec
        return cls(V, d_model=8, num_layers=1, max_len=max_len, dropout=0.3).double()

    model = EnsembleKD(encoder, n=n)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


def users(data: SequenceData) -> list[list[int]]:
    bounds = data.offsets.tolist()
    return [data.items[start:stop].tolist() for start, stop in itertools.pairwise(bounds)]


def rank(scores: list[float], target: int, excluded: set[int]) -> int:
    rivals = set(range(1, len(scores))) - excluded - {target}
    return sum(scores[item] >= scores[target] for item in rivals)


def metrics(found: list[int]) -> dict[str, float]:
    row = {f"HR@{k}": sum(r < k for r in found) / len(found) for k in (5, 10)}
    row |= {f"NDCG@{k}": sum(1 / math.log2(r + 2) for r in found if r < k) / len(found) for k in (5, 10)}
    return row | {"MRR": sum(1 / (r + 1) for r in found) / len(found)}


def excluded(exclude: str, history: list[int], window: int) -> set[int]:
    return {"none": set(), "window": set(history[-window:]), "history": set(history)}[exclude]


def oracle(model: EnsembleKD, split: str, exclude: str, window: int) -> dict[str, list[int]]:
    """A user at a time, without padding, each member a module of its own."""
    members = [model.member(i).eval() for i in range(len(model))]
    found: dict[str, list[int]] = {name: [] for name in (*(f"member {i}" for i in range(len(model))), "ensemble")}
    for sequence in users(DATA):
        history, target = (sequence[:-2], sequence[-2]) if split == "valid" else (sequence[:-1], sequence[-1])
        ids = torch.tensor([history[-window:]])
        with torch.no_grad():
            scores = [member(ids)[0].tolist() for member in members]
        mean = [sum(column) / len(members) for column in zip(*scores, strict=True)]
        out = excluded(exclude, history, window)
        for name, row in zip(found, [*scores, mean], strict=True):
            found[name].append(rank(row, target, out))
    return found


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("exclude", ["none", "window", "history"])
@pytest.mark.parametrize(("kind", "n"), [("sasrec", 2), ("bert4rec", 2), ("gru4rec", 2), ("sasrec", 1)])
def test_evaluate_is_the_loop_over_users(kind: str, n: int, exclude: Any, split: Any) -> None:
    model = model_of(kind, n=n)
    window = {"sasrec": 8, "bert4rec": 7, "gru4rec": 200}[kind]  # bert4rec needs a position for [mask]
    report = evaluate(model, DATA, split, exclude=exclude, batch_size=7)
    expected = oracle(model, split, exclude, window)
    assert list(report.ranks) == list(report.rows) == list(expected)
    for scorer, found in expected.items():
        assert report.ranks[scorer].tolist() == found  # in the users' order
        assert report.rows[scorer] == pytest.approx(metrics(found), abs=1e-12)
        assert all(type(value) is float for value in report.rows[scorer].values())


@pytest.mark.parametrize(("max_len", "window"), [(3, 3), (8, 8), (30, 8), (None, 8)])
def test_max_len_trims_to_what_the_encoder_reads(max_len: int | None, window: int) -> None:
    model = model_of("sasrec")
    report = evaluate(model, DATA, "test", exclude="window", max_len=max_len)
    assert {name: ranks.tolist() for name, ranks in report.ranks.items()} == oracle(model, "test", "window", window)
    assert report.protocol.endswith(f"exclude='window' of the newest {window} items")


def test_an_encoder_of_one_position() -> None:
    """[mask] takes the only one: the model sees no item, and says so through equal scores for all users."""
    encoder = BERT4Rec(V, d_model=8, max_len=1)
    model = EnsembleKD.from_members([encoder], objective=MaskedItem())
    assert len(evaluate(model, DATA, "test").ranks["ensemble"]) == DATA.num_users


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("bert4rec")
    reports = [evaluate(model, DATA, "test", batch_size=size) for size in (1, 16, 1000)]
    monkeypatch.setattr(serving, "ENCODER_BYTES", 30_000)  # a few users are encoded at a time
    reports.append(evaluate(model, DATA, "test"))
    for report in reports[1:]:
        for scorer, found in report.ranks.items():
            assert torch.equal(found, reports[0].ranks[scorer])


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("exclude", ["none", "window", "history"])
@pytest.mark.parametrize("max_len", [4, 50])
def test_popularity_is_the_loop_over_users(exclude: Any, split: Any, max_len: int) -> None:
    counts = Counter(item for sequence in users(DATA) for item in sequence[:-2])
    scores = [float(counts[item]) for item in range(V + 1)]
    expected = []
    for sequence in users(DATA):
        history, target = (sequence[:-2], sequence[-2]) if split == "valid" else (sequence[:-1], sequence[-1])
        expected.append(rank(scores, target, excluded(exclude, history, max_len)))
    report = evaluate_popularity(DATA, split, exclude=exclude, max_len=max_len)
    assert report.ranks["popularity"].tolist() == expected
    assert report.rows == {"popularity": pytest.approx(metrics(expected), abs=1e-12)}
    assert report.protocol.startswith(f"leave-one-out {split}, 60 users, all 60 items ranked, exclude={exclude!r}")


class Constant(nn.Module):
    """The same state for everyone; ``value`` is what it is made of."""

    causal = True

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), value))

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.weight.expand(*item_ids.shape, 4)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_scorer_that_knows_nothing_is_last(value: float) -> None:
    model = EnsembleKD.from_members([Constant(0.0), Constant(0.0)], num_items=V)
    torch.nn.init.constant_(dict(model.encoder.named_parameters())["weight"], value)
    report = evaluate(model, DATA, "test", exclude="none")
    assert (report.ranks["ensemble"] == V - 1).all()
    assert report.rows["ensemble"]["NDCG@10"] == 0


def test_the_model_and_the_global_random_state_are_left_alone() -> None:
    model = model_of("sasrec")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    for training in (True, False):
        model.train(training)
        reports = [evaluate(model, DATA, "test") for _ in range(2)]
        assert all(module.training == training for module in model.modules())
        assert reports[0].rows == reports[1].rows  # no dropout
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002


def test_the_mode_is_the_calls_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder runs in evaluation mode, and no flag changes that another thread could see."""
    model = model_of("sasrec")

    def fail(ids: Tensor, *, training: bool) -> Tensor:
        assert model.training
        assert not training
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "query_states", fail)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, DATA, "test")
    assert model.training


def test_bfloat16_runs_the_encoder_in_it() -> None:
    seen: list[torch.dtype] = []

    class Watched(SASRec):
        def forward(self, item_ids: Tensor) -> Tensor:
            hidden = super().forward(item_ids)
            seen.append(nn.functional.linear(hidden, hidden[0]).dtype)
            return hidden

    model = EnsembleKD(lambda: Watched(V, d_model=8, num_layers=1, max_len=8), n=2)
    seen.clear()
    plain, half = (evaluate(model, DATA, "test", precision=p) for p in ("float32", "bfloat16"))
    assert set(seen) == {torch.float32, torch.bfloat16}
    gap = abs(plain.rows["ensemble"]["MRR"] - half.rows["ensemble"]["MRR"])
    assert gap < 0.05


def test_a_report_shows_its_protocol() -> None:
    report = evaluate(model_of("sasrec"), DATA, "test")
    *rows, protocol = str(report).splitlines()
    assert "\n".join(rows) == table(report.rows)
    assert protocol == "leave-one-out test, 60 users, all 60 items ranked, exclude='history'"


def test_columns_stand_below_each_other() -> None:
    text = table({"a name that is long": {"HR@10": 0.5, "MRR": 1.0}, "b": {"HR@10": 0.25, "MRR": 0.125}})
    assert text.splitlines() == [
        "scorer                  HR@10     MRR",
        "a name that is long    0.5000  1.0000",
        "b                      0.2500  0.1250",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exclude": "seen"}, "expected exclude 'none', 'window' or 'history', got 'seen'"),
        ({"max_len": 0}, "expected max_len, a whole number >= 1, got 0"),
        ({"batch_size": 0}, "expected batch_size, a whole number >= 1, got 0"),
        ({"split": "train"}, "expected split 'valid' or 'test', got 'train'"),
        ({"split": "dev"}, "expected split 'valid' or 'test', got 'dev'"),
        ({"precision": "float16"}, "expected precision 'auto', 'float32' or 'bfloat16', got 'float16'"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: Any, message: str) -> None:
    model = model_of("sasrec")
    with pytest.raises(EnsembleKDError) as caught:
        evaluate(model, DATA, **({"split": "test"} | arguments))
    assert message in str(caught.value)
    assert model.training
    if not arguments.keys() & {"batch_size", "precision"}:
        with pytest.raises(EnsembleKDError) as caught:
            evaluate_popularity(DATA, **({"split": "test"} | arguments))
        assert message in str(caught.value)


def test_data_of_another_catalogue() -> None:
    other = SequenceData.from_sequences([[1, 2, 3]])
    with pytest.raises(EnsembleKDError, match="evaluate: expected data of 60 items, as the model, got 3"):
        evaluate(model_of("sasrec"), other, "test")
