"""This library's training, as its pages show it, with a clock as a callback of ``fit``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import shared
import torch
from torch import Tensor

from ensemble_kd import KD, EnsembleKD, fit
from ensemble_kd.data import SequenceData, read_text
from ensemble_kd.distillation import FromTeacher
from ensemble_kd.encoders import SASRec
from ensemble_kd.ensemble import ItemLoss, Mutual
from ensemble_kd.presets import Recipe, recipe
from ensemble_kd.training import Ramp


def prepare(path: str, settings: Mapping[str, Any]) -> tuple[SequenceData, Recipe]:
    """User code: the text file, and an encoder's settings for it."""
    data = read_text(path)
    found = recipe(data, SASRec)
    return data, replace(found, settings={**found.settings, **settings})


def build(found: Recipe, n: int, seed: int) -> tuple[EnsembleKD, ItemLoss]:
    """User code: n networks that are trained side by side."""
    return found.ensemble(n, seed=seed, losses=0), Mutual()


def build_taught(found: Recipe, n: int, seed: int) -> tuple[EnsembleKD, ItemLoss]:
    """User code: n networks that teach each other."""
    return found.ensemble(n, seed=seed, losses=KD(temperature=1.0)), Mutual()


def build_student(found: Recipe, seed: int, teacher: EnsembleKD) -> tuple[EnsembleKD, ItemLoss]:
    """User code of a student: as ``distill`` builds it, so that the clock can see it."""
    return found.ensemble(1, seed=seed, losses=10 * KD(temperature=1.0)), FromTeacher(teacher)


def train(model: EnsembleKD, data: SequenceData, **options: Any) -> None:
    """User code: ``fit``, with its defaults; the callback is our clock."""
    fit(model, data, progress=False, overwrite=True, **options)


def run(job: dict[str, Any]) -> None:
    settings = dict(job["settings"])
    n, epochs = settings.pop("n"), settings.pop("epochs", None)
    taught, newest = settings.pop("taught", False), settings.pop("newest", None)
    width = settings.get("d_model")
    if width is not None:
        settings["d_ff"] = 4 * width
    data, found = prepare(job["data"], settings)
    if job["after"]:
        teacher, _ = build(found, 3, job["seed"])
        teacher.load_state_dict(torch.load(Path(job["after"]) / "model.pt", weights_only=True))
        model, loss = build_student(found, job["seed"], teacher)
    else:
        model, loss = (build_taught if taught else build)(found, n, job["seed"])
    options = {"transfer": Ramp(2, 5, unit="epochs")} if taught else {}
    watched(job, model, data, found.settings["max_len"], newest, loss=loss, epochs=epochs, **options)


def watched(
    job: dict[str, Any], model: EnsembleKD, data: SequenceData, max_len: int, newest: int | None, **options: Any
) -> None:
    """Train with ``fit``, on the clock, on so many of the newest items of each user, and write what is to be ranked.

    What is validated is what ``fit`` would keep if it ended then: its best epoch's averaged weights; before the end of
    the first epoch there are none, and the weights of that moment count.
    """
    data = data if newest is None else data.newest(newest)
    sequences = shared.read_sequences(job["data"])
    chosen = torch.tensor(shared.some(len(sequences)))
    given = {split: data.inputs(split, max_len) for split in ("valid", "test")}
    histories, targets = shared.split_of(sequences, "valid")
    folder = Path(job["folder"])
    shown, best, file = copy.deepcopy(model).eval(), dict[str, Any](), folder / "fit" / "best.pt"

    def state() -> dict[str, Any]:
        kept: dict[str, Any] = torch.load(file, weights_only=True)["model"] if file.exists() else model.state_dict()
        return kept

    @torch.no_grad()
    def vectors(ids: Tensor) -> shared.Vectors:
        queries = torch.cat([shown.query_vectors(part) for part in ids.split(shared.BLOCK)])
        items = shown.item_vectors()
        return shared.Vectors(queries, torch.cat([torch.zeros_like(items[:1]), items]), torch.zeros(len(items) + 1))

    def validate() -> float:
        shown.load_state_dict(state())
        users = chosen.tolist()
        found = vectors(given["valid"][chosen])
        value: float = shared.ndcg(found, [histories[user] for user in users], [targets[user] for user in users])
        return value

    watch = shared.Watch(job["minutes"], validate, lambda: best.update(shared.copied(shown.state_dict())))
    batches, precision, ended = 0, None, False  # of an epoch; until one is done

    def clock(entry: Any) -> None:
        """Note a step. Between the last one of an epoch and its entry there is validation, which does not count."""
        nonlocal batches, precision, ended
        if entry["kind"] == "epoch":
            watch.resume()
            batches, precision, ended = watch.steps // (watch.epochs + 1), entry["precision"], True
            return
        if ended:  # best.pt is written after the epoch's entry
            watch.epoch()
            ended = False
        watch.pause()
        watch.step()

    with suppress(shared.Over):
        train(model, data, seed=job["seed"], callback=clock, log_every=1, output_dir=file.parent, **options)
        watch.epoch()
    peak = shared.peak_mib()
    shown.load_state_dict(best)
    torch.save(best, folder / "model.pt")
    wide, tests = given["test"].shape[1], shared.split_of(sequences, "test")[0]
    few = [user for user in chosen.tolist() if len(tests[user]) <= wide][: shared.ASKED]
    said = shown.recommend(given["test"][few], k=shared.K).items.tolist()
    served = shared.requests(lambda users: shown.recommend(given["test"][users], k=shared.K), len(sequences))
    parameters = sum(p.numel() for p in model.parameters())
    account = {
        **watch.account(batches),
        "peak_mib": peak,
        "parameters": parameters,
        "serving": served,
        "agreement": shared.agreement(vectors(given["test"][few]), [tests[user] for user in few], said),
        "precision": precision,
    }
    shared.write(folder, vectors(given["test"]), account)


if __name__ == "__main__":
    shared.main(run)
