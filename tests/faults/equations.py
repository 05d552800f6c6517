"""Calls of the functions of tensors: equations, losses, metrics, serving."""

from __future__ import annotations

from typing import Any

import torch

from ensemble_kd import functional, metrics, serving
from ensemble_kd.losses import (
    Networks,
    attribute_losses,
    distillation_losses,
    item_losses,
    mean_teacher_losses,
    sampled_item_losses,
)
from ensemble_kd.objectives import draw_candidates, mask_positions
from ensemble_kd.training import clip_members_

N, B, T, D, V = 2, 3, 4, 5, 7


def calls() -> list[Any]:
    """(name, function, arguments, kinds) of each."""
    torch.manual_seed(0)
    return [*_equations(), *_losses(), *_metrics(), *_serving()]


def _kinds(arguments: dict[str, Any], **others: str) -> dict[str, str]:
    return {name: "tensor" for name, value in arguments.items() if isinstance(value, torch.Tensor)} | others


def _equations() -> list[Any]:
    logits, targets = torch.randn(N, T, V), torch.arange(T)
    hidden, real = torch.randn(N, B, T, D), torch.ones(B, T, dtype=torch.bool)
    pairs = {"teacher": logits[0], "student": logits[1], "temperature": 0.5}
    together = {"logits": logits, "temperature": 0.5, "scale_by_temperature_squared": False}
    views = {"anchors": torch.randn(N, B, D), "views": torch.randn(N, 2, B, D), "temperature": 0.5, "variant": "paper"}
    pooled = {"hidden": hidden, "real": real, "pool": "flatten"}
    attributes = {
        "logits": torch.randn(N, T, 3),
        "attributes": torch.zeros(T, 2, dtype=torch.long),
        "real": real[0],
    }
    warm, squared = {"temperature": "positive"}, {"scale_by_temperature_squared": "flag"}
    one = {"logits": logits, "targets": targets}
    averaged = {"logits": logits, "averages": logits.flip(0), "temperature": 0.5}
    moved = {"average": torch.zeros(D), "value": torch.ones(D), "decay": 0.9, "step": 2}
    powers = {"average": torch.zeros(D), "value": torch.ones(D), "power": 3.0, "step": 2, "since": 1}
    return [
        ("item_cross_entropy", functional.item_cross_entropy, one, _kinds(one)),
        ("kl_divergence", functional.kl_divergence, pairs, _kinds(pairs, **warm)),
        ("knowledge_distillation", functional.knowledge_distillation, together, _kinds(together, **warm, **squared)),
        ("ambiguity", functional.ambiguity, {"logits": logits}, {"logits": "tensor"}),
        ("target_distillation", functional.target_distillation, one | {"temperature": 0.5}, _kinds(one, **warm)),
        ("mean_teacher_distillation", functional.mean_teacher_distillation, averaged, _kinds(averaged, **warm)),
        ("moving_average", functional.moving_average, moved, _kinds(moved, decay="share", step="natural")),
        ("power_average", functional.power_average, powers, _kinds(powers, power="not_negative", step="natural")),
        ("contrast", functional.contrast, views, _kinds(views, **warm, variant="choice")),
        ("pool_sequence", functional.pool_sequence, pooled, _kinds(pooled, pool="choice")),
        ("attribute_cross_entropy", functional.attribute_cross_entropy, attributes, _kinds(attributes)),
    ]


