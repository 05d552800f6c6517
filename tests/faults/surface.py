"""The public functions: for each, arguments that work, and the kind of each argument (see ``junk``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ensemble_kd import (
    AP,
    CCL,
    ICL,
    KD,
    EnsembleKD,
    MaskedItem,
    NextItem,
    fit,
)
from ensemble_kd.data import MappedSequences, SequenceData, synthetic, write_sequences
from ensemble_kd.distillation import FromTeacher, distill
from ensemble_kd.encoders import (
    BERT4Rec,
    Caser,
    GRU4Rec,
    SASRec,
    from_huggingface,
    right_padded,
)
from ensemble_kd.ensemble import Mutual
from ensemble_kd.evaluation import calibrate, calibration_error, evaluate, evaluate_popularity
from ensemble_kd.export import save
from ensemble_kd.objectives import splice
from ensemble_kd.presets import paper, recipe, strong_kd
from ensemble_kd.stacking import StackedModule
from ensemble_kd.testing import check_encoder
from ensemble_kd.training import Cosine, Hump, Ramp, RowAdamW, StepDecay, WarmupStableAverage
from tests.faults import equations, files

V, L = 12, 6


@dataclass(frozen=True)
class Call:
    """A public function with arguments that work. A kind that ends in "?" may also be None."""

    name: str
    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    kinds: dict[str, str]


# What drawn arguments may be although their kind says otherwise: (function, argument) or (function, argument, value).
VALID: set[tuple[str, ...]] = {
    ("member", "i"),  # -1 is the last, as of any sequence
    ("weight * loss", "weight"),  # 0 leaves the term out
    ("check_encoder", "encoder_fn"),  # the report is what says that it is wrong
    ("BatchPlan", "part", "(1, 2)"),
    ("recommend", "candidates", "(1, 2)"),
    ("top_items", "candidates", "(1, 2)"),
    ("from_sequences", "sequences", "[[1, 2, 3]]"),
    ("write_sequences", "sequences", "[[1, 2, 3]]"),
    ("RowAdamW", "weight_decay"),  # 0 is none, and 0 moves nothing
    ("RowAdamW", "lr"),
    ("RowAdamW", "eps"),
    ("BERT4Rec", "init_std", "None"),  # Glorot's rule
    ("SASRec", "init_std", "None"),
    ("fit", "checkpoint_every_s"),  # 0 is after every step
    ("distill", "checkpoint_every_s"),
    ("fit", "weight_decay"),
    ("distill", "weight_decay"),
    # Tensors of other sizes, where no other argument fixes them, and values that are not looked at.
    *((name, "ranks") for name in ("mrr", "ndcg", "hit_rate", "metric_row")),
    ("disagreement", "lists"),
    ("aggregate_scores", "logits"),
    ("item_cross_entropy", "logits"),
    *((name, "logits") for name in ("knowledge_distillation", "ambiguity", "target_distillation")),
    ("pool_sequence", "hidden"),
    ("attribute_cross_entropy", "attributes"),
    ("attribute_losses", "attributes"),
    ("serving.query_vectors", "states"),
    ("ranks", "scores"),
    ("ItemAttributes", "table"),
    ("splice", "item_ids"),
    ("mask_positions", "item_ids"),
    ("sampled_item_losses", "counts"),
    ("attribute_cross_entropy", "logits"),
    ("draw_candidates", "targets"),
    *(("left_padded", name) for name in ("items", "ends", "lengths")),
    ("recommending.recommend", "histories", "[]"),
    ("recommendations", "item_ids"),  # one user out of two
    ("recommending.recommend", "histories", "[[1, 2, 3]]"),
    ("recommending.recommend", "candidates", "(1, 2)"),
    ("recommending.recommend", "histories", "{}"),
    ("calibration_error", "right"),
    ("evaluate", "metrics", "[]"),
    ("Vocabulary", "names"),  # of any type that can be the key of a dict
    ("recommend_for", "users"),
    ("recommend_for", "candidates", "(1, 2)"),
    ("recommend_all", "candidates", "(1, 2)"),
    ("grow", "encoder_fn", "None"),
    ("item_losses", "bias", "None"),
    ("serving.item_vectors", "weight"),
}


def encoder() -> SASRec:
    return SASRec(V, d_model=4, num_layers=1, max_len=L, dropout=0.1)


def surface(folder: Path) -> list[Call]:
    """Every public function; ``folder`` receives the files that they read and write."""
    data = SequenceData.from_sequences([[1, 2, 3, 4], [4, 5, 6, 7, 8], [9, 10, 11], [12, 1, 2]])
    write_sequences(folder / "mapped", [[1, 2, 3], [4, 5, 6, 7]], num_items=V)
    mapped = MappedSequences(folder / "mapped")
    model = EnsembleKD(encoder, 2)
    saved = save(model, folder / "model.safetensors")
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    calls = [
        *_building(model, data, ids),
        *_answering(model, ids),
        *_training(model, data, folder),
        *_encoders(),
        *equations.calls(),
        *files.calls(folder, data, mapped, model, saved),
    ]
    return [Call(name, function, (lambda a=arguments: dict(a)), kinds) for name, function, arguments, kinds in calls]


def _building(model: EnsembleKD, data: SequenceData, ids: torch.Tensor) -> list[Any]:
    options: dict[str, Any] = {
        "num_items": V,
        "objective": NextItem(),
        "losses": KD(),
        "item_attributes": None,
        "classifier": "linear",
        "max_len": L,
        "seed": 0,
        "backend": "loop",
        "mesh": None,
        "vocabulary": None,
    }
    kinds = {
        "num_items": "natural?",
        "objective": "thing?",
        "losses": "thing?",
        "item_attributes": "thing?",
        "classifier": "choice",
        "max_len": "natural?",
        "seed": "whole_number",
        "backend": "choice",
        "mesh": "thing?",
        "vocabulary": "thing?",
    }
    return [
        ("EnsembleKD", EnsembleKD, {"encoder_fn": encoder, "n": 2, **options}, {**kinds, "encoder_fn": "factory", "n": "natural"}),
        ("from_members", EnsembleKD.from_members, {"members": [encoder(), encoder()], **options}, {**kinds, "members": "thing"}),
        ("StackedModule", StackedModule, {"members": [encoder(), encoder()], "backend": "loop"}, {"members": "thing", "backend": "choice"}),
        ("MaskedItem", MaskedItem, {"mask_ratio": 0.2, "views": 2, "newest": 0.5, "negatives": None}, {"mask_ratio": "share", "views": "natural", "newest": "share?", "negatives": "natural?"}),
        ("NextItem", NextItem, {"mask_ratio": 0.0, "views": 2, "negatives": None}, {"mask_ratio": "share", "views": "natural", "negatives": "natural?"}),
        ("ICL", ICL, {"temperature": 0.3, "pool": "flatten", "variant": "paper"}, {"temperature": "positive", "pool": "choice", "variant": "choice"}),
        ("CCL", CCL, {"temperature": 0.3, "pool": "flatten", "variant": "paper"}, {"temperature": "positive", "pool": "choice", "variant": "choice"}),
        ("KD", KD, {"temperature": 0.3, "scale_by_temperature_squared": False, "between": "all", "part": "target", "gate": "better", "on": "batch"},
         {"temperature": "positive", "scale_by_temperature_squared": "flag", "between": "choice", "part": "choice", "gate": "choice", "on": "choice"}),
        ("weight * loss", lambda weight, loss: weight * loss, {"weight": 0.5, "loss": AP()}, {"weight": "positive"}),
        ("paper", paper, {"item_attributes": None}, {}),
        ("strong_kd", strong_kd, {"item_attributes": None}, {}),
        ("check_encoder", check_encoder, {"encoder_fn": encoder, "num_items": V, "max_len": L, "compile": False, "seed": 0},
         {"encoder_fn": "factory", "num_items": "natural?", "max_len": "natural?", "compile": "flag", "seed": "whole_number"}),
    ]  # fmt: skip


def _answering(model: EnsembleKD, ids: torch.Tensor) -> list[Any]:
    asked = {"item_ids": ids, "k": 2, "exclude_seen": True, "candidates": [7, 8, 9], "aggregate": "logits"}
    kinds = {"item_ids": "ids", "k": "natural", "exclude_seen": "flag", "candidates": "thing?", "aggregate": "choice"}
    only = ({"item_ids": ids}, {"item_ids": "ids"})
    return [
        ("recommend", model.recommend, asked, kinds),
        ("uncertainty", model.uncertainty, {"item_ids": ids, "k": 2}, {"item_ids": "ids", "k": "natural"}),
        ("query_vectors", model.query_vectors, *only),
        ("forward", model, *only),
        ("member_scores", model.member_scores, *only),
        ("hidden", model.hidden, *only),
        ("loss", model.loss, {"item_ids": ids, "generator": None}, {"item_ids": "ids", "generator": "thing?"}),
        ("member", model.member, {"i": 0}, {"i": "whole_number"}),
        ("splice", splice, {"item_ids": ids, "generator": None}, {"item_ids": "ids", "generator": "thing?"}),
    ]


def _training(model: EnsembleKD, data: SequenceData, folder: Path) -> list[Any]:
    options: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 4,
        "lr": 1e-3,
        "weight_decay": 0.01,
        "schedule": Cosine(),
        "transfer": None,
        "max_grad_norm": 5.0,
        "window": 3,
        "window_step": 1,
        "by_length": True,
        "precision": "float32",
        "cuda_graphs": False,
        "exclude": "history",
        "metric": "NDCG@10",
        "patience": None,
        "output_dir": None,
        "resume": False,
        "overwrite": False,
        "checkpoint_every_s": 9.0,
        "log_every": 1,
        "callback": None,
        "progress": False,
        "seed": 0,
    }
    kinds = {
        "epochs": "natural",
        "batch_size": "natural?",
        "lr": "positive",
        "weight_decay": "positive",
        "schedule": "function",
        "transfer": "function?",
        "max_grad_norm": "positive?",
        "window": "natural?",
        "window_step": "natural?",
        "by_length": "flag",
        "precision": "choice",
        "cuda_graphs": "flag",
        "exclude": "choice",
        "metric": "word",
        "patience": "natural?",
        "output_dir": "written_path?",
        "resume": "flag",
        "overwrite": "flag",
        "checkpoint_every_s": "positive",
        "log_every": "natural",
        "callback": "function?",
        "progress": "flag",
        "seed": "whole_number",
    }
    student = {"ensemble": model, "student_fn": encoder, "data": data, "n": 1, "losses": None, "objective": None}
    distilled = {
        "ensemble": "thing",
        "student_fn": "factory",
        "data": "thing",
        "n": "natural",
        "losses": "thing?",
        "objective": "thing?",
        "classifier": "choice?",
        "spliced": "flag",
    }
    shown = {"exclude": "history", "max_len": 4}
    asked = {"data": "thing", "split": "choice", "exclude": "choice"}
    return [
        ("fit", fit, {"model": model, "data": data, "loss": Mutual(), **options}, {**kinds, "model": "thing", "data": "thing", "loss": "function"}),
        ("distill", distill, {**student, "classifier": None, "spliced": False, **options}, {**distilled, **kinds}),
        ("FromTeacher", FromTeacher, {"teacher": model, "spliced": True}, {"teacher": "thing", "spliced": "flag"}),
        ("evaluate", evaluate, {"model": model, "data": data, "split": "test", "batch_size": 4, "precision": "float32", "place": None, "metrics": ["HR@5"], **shown},
         {**asked, "model": "thing", "max_len": "natural?", "batch_size": "natural", "precision": "choice", "place": "thing?", "metrics": "thing"}),
        ("calibrate", calibrate, {"model": model, "data": data, "split": "valid", "users": 4, "exclude": "history"},
         {**asked, "model": "thing", "users": "natural"}),
        ("calibration_error", calibration_error, {"confidence": torch.tensor([0.5, 0.9]), "right": torch.tensor([True, False])}, {"confidence": "tensor", "right": "tensor"}),
        ("evaluate_popularity", evaluate_popularity, {"data": data, "split": "test", **shown}, {**asked, "max_len": "natural"}),
        ("WarmupStableAverage", WarmupStableAverage, {"warmup": 0.5, "power": 3.0, "patience": 2}, {"patience": "natural", "power": "not_negative"}),
        ("StepDecay", StepDecay, {"every": 100, "factor": 0.1}, {"every": "natural", "factor": "share"}),
        ("Cosine", Cosine, {"warmup": 0.0, "floor": 0.1}, {"floor": "share"}),
        ("Ramp", Ramp, {"start": 0.0, "full": 0.5, "unit": "run"}, {"start": "share", "full": "share", "unit": "choice"}),
        ("Hump", Hump, {"start": 0.0, "full": 0.2, "end": 0.9, "floor": 1e-5, "unit": "run"},
         {"start": "share", "full": "share", "end": "share", "floor": "positive", "unit": "choice"}),
        ("recipe", recipe, {"data": data, "encoder": SASRec}, {"data": "thing", "encoder": "thing"}),
        ("RowAdamW", RowAdamW, {"params": [torch.nn.Parameter(torch.zeros(1, 2))], "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
         {"params": "thing", "lr": "positive", "betas": "thing", "eps": "positive", "weight_decay": "positive"}),
        ("synthetic", synthetic, {"num_users": 9, "num_items": 90, "seed": 0, "num_clusters": 3, "min_len": 5, "max_len": 9},
         {"num_users": "natural", "num_items": "natural", "seed": "whole_number", "num_clusters": "natural", "min_len": "natural", "max_len": "natural"}),
    ]  # fmt: skip


def _encoders() -> list[Any]:
    sizes = {"num_items": V, "d_model": 4, "max_len": L, "dropout": 0.1}
    kinds = {
        "num_items": "natural",
        "d_model": "natural",
        "max_len": "natural",
        "dropout": "share",
        "init_std": "positive",
    }
    blocks = {"num_layers": 1, "num_heads": 1, "d_ff": 8, "norm_first": True, "init_std": 0.1}
    of_blocks = {"num_layers": "natural", "num_heads": "natural", "d_ff": "natural?", "norm_first": "flag"}
    inner = {"model": encoder(), "num_items": V, "max_len": L, "causal": True}
    of_inner = {"model": "module", "num_items": "natural?", "max_len": "natural?", "causal": "flag?"}
    return [
        ("SASRec", SASRec, {**sizes, **blocks, "activation": "relu", "positions": "learned", "scale_embedding": True},
         {**kinds, **of_blocks, "activation": "choice", "positions": "choice", "scale_embedding": "flag"}),
        ("BERT4Rec", BERT4Rec, {**sizes, **blocks, "output_head": False}, {**kinds, **of_blocks, "output_head": "flag"}),
        ("GRU4Rec", GRU4Rec, {**sizes, "num_layers": 1, "hidden_size": 8, "init_std": 0.1}, {**kinds, "num_layers": "natural", "hidden_size": "natural?"}),
        ("Caser", Caser, {**sizes, "window": 3, "horizontal": 2, "vertical": 2, "init_std": 0.1},
         {**kinds, "window": "natural", "horizontal": "natural", "vertical": "natural"}),
        ("SASRec.forward", encoder(), {"item_ids": torch.tensor([[1, 2]])}, {"item_ids": "module"}),
        ("from_huggingface", from_huggingface, inner, of_inner),
        ("right_padded", right_padded, {**inner, "positions": "last", "lengths": True}, {**of_inner, "positions": "choice", "lengths": "flag"}),
    ]  # fmt: skip
