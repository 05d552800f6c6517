"""``fit``: what it learns, reports and refuses, and that a run killed anywhere ends as one never killed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble_kd import (
    CCL,
    ICL,
    KD,
    EnsembleKD,
    EnsembleKDError,
    MaskedItem,
    NextItem,
    fit,
)
from ensemble_kd.data import BatchPlan, SequenceData, synthetic
from ensemble_kd.encoders import BERT4Rec, SASRec
from ensemble_kd.evaluation import evaluate, evaluate_popularity
from ensemble_kd.internal import files
from ensemble_kd.training import Hump, Ramp
from tests.training.runs import (
    DATA,
    STEPS,
    V,
    assert_same_checkpoint,
    global_random_state,
    sasrec,
    train,
)


@pytest.mark.slow
def test_fit_lowers_the_loss_and_beats_popularity() -> None:
    model = sasrec()
    result = train(model, epochs=15, window_step=1)
    first, last = result.history[0]["train"], result.history[-1]["train"]
    assert list(first) == ["nip", "kd", "ap", "icl", "ccl"]
    assert last["nip"] < 0.9 * first["nip"]
    assert last["ap"] < 0.9 * first["ap"]
    assert len(result.history) == 15
    test, popularity = evaluate(model, DATA, "test"), evaluate_popularity(DATA, "test")
    assert test.rows["ensemble"]["NDCG@10"] > 1.1 * popularity.rows["popularity"]["NDCG@10"]


def test_the_best_epochs_weights_are_left(tmp_path: Path) -> None:
    model = sasrec()

    def spoil(entry: Mapping[str, Any]) -> None:  # after the second epoch popular items are avoided
        if entry["kind"] == "epoch" and entry["epoch"] == 1:
            with torch.no_grad():
                model.item_classifier.bias.copy_(-DATA.popularity()[1:])

    result = train(model, callback=spoil, output_dir=tmp_path)
    assert result.best_epoch < 2
    scores = [entry["valid"]["ensemble"]["NDCG@10"] for entry in result.history]
    assert scores.index(max(scores)) == result.best_epoch
    assert evaluate(model, DATA, "valid").rows == result.best == result.history[result.best_epoch]["valid"]
    best = files.load(tmp_path / "best.pt")
    assert (best["epoch"], best["valid"]) == (result.best_epoch, result.best)
    again = sasrec(seed=9)
    again.load_state_dict(best["model"])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_early_stopping() -> None:
    result = train(sasrec(), epochs=20, patience=2, lr=1e-12)  # nothing moves, so nothing gets better
    assert (result.best_epoch, len(result.history)) == (0, 3)


@pytest.mark.parametrize("objective", [NextItem(views=2), NextItem(mask_ratio=0.2), MaskedItem(views=1)])
@pytest.mark.parametrize("losses", [0, KD(), ICL() + CCL()])
def test_every_objective_trains(objective: Any, losses: Any) -> None:
    encoder = BERT4Rec if isinstance(objective, MaskedItem) else SASRec
    model = EnsembleKD(lambda: encoder(V, d_model=8, num_layers=1, max_len=8), n=2, objective=objective, losses=losses)
    assert len(train(model, epochs=1, window_step=9).history) == 1


def test_bfloat16_trains_and_keeps_float32_weights() -> None:
    model = sasrec()
    result = train(model, precision="bfloat16", epochs=4)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.history[-1]["train"]["nip"] < result.history[0]["train"]["nip"]
    plain = train(sasrec(), epochs=4)
    assert result.history[0]["train"]["nip"] == pytest.approx(plain.history[0]["train"]["nip"], rel=1e-2)
    assert result.history[0]["train"] != plain.history[0]["train"]  # autocast was on


def test_weight_decay_is_decoupled() -> None:
    model, decayed = sasrec(), sasrec()
    train(model, epochs=1)
    train(decayed, epochs=1, weight_decay=1.0)
    assert sum(float(p.detach().norm()) for p in decayed.parameters()) < sum(
        float(p.detach().norm()) for p in model.parameters()
    )


def test_the_window_is_as_long_as_the_encoder_trains() -> None:
    """Next-item training reads all but the newest item: a window of max_len would leave a position untrained."""
    model = sasrec(losses=0)
    positions = model.encoder.get_parameter("position_embedding")
    before = positions.detach().clone()
    train(model, epochs=1)
    assert bool((positions != before).any(dim=-1).all())


def test_the_mode_is_restored() -> None:
    for mode in (True, False):
        model = sasrec().train(mode)
        train(model, epochs=1)
        assert model.training == model.encoder.training == mode


def test_the_global_random_state_is_untouched(tmp_path: Path) -> None:
    model, before = sasrec(), global_random_state()
    train(model, epochs=1, output_dir=tmp_path)
    evaluate(model, DATA, "test")
    assert global_random_state() == before

    def stop(entry: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, callback=stop, output_dir=tmp_path, overwrite=True)
    assert global_random_state() == before
    train(model, output_dir=tmp_path, resume=True)
    assert global_random_state() == before


def test_the_result_depends_on_the_seed_and_not_on_the_global_random_state() -> None:
    torch.manual_seed(1)
    one = train(sasrec(), epochs=1)
    torch.manual_seed(2)
    same, other = train(sasrec(), epochs=1), train(sasrec(), epochs=1, seed=1)
    assert one.history[0]["train"] == same.history[0]["train"] != other.history[0]["train"]


def test_data_that_do_not_fit() -> None:
    small = SequenceData.from_sequences([[1, 2, 3], [3, 2, 1]])
    with pytest.raises(EnsembleKDError, match="fit: expected data of 60 items, as the model, got 3"):
        fit(sasrec(), small)
    one = SequenceData.from_sequences([[1, 2, 3, 4, V]])
    with pytest.raises(EnsembleKDError, match="fit: expected at least 2 training windows, got 1"):
        fit(sasrec(), one)


def test_one_sequence_a_batch_needs_losses_without_contrast(tmp_path: Path) -> None:
    assert len(train(sasrec(losses=KD()), epochs=1, batch_size=1, window=4, window_step=60).history) == 1
    with pytest.raises(EnsembleKDError, match="sequences"):
        train(sasrec(), epochs=1, batch_size=1, window=4, window_step=60)


def test_the_plan_of_these_tests() -> None:
    """Epochs of so many steps are what the kill points above are placed in."""
    assert len(BatchPlan(DATA.train_windows(9, 4, min_len=2), 64, 0, 0)) == STEPS


def test_a_folder_may_be_a_relative_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(sasrec(), epochs=1, output_dir="run")
    assert (tmp_path / "run" / "best.pt").exists()


def test_two_windows_are_enough_and_one_is_not() -> None:
    model = EnsembleKD(lambda: SASRec(9, d_model=4, num_layers=1, max_len=4), 2)
    two = SequenceData.from_sequences([[1, 2, 3, 4], [5, 6, 7, 8]], num_items=9)
    assert fit(model, two, epochs=1, progress=False).best_epoch == 0
    one = SequenceData.from_sequences([[1, 2, 3, 4]], num_items=9)
    with pytest.raises(EnsembleKDError, match="expected at least 2 training windows, got 1"):
        fit(model, one, epochs=1, progress=False)


def test_nothing_but_model_and_data_is_needed() -> None:
    """The batch follows from the lengths, the end from validation: 200 steps after the best, ten epochs here."""
    rates: list[float] = []
    model, data = sasrec(losses=0), synthetic(num_users=1280, num_items=V, num_clusters=10, max_len=8)
    result = fit(
        model, data, progress=False, log_every=1, callback=lambda e: rates.append(e["lr"]) if "lr" in e else None
    )
    assert len(result.history) < 100
    assert result.best_epoch == len(result.history) - 11
    assert max(rates) == rates[-1] == 2e-3
    assert len(rates) == 20 * len(result.history)


def test_a_batch_has_as_many_items_whatever_the_lengths() -> None:
    model = EnsembleKD(lambda: SASRec(60, d_model=4, num_layers=1, max_len=200), 2, losses=0)
    long = SequenceData.from_sequences([[1 + i % 60 for i in range(u, u + 203)] for u in range(40)], num_items=60)
    fit(model, long, epochs=1, progress=False, callback=(seen := []).append)  # type: ignore[var-annotated]
    assert seen[-1]["step"] == 5  # 201 items a window, so 8 windows a batch


def test_what_never_ends_is_refused() -> None:
    with pytest.raises(EnsembleKDError, match="epochs, over which Cosine spreads, got None"):
        train(sasrec(), epochs=None)
    for transfer in (Ramp(0.2, 0.5), Hump(), lambda epoch, epochs: epoch / epochs):
        with pytest.raises(EnsembleKDError, match="epochs, of which transfer takes shares, got None"):
            fit(sasrec(), DATA, transfer=transfer, progress=False)
    with pytest.raises(EnsembleKDError, match="epochs, for data without validation items, got None"):
        fit(sasrec(), DATA.with_holdout("none"), progress=False)


def test_drawn_windows_are_others_in_each_epoch_and_the_same_after_a_resume(tmp_path: Path) -> None:
    def stop(entry: Any) -> None:
        if entry["kind"] == "step" and entry["epoch"] == 1:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"window_step": None, "window": 5, "epochs": 3, "log_every": 1}
    whole, killed = sasrec(), sasrec()
    train(whole, output_dir=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(killed, output_dir=tmp_path / "killed", callback=stop, **options)
    train(killed, output_dir=tmp_path / "killed", resume=True, **options)
    assert_same_checkpoint(tmp_path / "whole" / "last.pt", tmp_path / "killed" / "last.pt")


def test_anomaly_detection_is_said() -> None:
    said = r"fit: torch's anomaly detection is on.*set_detect_anomaly\(False\)"
    with torch.autograd.set_detect_anomaly(True), pytest.warns(UserWarning, match=said):
        train(sasrec(), epochs=1)
    train(sasrec(), epochs=1)  # where warnings are errors


@pytest.mark.parametrize("objective", [NextItem(views=2), MaskedItem(views=3), NextItem(negatives=20)], ids=repr)
def test_a_start_that_is_worse_than_a_guess_is_said(objective: Any) -> None:
    """Embeddings as torch begins them, to which the classifier is tied; warnings of the narrow ones would be errors."""
    for std, said in ((1.0, True), (0.02, False)):

        def encoder(std: float = std) -> SASRec | BERT4Rec:
            kind = BERT4Rec if isinstance(objective, MaskedItem) else SASRec
            made = kind(DATA.num_items, d_model=64, num_layers=1, num_heads=1, max_len=8)
            torch.nn.init.normal_(made.item_embedding.weight, std=std)
            return made

        model = EnsembleKD(encoder, n=2, objective=objective, classifier="tied", losses=0)
        warned = pytest.warns(UserWarning, match=r"a guess among \d+ items has \d\.\d.*begin narrow")
        with warned if said else nullcontext():
            fit(model, DATA, epochs=2, batch_size=32, lr=1e-3, progress=False)
