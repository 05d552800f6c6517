"""The choice of the best epoch: by any metric, by a function of the user's, or the last one if nothing is held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble_kd import EnsembleKDError
from ensemble_kd.data import SequenceData, Vocabulary
from ensemble_kd.evaluation import evaluate
from ensemble_kd.training import fit
from tests.training.runs import DATA, V, assert_ends_as, sasrec, train


def test_any_metric_and_cutoff_chooses_the_epoch() -> None:
    model = sasrec()
    result = train(model, epochs=4, metric="HR@7")
    scores = [entry["valid"]["ensemble"]["HR@7"] for entry in result.history]
    assert result.best_epoch == scores.index(max(scores))
    assert list(result.best["ensemble"]) == ["HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR", "HR@7"]
    found = evaluate(model, DATA, "valid", metrics=("HR@7",))
    assert found.rows["ensemble"] == {"HR@7": max(scores)}
    assert (found.ranks["ensemble"] < 7).double().mean().item() == max(scores)


def test_a_metric_of_ones_own_chooses_the_epoch() -> None:
    """One that likes early epochs: the first is kept, though accuracy rises."""
    seen: list[bool] = []

    def early(model: Any, data: Any) -> float:
        seen.append(not model.training and not torch.is_grad_enabled() and data is DATA)
        torch.rand(3)  # draws of its own are not training's
        return -float(len(seen))

    model = sasrec()
    result = train(model, metric=early)
    assert result.best_epoch == 0
    assert seen == [True] * 3
    assert [entry["valid"]["ensemble"]["early"] for entry in result.history] == [-1.0, -2.0, -3.0]
    plain = train(sasrec())
    assert [entry["train"] for entry in result.history] == [entry["train"] for entry in plain.history]
    with pytest.raises(EnsembleKDError, match=r"a finite number from the metric '<lambda>', got nan"):
        train(sasrec(), metric=lambda model, data: None, epochs=1)


def test_a_run_is_resumed_under_its_metric_alone(unbroken: Any, tmp_path: Path) -> None:
    train(sasrec(), output_dir=tmp_path, epochs=3)
    with pytest.raises(EnsembleKDError, match=r"metric: 'NDCG@10' then, 'MRR' now"):
        train(sasrec(), output_dir=tmp_path, resume=True, metric="MRR")
    with pytest.raises(EnsembleKDError, match="held out: leave-one-out then, nothing held out now"):
        fit(sasrec(), DATA.with_holdout("none"), epochs=3, output_dir=tmp_path, resume=True, progress=False)
    model = sasrec()
    assert_ends_as(unbroken, tmp_path, model, train(model, output_dir=tmp_path, resume=True))


def test_without_held_out_items_the_last_epoch_stays(tmp_path: Path, capsys: Any) -> None:
    model = sasrec()
    everything = DATA.with_holdout("none")
    result = fit(model, everything, epochs=2, output_dir=tmp_path, progress=True)
    assert (result.best_epoch, result.best) == (1, {})
    assert [entry["valid"] for entry in result.history] == [{}, {}]
    assert "epoch 2: nothing held out, " in capsys.readouterr().out
    again = sasrec()
    assert fit(again, everything, epochs=2, output_dir=tmp_path, resume=True, progress=False).best_epoch == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(EnsembleKDError, match="validation targets for patience, got nothing held out"):
        fit(sasrec(), everything, epochs=2, patience=2)
    chosen = fit(sasrec(), everything, epochs=2, progress=False, metric=lambda *_: 0.5, patience=3)
    assert (chosen.best_epoch, chosen.best) == (0, {"ensemble": {"<lambda>": 0.5}})


@pytest.mark.parametrize("metric", ["NDCG", "HR@0", "HR@ten", "Recall@5", "MRR@5", 3, None])
def test_metrics_that_are_none(metric: Any) -> None:
    with pytest.raises(EnsembleKDError, match="metric: expected 'HR@K', 'NDCG@K' or 'MRR', got"):
        train(sasrec(), metric=metric)
    with pytest.raises(EnsembleKDError, match="metric: expected 'HR@K', 'NDCG@K' or 'MRR', got"):
        evaluate(sasrec(), DATA, "test", metrics=(metric,))


def test_fit_takes_the_names_of_its_data() -> None:
    names = tuple(f"i{i}" for i in range(V))
    named = SequenceData(DATA.items, DATA.offsets, V, DATA.item_attributes, item_names=names)
    model = sasrec()
    train(model, epochs=1)
    assert model.vocabulary is None
    fit(model, named, epochs=1, progress=False)
    assert model.vocabulary == model.member(0).vocabulary == Vocabulary(names)
    other = SequenceData(DATA.items, DATA.offsets, V, DATA.item_attributes, item_names=(names[1], names[0], *names[2:]))
    for call in (lambda: fit(model, other), lambda: evaluate(model, other, "test")):
        with pytest.raises(EnsembleKDError, match="item 1 to be 'i0', as in the model, got 'i1'"):
            call()
    with pytest.raises(EnsembleKDError, match=f"a vocabulary of {V} items, got Vocabulary"):
        sasrec(vocabulary=Vocabulary(["a"]))
