"""Calls of the functions that read and write files or build data."""

from __future__ import annotations

import gzip
import importlib.util
import json
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ensemble_kd import EnsembleKD, fit, plots
from ensemble_kd.data import (
    BatchPlan,
    BlockPlan,
    ItemAttributes,
    MappedSequences,
    SequenceData,
    Vocabulary,
    left_padded,
    read_amazon,
    read_movielens,
    read_recbole,
    read_text,
    write_sequences,
)
from ensemble_kd.encoders import SASRec
from ensemble_kd.evaluation import evaluate
from ensemble_kd.export import (
    Card,
    Scorer,
    from_pretrained,
    load,
    save,
    save_pretrained,
    to_onnx,
    to_program,
)
from ensemble_kd.growing import grow
from ensemble_kd.metrics import metric_named
from ensemble_kd.recommending import recommend, recommend_all, recommend_for


def calls(folder: Path, data: SequenceData, mapped: MappedSequences, model: EnsembleKD, saved: Path) -> list[Any]:
    """(name, function, arguments, kinds) of each."""
    raw = _raw(folder)
    clean = {"k_core": 1, "repeats": "drop"}
    of_clean = {"k_core": "natural", "repeats": "choice"}
    again = partial(SASRec, model.num_items, d_model=4, num_layers=1, max_len=6, dropout=0.1)
    sequences = {"sequences": [[1, 2, 3], [4, 5, 6]], "num_items": 9}
    of_sequences = {"sequences": "thing", "num_items": "natural"}
    windows = data.train_windows(3)
    plan = {"batch_size": 2, "seed": 0, "epoch": 0}
    of_plan = {"windows": "thing", "batch_size": "natural", "seed": "whole_number", "epoch": "whole_number"}
    written = (folder / f"written{i}" for i in count())
    flat = {"items": data.items, "offsets": data.offsets, "num_items": data.num_items, "item_attributes": None}
    ragged = {"items": data.items, "ends": data.offsets[1:], "lengths": data.offsets.diff(), "width": 5}
    of_load = {"objective": None, "item_attributes": None, "device": "cpu", "check_settings": True}
    kinds_of_load = {
        "objective": "thing?",
        "item_attributes": "thing?",
        "device": "thing",
        "check_settings": "flag",
    }
    return [
        ("load", load, {"path": saved, "encoder_fn": again, **of_load}, {"path": "path", "encoder_fn": "factory", **kinds_of_load}),
        ("save", save, {"model": model, "path": folder / "again.safetensors"}, {"model": "thing", "path": "written_path"}),
        ("from_pretrained", from_pretrained, {"name": saved.parent, "encoder_fn": again, "local_files_only": True, **of_load},
         {"name": "path", "encoder_fn": "factory", "local_files_only": "flag", **kinds_of_load}),
        ("write_sequences", lambda **a: write_sequences(**{"folder": next(written), **a}), sequences, of_sequences | {}),
        ("write_sequences to", write_sequences, {"folder": next(written), **sequences}, {"folder": "written_path"}),
        ("MappedSequences", MappedSequences, {"folder": folder / "mapped", "item_attributes": None, "block": 4, "verify": True},
         {"folder": "path", "item_attributes": "thing?", "block": "natural", "verify": "flag"}),
        ("from_sequences", SequenceData.from_sequences, {**sequences, "item_attributes": None},
         {"sequences": "thing", "num_items": "natural?", "item_attributes": "thing?"}),
        ("SequenceData", SequenceData, {**flat, "item_names": None, "user_names": None},
         {"items": "tensor", "offsets": "tensor", "num_items": "natural", "item_attributes": "thing?", "item_names": "thing?", "user_names": "thing?"}),
        ("inputs", data.inputs, {"split": "test", "max_len": 3}, {"split": "choice", "max_len": "natural"}),
        ("target", data.target, {"split": "test"}, {"split": "choice"}),
        ("history", data.history, {"split": "test"}, {"split": "choice"}),
        ("train_windows", data.train_windows, {"max_len": 3, "step": 1, "min_len": 1}, {"max_len": "natural", "step": "natural?", "min_len": "natural"}),
        ("mapped.train_windows", mapped.train_windows, {"max_len": 3, "step": 1, "min_len": 1}, {"max_len": "natural", "step": "natural?", "min_len": "natural"}),
        ("BatchPlan", BatchPlan, {"windows": windows, **plan, "at_least": 2, "part": (0, 1)}, {**of_plan, "at_least": "natural", "part": "thing"}),
        ("BlockPlan", BlockPlan, {"windows": mapped.train_windows(3), **plan, "part": (0, 1)}, {**of_plan, "part": "thing"}),
        ("ItemAttributes", ItemAttributes, {"num_attributes": 2, "table": torch.tensor([[-1], [0], [1], [-1]])}, {"num_attributes": "natural", "table": "tensor"}),
        ("from_dict", ItemAttributes.from_dict, {"attributes": {1: [1], 2: [1, 2]}, "num_items": 3}, {"attributes": "thing", "num_items": "natural"}),
        ("left_padded", left_padded, ragged, {"items": "tensor", "ends": "tensor", "lengths": "tensor", "width": "natural"}),
        ("read_text", read_text, {"path": raw["text"], "attributes_path": raw["json"]}, {"path": "path", "attributes_path": "path?"}),
        ("read_recbole", read_recbole, {"inter_path": raw["inter"], "item_path": raw["item"], **clean, "attribute_field": "class", "user_field": "user_id", "item_field": "item_id", "time_field": "timestamp"},
         {**of_clean, "inter_path": "path", "item_path": "path?", "attribute_field": "choice", "user_field": "choice", "item_field": "choice", "time_field": "choice"}),
        ("read_movielens", read_movielens, {"ratings_path": raw["ratings"], "movies_path": raw["movies"], **clean}, {**of_clean, "ratings_path": "path", "movies_path": "path?"}),
        ("read_amazon", read_amazon, {"reviews_path": raw["reviews"], "meta_path": raw["meta"], **clean}, {**of_clean, "reviews_path": "path", "meta_path": "path?"}),
        *_by_name(folder, model),
        *_pictures(model, data),
    ]  # fmt: skip


