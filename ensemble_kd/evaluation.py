"""Leave-one-out evaluation over the whole item set, of the ensemble and of each member, in one pass (Sec. 4.1.2)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ensemble_kd.data.ragged import left_padded
from ensemble_kd.data.sequences import SequenceData
from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.metrics import metric_row, ranks

Exclude = Literal["none", "window", "history"]
Precision = Literal["float32", "bfloat16"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Autocast to bfloat16, or nothing.

    Raises:
        EnsembleKDError: for any other precision.
    """
    if precision not in get_args(Precision):
        raise EnsembleKDError("precision", "'float32' or 'bfloat16'", repr(precision), "Choose one of these.")
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of each scorer on one split.

    Args:
        protocol: what was ranked and what was left out.
        rows: scorer ("member 0", ..., "ensemble") -> metric -> value.
        ranks: scorer -> (num_users,) int64 rank of the target from 0, in the users' order, for paired tests.
    """

    protocol: str
    rows: Mapping[str, Mapping[str, float]]
    ranks: Mapping[str, Tensor]

    def __str__(self) -> str:
        return f"{table(self.rows)}\n{self.protocol}"


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Rows of metrics as aligned text.

    Examples:
        >>> print(table({"ensemble": {"HR@10": 0.5, "MRR": 0.25}}))
        scorer          HR@10     MRR
        ensemble       0.5000  0.2500
    """
    names = list(next(iter(rows.values())))
    lines = ["scorer".ljust(12) + "".join(name.rjust(9 if i == 0 else 8) for i, name in enumerate(names))]
    for scorer, values in rows.items():
        cells = (f"{values[name]:.4f}".rjust(9 if i == 0 else 8) for i, name in enumerate(names))
        lines.append(scorer.ljust(12) + "".join(cells))
    return "\n".join(lines)


@torch.no_grad()
def evaluate(
    model: EnsembleKD,
    data: SequenceData,
    split: Literal["valid", "test"],
    *,
    exclude: Exclude = "history",
    max_len: int | None = None,
    batch_size: int = 512,
    precision: Precision = "float32",
) -> Evaluation:
    """Rank each user's held-out item among all items, by every member and by the ensemble.

    The target is never left out, and a tie counts against it.

    Args:
        model: the ensemble; it is put in evaluation mode for the call.
        data: the users' sequences.
        split: "valid" (second-to-last items) or "test" (last items).
        exclude: which items are not candidates: "none", those in the model's input "window" (as in the authors' code),
            or the user's whole "history" before the target.
        max_len: newest items that the model is shown; default: as many as it reads, at most 200.
        batch_size: users at a time.
        precision: "bfloat16" runs the encoder under autocast; scores are float32.

    Returns:
        Metrics and ranks of "member 0", ..., "ensemble".

    Examples:
        >>> from ensemble_kd.data import SequenceData
        >>> from ensemble_kd.encoders import SASRec
        >>> data = SequenceData.from_sequences([[1, 2, 3, 4], [4, 3, 2]])
        >>> report = evaluate(EnsembleKD(lambda: SASRec(4, d_model=4, max_len=5), n=2), data, "test")
        >>> list(report.rows), report.protocol
        (['member 0', 'member 1', 'ensemble'], "leave-one-out test, 2 users, all 4 items ranked, exclude='history'")
    """
    if exclude not in get_args(Exclude):
        raise EnsembleKDError(
            "evaluate", "exclude 'none', 'window' or 'history'", repr(exclude), "Choose one of these."
        )
    if data.num_items != model.num_items:
        fix = "Build the model with num_items=data.num_items."
        raise EnsembleKDError("evaluate", f"data of {model.num_items} items, as the model", str(data.num_items), fix)
    device = model.device
    inputs = data.inputs(split, _shown(model, data, max_len))
    target, (history, offsets) = data.target(split), data.history(split)
    lengths, totals = (inputs != 0).sum(dim=1), offsets.diff()
    order = totals.argsort(stable=True)  # users of similar length together, so that little padding is computed
    found = torch.empty(len(model) + 1, len(inputs), dtype=torch.int64)
    training = model.training
    model.eval()
    try:
        for users in order.split(batch_size):
            ids = inputs[users, -int(lengths[users].max()) :]
            seen = None if exclude == "none" else ids
            if exclude == "history":
                seen = left_padded(history, offsets[users + 1], totals[users], int(totals[users].max()))
            with autocast(device, precision):
                scores = model.member_scores(ids.to(device))
            both = torch.cat([scores, scores.mean(dim=0, keepdim=True)])
            found[:, users] = ranks(both, target[users].to(device), None if seen is None else seen.to(device)).cpu()
    finally:
        model.train(training)
    scorers = [*(f"member {i}" for i in range(len(model))), "ensemble"]
    by_scorer = dict(zip(scorers, found, strict=True))
    return Evaluation(protocol(data, split, exclude), {s: metric_row(r) for s, r in by_scorer.items()}, by_scorer)


def evaluate_popularity(
    data: SequenceData, split: Literal["valid", "test"], *, exclude: Exclude = "history", max_len: int = 50
) -> Evaluation:
    """The same protocol for the scorer that ranks items by their count in the training part.

    Examples:
        >>> from ensemble_kd.data import SequenceData
        >>> data = SequenceData.from_sequences([[1, 2, 3, 4], [4, 3, 2]])
        >>> evaluate_popularity(data, "test").ranks["popularity"].tolist()
        [0, 1]
    """
    popularity = data.popularity().float()
    inputs, target, (history, offsets) = data.inputs(split, max_len), data.target(split), data.history(split)
    found = torch.empty(len(inputs), dtype=torch.int64)
    for users in offsets.diff().argsort(stable=True).split(512):
        totals = offsets.diff()[users]
        seen = {
            "none": None,
            "window": inputs[users],
            "history": left_padded(history, offsets[users + 1], totals, int(totals.max())),
        }[exclude]
        found[users] = ranks(popularity.expand(len(users), -1), target[users], seen)
    return Evaluation(protocol(data, split, exclude), {"popularity": metric_row(found)}, {"popularity": found})


def protocol(data: SequenceData, split: str, exclude: str) -> str:
    """The protocol in words, to stand beside every result."""
    return f"leave-one-out {split}, {data.num_users} users, all {data.num_items} items ranked, exclude={exclude!r}"


def _shown(model: EnsembleKD, data: SequenceData, max_len: int | None) -> int:
    """Columns of input: no more than the encoder reads once the objective has made its query of them."""
    reads = model.max_len or 200
    room = reads - (model.objective.query(torch.ones(1, 1, dtype=torch.long), mask_token=1, max_len=None).shape[1] - 1)
    return max(1, min(max_len or room, room, data.max_history))