def _losses() -> list[Any]:
    common = {"hidden": torch.randn(N, T, D), "weight": torch.randn(N, V, D), "bias": torch.randn(N, V)}
    weights = {"ce_weight": 1.0, "kd_weight": 0.5, "temperature": 0.5, "scale_by_temperature_squared": False}
    of_weights = {"temperature": "positive", "scale_by_temperature_squared": "flag"}
    chosen, of_chosen = {"part": "target", "gate": "open"}, {"part": "choice", "gate": "choice"}
    targets = {"targets": torch.arange(T), "valid": None}
    attributes = {
        **common,
        "attributes": torch.zeros(T, 2, dtype=torch.long),
        "real": torch.ones(T, dtype=torch.bool),
    }
    teacher = {"queries": torch.randn(T, 6), "keys": torch.randn(V, 6), "key_bias": torch.randn(V)}
    counts = {"counts": torch.ones(V, dtype=torch.long)}
    items = {**common, **targets, **weights}
    averages = {"averages": Networks(common["hidden"], common["weight"], common["bias"])}
    tiled = items | chosen | {"tile_rows": 2}
    of_tiled = of_weights | of_chosen
    return [
        ("item_losses", item_losses, tiled, _kinds(tiled, **of_tiled, tile_rows="natural?") | {"valid": "thing?"}),
        ("distillation_losses", distillation_losses, items | teacher, _kinds(items | teacher, **of_weights)),
        ("mean_teacher_losses", mean_teacher_losses, items | averages, _kinds(items, **of_weights, averages="thing")),
        (
            "sampled_item_losses",
            sampled_item_losses,
            items | chosen | counts,
            _kinds(items | chosen | counts, **of_tiled),
        ),
        ("attribute_losses", attribute_losses, attributes, _kinds(attributes)),
        (
            "draw_candidates",
            draw_candidates,
            {"targets": torch.arange(1, 4), "num_items": 9, "negatives": 2, "generator": None},
            {"targets": "tensor", "num_items": "natural", "negatives": "natural", "generator": "thing?"},
        ),
        (
            "mask_positions",
            mask_positions,
            {"item_ids": torch.tensor([[0, 1, 2]]), "views": 2, "mask_ratio": 0.5, "newest": None},
            {"item_ids": "ids", "views": "natural", "mask_ratio": "share", "newest": "share?"},
        ),
        (
            "clip_members_",
            clip_members_,
            {"parameters": [_with_gradient()], "max_norm": 1.0},
            {"parameters": "thing", "max_norm": "positive"},
        ),
    ]


def _with_gradient() -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.zeros(2, 3))
    p.grad = torch.ones(2, 3)
    return p


def _metrics() -> list[Any]:
    scores, ranks = torch.randn(N, B, V + 1), torch.tensor([[1, 2, 3], [4, 1, 2]])
    target = {"scores": scores, "target": torch.arange(1, B + 1), "exclude": None}
    of_target = _kinds(target, exclude="thing?")
    return [
        ("ranks", metrics.ranks, target, of_target),
        ("hit_rate", metrics.hit_rate, {"ranks": ranks, "k": 2}, {"ranks": "tensor", "k": "natural"}),
        ("ndcg", metrics.ndcg, {"ranks": ranks, "k": 2}, {"ranks": "tensor", "k": "natural"}),
        ("mrr", metrics.mrr, {"ranks": ranks}, {"ranks": "tensor"}),
        ("metric_row", metrics.metric_row, {"ranks": ranks[0]}, {"ranks": "tensor"}),
        ("disagreement", metrics.disagreement, {"lists": torch.randint(1, 9, (N, B, 4))}, {"lists": "tensor"}),
    ]


def _serving() -> list[Any]:
    states = {"states": torch.randn(N, B, D), "weight": torch.randn(N, V, D), "bias": torch.randn(N, V), "k": 2}
    more = {"seen": None, "candidates": None, "aggregate": "logits"}
    kinds = _kinds(states, k="natural")
    items = {name: states[name] for name in ("weight", "bias")}
    logits = {"logits": torch.randn(N, B, V), "aggregate": "ranks"}
    mean = {name: states[name] for name in ("states", "weight", "bias")} | {"factors": torch.ones(N)}
    return [
        ("top_items", serving.top_items, states | more, kinds | {"seen": "thing?", "candidates": "thing?", "aggregate": "choice"}),
        ("serving.mean_logits", serving.mean_logits, mean, _kinds(mean, factors="tensor?")),
        ("serving.uncertainty", serving.uncertainty, states, kinds),
        ("serving.query_vectors", serving.query_vectors, {"states": states["states"]}, {"states": "tensor"}),
        ("serving.item_vectors", serving.item_vectors, items, _kinds(items)),
        ("aggregate_scores", serving.aggregate_scores, logits, _kinds(logits, aggregate="choice")),
    ]  # fmt: skip
