"""What once went wrong without a word, or with a raw error. Each has a deeper test in its own room, named here.

===  =========================================================  ======================================================
 1   serving from many threads                                  tests/stacking/test_templates.py, threads.py
 2   bit rot of checkpoints and saved models                    tests/test_files.py, damage.py
 3   sequences on disk, damaged or replaced while read          tests/data/test_mapped.py, damage.py
 4   a saved model under an encoder with other settings         tests/export/test_weights.py
 5   a save that is killed over an older model                  tests/test_files.py, tests/export/test_weights.py
 6   a log that is shortened by a run that is killed            tests/training/test_log_file.py, kills.py
 7   two runs in one folder                                     tests/training/test_folder.py
 8   members that return scores; weights that are NaN           tests/ensemble/test_model.py, tests/test_serving.py
 9   resume without last.pt                                     tests/training/test_folder.py
10   a full disk; checkpoints of wrong content                  tests/test_files.py, tests/training/test_state.py
11   arguments and files that cannot be used                    calls.py, tests/data/test_readers.py
12   encoders that see the target, or return logits             tests/ensemble/test_model.py
13   a second run; the mode of a loaded model; memory           tests/training/test_folder.py, tests/test_serving.py
14   lists with zeros; repeated items; wrong layouts            tests/test_serving.py, tests/data/test_readers.py
===  =========================================================  ======================================================
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemble_kd import KD, EnsembleKD, EnsembleKDError, MaskedItem, NextItem, fit
from ensemble_kd.data import ItemAttributes, MappedSequences, SequenceData, read_text, write_sequences
from ensemble_kd.distillation import distill
from ensemble_kd.encoders import BERT4Rec, SASRec
from ensemble_kd.export import load, save
from tests.faults import damage, threads

V = 12
DATA = SequenceData.from_sequences([[1, 2, 3, 4], [4, 5, 6, 7, 8], [9, 10, 11], [12, 1, 2, 3]], num_items=V)
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def sasrec(**changes: Any) -> SASRec:
    return SASRec(V, **({"d_model": 4, "num_layers": 1, "max_len": 4} | changes))


def ensemble() -> EnsembleKD:
    return EnsembleKD(sasrec, 2)


def run(folder: Path, **options: Any) -> Any:
    return fit(ensemble(), DATA, **({"epochs": 1, "batch_size": 4, "output_dir": folder, "progress": False} | options))


CALLS = itertools.count()


def falling(_: EnsembleKD, __: Any) -> float:
    """A metric by which the first epoch is the best: best.pt is then not the last state."""
    return -float(next(CALLS))


def test_1_four_threads_get_the_answers_of_one_in_both_modes() -> None:
    outcome = threads.run(60, seed=0, count=4)
    assert outcome.faults == []
    assert outcome.counts["calls"] >= 4 * 60


def test_2_a_flipped_bit_is_found(tmp_path: Path) -> None:
    run(tmp_path, epochs=2, metric=falling)
    for name in ("last.pt", "best.pt"):
        whole = (tmp_path / name).read_bytes()
        for at in range(100, len(whole), len(whole) // 9):
            (tmp_path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            with pytest.raises(EnsembleKDError, match=f"{name}.*checksum"):
                run(tmp_path, epochs=2, metric=falling, resume=True)
        (tmp_path / name).write_bytes(whole)
    run(tmp_path, epochs=2, metric=falling, resume=True)


def test_3_sequences_that_are_replaced_while_they_are_read(tmp_path: Path) -> None:
    write_sequences(tmp_path, [[1, 2, 3]] * 1000, num_items=3)
    open_ones = MappedSequences(tmp_path)
    write_sequences(tmp_path, [[3, 2, 1]], num_items=3)
    assert sum(len(piece.items) for piece in open_ones.pieces()) == 3000  # no SIGBUS
    assert next(iter(MappedSequences(tmp_path).pieces())).items.tolist() == [3, 2, 1]
    items = next(tmp_path.glob("items-*"))
    items.write_bytes(np.array([3, 2, 2], dtype="<i4").tobytes())
    with pytest.raises(EnsembleKDError, match="checksum"):
        MappedSequences(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"), [({"scale_embedding": False}, "scale"), ({"num_heads": 2}, "num_heads")]
)
def test_4_weights_under_other_settings_are_refused(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = save(ensemble(), tmp_path / "model.safetensors")
    with pytest.raises(EnsembleKDError, match=named):
        load(path, lambda: sasrec(**settings))


def test_5_a_saved_model_is_one_file(tmp_path: Path) -> None:
    save(ensemble(), tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_6_a_damaged_log_is_refused_and_a_torn_line_cut(tmp_path: Path) -> None:
    run(tmp_path, epochs=2, log_every=1)
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"kind": "st')
    run(tmp_path, epochs=2, log_every=1, resume=True)
    assert log.read_bytes() == whole
    log.write_bytes(b"\xff\xfe" + whole[2:])
    with pytest.raises(EnsembleKDError, match="damaged at line 1"):
        run(tmp_path, epochs=2, log_every=1, resume=True)


def test_7_the_second_of_two_runs_in_a_folder_is_refused(tmp_path: Path) -> None:
    def second(_: Any) -> None:
        with pytest.raises(EnsembleKDError, match=r"in use by process \d+"):
            run(tmp_path, resume=True)

    run(tmp_path, log_every=1, callback=second)


def test_8_members_of_an_ensemble_and_weights_of_nan_are_refused() -> None:
    model = ensemble()
    with pytest.raises(EnsembleKDError):
        EnsembleKD.from_members([model.member(0), model.member(1)])
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    with pytest.raises(EnsembleKDError, match="finite"):
        model.recommend(IDS, 2)


def test_9_resume_without_last_pt_keeps_best_pt(tmp_path: Path) -> None:
    run(tmp_path)
    best = zlib.crc32((tmp_path / "best.pt").read_bytes())
    (tmp_path / "last.pt").unlink()
    with pytest.raises(EnsembleKDError, match=r"expected last\.pt"):
        run(tmp_path, resume=True)
    assert zlib.crc32((tmp_path / "best.pt").read_bytes()) == best


def test_10_a_best_pt_that_lacks_a_weight_is_refused_at_once(tmp_path: Path) -> None:
    """It was read, and ended the run with a raw error after all its training."""
    run(tmp_path, epochs=2, metric=falling)
    path = tmp_path / "best.pt"
    content = damage.files.load(path)
    weights = content["model"]
    steps: list[Any] = []
    for spoiled in ({}, {name: torch.zeros(1) for name in weights}, {**weights, "more": torch.zeros(1)}):
        damage.files.save(path, {**content, "model": spoiled})
        with pytest.raises(EnsembleKDError, match=r"best\.pt"):
            run(tmp_path, epochs=2, metric=falling, resume=True, callback=steps.append)
    assert steps == []


MALFORMED: dict[str, Callable[[Path], Any]] = {
    "1.5 is no item": lambda _: SequenceData.from_sequences([[1, 1.5, 2]]),
    "2**62 attributes": lambda _: ItemAttributes.from_dict({1: [2**62]}, num_items=2),
    "distill n=2**70": lambda _: distill(ensemble(), sasrec, DATA, n=2**70),
    "distill epochs=2**70": lambda _: distill(ensemble(), sasrec, DATA, epochs=2**70),
    "device": lambda folder: load(save(ensemble(), folder / "m.safetensors"), sasrec, device="no such device"),
    "schedule=3": lambda folder: run(folder / "r", schedule=3),
    "callback=1": lambda folder: run(folder / "r", callback=1),
    "candidates=[1, 20]": lambda _: ensemble().recommend(IDS, 2, candidates=[1, 20]),
    "a file for a folder": lambda folder: run(_made(folder / "file")),
    "a list of ids": lambda _: ensemble().recommend([[1, 2]], 2),  # type: ignore[arg-type]
    "an array of ids": lambda _: ensemble().recommend(np.array([[1, 2]]), 2),  # type: ignore[arg-type]
    "no such file": lambda folder: read_text(folder / "no"),
    "a number for a path": lambda _: read_text(3),  # type: ignore[arg-type]
    "a word for a flag": lambda _: ensemble().recommend(IDS, 2, exclude_seen="False"),  # type: ignore[arg-type]
    "a module for losses": lambda _: EnsembleKD(sasrec, 2, losses=torch.nn.Linear(1, 1)),  # type: ignore[arg-type]
}


def _made(path: Path) -> Path:
    path.write_text("")
    return path


@pytest.mark.parametrize("name", MALFORMED)
def test_11_malformed_calls_are_one_clear_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(EnsembleKDError) as error:
        MALFORMED[name](tmp_path)
    assert all(str(part) for part in (error.value.where, error.value.expected, error.value.fix))
    assert not (tmp_path / "r").exists()  # nothing is written


def test_11_numbers_of_numpy_and_candidates_that_come_twice(tmp_path: Path) -> None:
    write_sequences(tmp_path, [[1, 2, 3]], num_items=np.int64(5))
    assert MappedSequences(tmp_path).num_items == 5
    found = ensemble().recommend(IDS, 2, candidates=[7, 7, 9]).items
    assert all(sorted(row) == [7, 9] for row in found.tolist())


def test_12_encoders_that_see_the_target_or_return_logits_are_refused() -> None:
    def bert() -> BERT4Rec:
        return BERT4Rec(V, d_model=4, num_layers=1, max_len=4)

    with pytest.raises(EnsembleKDError, match="MaskedItem"):
        EnsembleKD(bert, 2, objective=NextItem())
    EnsembleKD(bert, 2, objective=MaskedItem())

    class Logits(SASRec):
        def forward(self, item_ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(super().forward(item_ids) @ self.item_embedding.weight[1:-1].T, (1, 0))

    with pytest.raises(EnsembleKDError, match="logits"):
        EnsembleKD(lambda: Logits(V, d_model=4, num_layers=1, max_len=4), 2)


def test_13_a_second_run_keeps_the_first_and_a_loaded_model_answers_twice_alike(tmp_path: Path) -> None:
    run(tmp_path / "run")
    best = (tmp_path / "run" / "best.pt").read_bytes()
    with pytest.raises(EnsembleKDError, match="an output_dir without a run"):
        run(tmp_path / "run")
    assert (tmp_path / "run" / "best.pt").read_bytes() == best
    model = EnsembleKD(lambda: sasrec(dropout=0.5), 2)
    loaded = load(save(model, tmp_path / "m.safetensors"), lambda: sasrec(dropout=0.5))
    assert torch.equal(loaded(IDS), loaded(IDS))


def test_14_lists_have_no_zeros() -> None:
    found = ensemble().recommend(torch.tensor([list(range(1, V))]), 3)
    assert found.items.tolist() == [[V, 0, 0]]
    assert found.lists(tuple(map(str, range(1, V + 1)))) == [[str(V)]]


def test_calibrating_members_that_know_nothing_gives_numbers() -> None:
    """The best factors were all 0, and their shares 0 / 0."""
    from ensemble_kd.evaluation import calibrate

    for seed in range(3):
        model = EnsembleKD(sasrec, 2, seed=seed)
        assert calibrate(model, DATA).weights.isfinite().all()


def test_a_member_may_be_counted_from_the_end() -> None:
    model = EnsembleKD(sasrec, 3, losses=KD()).eval()
    assert torch.equal(model.member(-1)(IDS), model.member(2)(IDS))