def _by_name(folder: Path, model: EnsembleKD) -> list[Any]:
    """Items and users under the source's own ids."""
    named = SequenceData.from_sequences([[1, 2, 3, 4], [4, 5, 6]], num_items=model.num_items)
    asked = {"k": 2, "exclude_seen": True, "candidates": None, "aggregate": "logits", "unknown": "error"}
    of_asked = {
        "k": "natural",
        "exclude_seen": "flag",
        "candidates": "thing?",
        "aggregate": "choice",
        "unknown": "choice",
    }
    return [
        ("Vocabulary", Vocabulary, {"names": ["tea", "milk"], "first": 1, "kind": "item"}, {"names": "thing"}),
        ("recommending.recommend", recommend, {"model": model, "histories": [[1, 2]], **asked}, {**of_asked, "model": "thing", "histories": "thing"}),
        ("recommend_for", recommend_for, {"model": model, "users": [0], "data": named, **asked}, {**of_asked, "model": "thing", "users": "thing", "data": "thing"}),
        ("recommend_all", recommend_all, {"model": model, "data": named, "path": folder / "all.csv", **asked, "progress": False},
         {**of_asked, "model": "thing", "data": "thing", "path": "written_path", "progress": "flag"}),
        ("grow", grow, {"model": model, "new": 2, "encoder_fn": partial(SASRec, model.num_items + 2, d_model=4, num_layers=1, max_len=6, dropout=0.1), "item_attributes": None}, {"model": "thing", "new": "natural", "encoder_fn": "factory", "item_attributes": "thing?"}),
        ("Scorer", Scorer, {"model": model, "k": 2}, {"model": "thing", "k": "natural?"}),
        ("to_program", to_program, {"model": model, "k": 2}, {"model": "thing", "k": "natural?"}),
        ("to_onnx", to_onnx, {"model": model, "path": folder / "model.onnx", "k": 2}, {"model": "thing", "path": "written_path", "k": "natural?"}),
        ("save_pretrained", save_pretrained, {"model": model, "folder": folder / "pretrained", "card": Card(), "name": "me/tiny"},
         {"model": "thing", "folder": "written_path", "card": "thing"}),
        ("Card", Card, {"data": named, "result": None, "evaluation": None}, {"data": "thing?", "result": "thing?", "evaluation": "thing?"}),
        ("metric_named", metric_named, {"name": "HR@5"}, {"name": "choice"}),
    ]  # fmt: skip


def _pictures(model: EnsembleKD, data: SequenceData) -> list[Any]:
    if importlib.util.find_spec("matplotlib") is None:
        return []
    result, found, ids = (
        fit(model, data, epochs=1, progress=False),
        evaluate(model, data, "test"),
        data.inputs("test", 3),
    )
    of_result = {"result": "thing", "metric": "choice"}
    return [
        ("calibration", plots.calibration, {"model": model, "data": data, "split": "test", "users": 3, "bins": 2}, {"model": "thing", "data": "thing", "split": "choice", "users": "natural", "bins": "natural"}),
        ("curves", plots.curves, {"result": result, "metric": "NDCG@10"}, of_result),
        ("members", plots.members, {"evaluation": found, "metric": "NDCG@10"}, {"evaluation": "thing", "metric": "choice"}),
        ("minutes", plots.minutes, {"results": result, "metric": "NDCG@10"}, {"results": "thing", "metric": "choice"}),
        ("overlap", plots.overlap, {"model": model, "data": data, "k": 2, "users": 3}, {"model": "thing", "data": "thing", "k": "natural", "users": "natural"}),
        ("recommendations", plots.recommendations, {"model": model, "item_ids": ids[:1], "k": 2, "item_names": None}, {"model": "thing", "item_ids": "ids", "k": "natural", "item_names": "thing?"}),
    ]  # fmt: skip


def _raw(folder: Path) -> dict[str, Path]:
    """Small files of every layout that is read."""
    pairs = [(user, item) for user in range(1, 4) for item in range(1, 5)]
    reviews = [{"reviewerID": f"u{u}", "asin": f"i{i}", "unixReviewTime": u + i} for u, i in pairs]
    meta = [{"asin": f"i{i}", "categories": [["a", "b"]]} for i in range(1, 5)]
    texts = {
        "text": "1 1 2 3 4\n2 4 3 2 1",
        "json": json.dumps({"1": [1, 2], "2": [2]}),
        "inter": "\n".join(["user_id:token\titem_id:token\ttimestamp:float", *(f"{u}\t{i}\t{i}" for u, i in pairs)]),
        "item": "\n".join(["item_id:token\tclass:token_seq", *(f"{i}\ta b" for i in range(1, 5))]),
        "ratings": "\n".join(f"{u}::{i}::5::{i}" for u, i in pairs),
        "movies": "\n".join(f"{i}::Name (2000)::Action|Drama" for i in range(1, 5)),
    }
    found = {}
    for name, text in texts.items():
        found[name] = folder / f"raw.{name}"
        found[name].write_text(text + "\n", encoding="utf-8")
    for name, rows in {"reviews": reviews, "meta": meta}.items():
        found[name] = folder / f"raw.{name}.json.gz"
        with gzip.open(found[name], "wt") as file:
            file.write("\n".join(map(json.dumps, rows)) + "\n")
    return found
