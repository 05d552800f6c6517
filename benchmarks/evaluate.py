"""Ranking every user's held-out item among all items, by three members and the ensemble: counting against sorting."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks import recipes
from benchmarks.common import Row, beauty, interleaved, sig
from ensemble_kd import EnsembleKD
from ensemble_kd.data import SequenceData
from ensemble_kd.evaluation import evaluate

COUNT, COUNT_BF16, SORT = "count, float32", "count, bfloat16", "sort, float32"


def first_users(data: SequenceData, users: int) -> SequenceData:
    offsets = data.offsets[: users + 1]
    return SequenceData(data.items[: int(offsets[-1])], offsets, data.num_items, data.item_attributes)


@torch.no_grad()
def sorted_ranks(model: EnsembleKD, data: SequenceData, users: int = 512) -> torch.Tensor:
    """The same ranks by sorting all scores: (n + 1, users). Padding and the history are scored -inf first."""
    inputs, target = data.inputs("test", recipes.WINDOW), data.target("test")
    items, offsets = data.history("test")
    row_of = torch.repeat_interleave(torch.arange(data.num_users), offsets.diff())
    model.eval()
    found = []
    for part in torch.arange(data.num_users).split(users):
        scores = model.member_scores(inputs[part].to(model.device))
        scores = torch.cat([scores, scores.mean(dim=0, keepdim=True)])
        wanted = target[part].to(scores.device)
        own = (row_of >= part[0]) & (row_of <= part[-1]) & (items != target[row_of])
        rows, seen = (row_of[own] - part[0]).to(scores.device), items[own].to(scores.device)
        scores[:, rows, seen] = -torch.inf
        order = scores.argsort(dim=-1, descending=True)
        found.append((order == wanted[:, None]).to(torch.uint8).argmax(dim=-1).cpu())
    return torch.cat(found, dim=1)


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows: ms, users a second; all users by counting, the first 2,048 by both ways."""
    data, d = beauty(quick), 8 if quick else 64
    model = recipes.ensemble(data, d, views=2, device=device)
    few = first_users(data, min(2048, data.num_users))
    calls: dict[str, Callable[[SequenceData], object]] = {
        COUNT: lambda subset: evaluate(model, subset, "test", max_len=recipes.WINDOW, precision="float32"),
        COUNT_BF16: lambda subset: evaluate(model, subset, "test", max_len=recipes.WINDOW, precision="bfloat16"),
        SORT: lambda subset: sorted_ranks(model, subset),
    }
    rows: list[Row] = []
    for subset, names in ((few, (SORT, COUNT, COUNT_BF16)), (data, (COUNT, COUNT_BF16))):
        steps = {name: functools.partial(calls[name], subset) for name in names}
        found = interleaved(f"evaluate, {subset.num_users} users", steps, rounds=5, quick=quick)
        for name, times in found.items():
            row: Row = {"users": subset.num_users, "scorers": len(model) + 1, "d": d, "v": data.num_items}
            row |= {"variant": name, **times.row()}
            if not times.error:
                row["users_per_s"] = sig(subset.num_users / times.median * 1e3)
            rows.append(row | (times.faster_than(found[SORT]) if SORT in found else {}))
    return rows
