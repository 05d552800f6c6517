"""Evaluation of held-out items over all items, of the ensemble and of each member, in one pass (Sec. 4.1.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ensemble_kd.data import AnySequences, SequenceData, Split, left_padded
from ensemble_kd.distributed import (
    Place,
    gather_members,
    gathered,
    sum_members_,
    sum_rows,
)
from ensemble_kd.ensemble import Chosen, EnsembleKD, Precision, check_catalogue, check_model_and_data, choose_precision
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import CACHE_BYTES, choice, instance, whole
from ensemble_kd.metrics import METRICS, metric_named, metric_row, ranks
from ensemble_kd.serving import encoded

Exclude = Literal["none", "window", "history"]
TILE_BYTES = {"cpu": CACHE_BYTES, "cuda": 512 << 20}  # of scores
LONGEST = 200  # items that an encoder of any length is shown by default


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of each scorer on one split.

    Args:
        protocol: the items that were ranked, and those that were left out, in words.
        rows: scorer ("member 0", ..., "ensemble") -> metric -> value.
        ranks: scorer -> (users,) int64 rank of the target from 0, of each user that has one, for paired tests.
        precision: "float32" or "bfloat16", in which encoders ran.
    """

    protocol: str
    rows: Mapping[str, Mapping[str, float]]
    ranks: Mapping[str, Tensor]
    precision: str = "float32"

    def __str__(self) -> str:
        return f"{table(self.rows)}\n{self.protocol}"

    def _repr_html_(self) -> str:
        """Return the table for a notebook; the best value of each metric is bold.

        Examples:
            >>> Evaluation("test", {"ensemble": {"MRR": 0.5}}, {})._repr_html_().count("<b>0.5000</b>")
            1
        """
        names = list(next(iter(self.rows.values())))
        best = {name: max(row[name] for row in self.rows.values()) for name in names}
        lines = [f"<tr><th>scorer</th>{''.join(f'<th>{name}</th>' for name in names)}</tr>"]
        for scorer, row in self.rows.items():
            cells = (f"<b>{row[m]:.4f}</b>" if row[m] == best[m] else f"{row[m]:.4f}" for m in names)
            lines.append(f"<tr><th>{escape(scorer)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        return f"<table>{''.join(lines)}</table><p>{escape(self.protocol)}</p>"


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return rows of metrics as aligned text.

    Examples:
        >>> print(table({"ensemble": {"HR@10": 0.5, "MRR": 0.25}}))
        scorer          HR@10     MRR
        ensemble       0.5000  0.2500
    """
    names = list(next(iter(rows.values())))
    width = max(12, *(len(scorer) + 1 for scorer in rows))
    lines = ["scorer".ljust(width) + "".join(name.rjust(9 if i == 0 else 8) for i, name in enumerate(names))]
    for scorer, values in rows.items():
        cells = (f"{values[name]:.4f}".rjust(9 if i == 0 else 8) for i, name in enumerate(names))
        lines.append(scorer.ljust(width) + "".join(cells))
    return "\n".join(lines)


@torch.no_grad()
def evaluate(
    model: EnsembleKD,
    data: AnySequences,
    split: Literal["valid", "test"],
    *,
    exclude: Exclude = "history",
    max_len: int | None = None,
    batch_size: int = 512,
    precision: Precision = "auto",
    metrics: Sequence[str] = METRICS,
    place: Place | None = None,
) -> Evaluation:
    """Rank each user's target among all items, by every member and by the ensemble.

    The target is never left out, and a tie counts against it. If ``model`` is spread over processes, all of them call
    this together: each ranks its share of the users, by its members.

    Args:
        model: the ensemble; it is run in evaluation mode, and its own mode stays as it is.
        data: the users' sequences, in memory or on disk.
        split: "valid" (second-to-last items) or "test" (last items).
        exclude: the items that are no candidates: "none", those in the model's input "window" (as in the authors'
            code), or the user's whole "history" before the target.
        max_len: newest items that the model is shown, never more than it reads; None: all that it reads, or 200 if
            it reads any number.
        batch_size: users at a time.
        precision: "bfloat16" runs the encoder under autocast; scores are float32. "auto": as of
            ``fit``, and the report names which.
        metrics: "HR@K", "NDCG@K" and "MRR", with any K.
        place: this process among those that share the users; None: ``model.place``.

    Returns:
        Metrics and ranks of "member 0", ..., "ensemble".

    Raises:
        EnsembleKDError: an argument that cannot be used, a split without targets, or data of other items than the
            model's.

    Examples:
        >>> from ensemble_kd.data import SequenceData
        >>> from ensemble_kd.encoders import SASRec
        >>> data = SequenceData.from_sequences([[1, 2, 3, 4], [4, 3, 2]])
        >>> report = evaluate(EnsembleKD(lambda: SASRec(4, d_model=4, max_len=5), n=2), data, "test")
        >>> list(report.rows), report.protocol
        (['member 0', 'member 1', 'ensemble'], "leave-one-out test, 2 users, all 4 items ranked, exclude='history'")
    """
    check_model_and_data("evaluate", model, data)
    if place is not None:
        instance("evaluate", "place", place, Place, "Leave it out.")
    choice("evaluate", "exclude", exclude, get_args(Exclude))
    batch_size = whole("evaluate", "batch_size", batch_size, least=1)
    max_len = None if max_len is None else whole("evaluate", "max_len", max_len, least=1)
    instance("evaluate", "metrics", metrics, (list, tuple), 'Pass a list of names, such as ["HR@5"].')
    for name in metrics:
        metric_named(name)  # a wrong name is refused before anything is ranked
    check_catalogue("evaluate", model, data)
    _require_targets("evaluate", data, split)
    place = model.place if place is None else place
    chosen = choose_precision("evaluate", precision, model.device, place=place)
    shown = _shown(model, max_len)
    with gathered(model):
        found = torch.cat(
            [_ranks_of(model, each, split, exclude, shown, batch_size, chosen, place) for each in data.pieces()],
            dim=1,
        )
    found = sum_rows(found, place)
    found = torch.cat([gather_members(found[:-1], place), found[-1:]])
    scorers = [*(f"member {i}" for i in range(len(model))), "ensemble"]
    by_scorer = dict(zip(scorers, found, strict=True))
    words = protocol(data, split, exclude, shown, found.shape[1])
    return Evaluation(words, {s: metric_row(r, metrics) for s, r in by_scorer.items()}, by_scorer, chosen.name)


def _ranks_of(
    model: EnsembleKD,
    data: SequenceData,
    split: Split,
    exclude: Exclude,
    shown: int,
    batch_size: int,
    precision: Chosen,
    place: Place,
) -> Tensor:
    """Ranks by this process's members and by the ensemble, (n + 1, users); 0 for users of other processes."""
    device = model.device
    inputs = data.inputs(split, min(shown, data.max_history))
    target, (history, offsets) = data.target(split), data.history(split)
    lengths, totals = (inputs != 0).sum(dim=1), offsets.diff()
    order = totals.argsort(stable=True)  # users of similar length together, so that little padding is computed
    weight, bias = model.classifier_weights()
    weight, bias = F.pad(weight, (0, 0, 1, 0)), F.pad(bias, (1, 0), value=-torch.inf)[:, None]  # column 0: padding
    n, columns = len(weight), model.num_items + 1
    factors = (model.factors / n).to(weight.dtype) if model.is_weighted else None
    alone = len(model) == 1  # its own ensemble
    scorers = 1 if alone else n + 1
    found = torch.zeros(scorers, len(inputs), dtype=torch.int64)
    rows = min(batch_size, max(16, TILE_BYTES.get(device.type, TILE_BYTES["cuda"]) // (4 * scorers * columns)))
    scores = weight.new_empty(scorers, rows, columns)  # of some users: every member's, and the ensemble's
    for users in place.own(order.split(batch_size)):
        ids = inputs[users, -int(lengths[users].max()) :]
        seen = None if exclude == "none" else ids
        if exclude == "history":
            seen = left_padded(history, offsets[users + 1], totals[users], int(totals[users].max()))
        with precision.autocast(device):
            encode = partial(model.query_states, training=False)
            states = encoded(encode, ids.to(device), n=n, d=model.hidden_size, longest=model.max_len)
        wanted, seen = target[users].to(device), None if seen is None else seen.to(device)
        for start in range(0, len(users), rows):
            part = slice(start, min(start + rows, len(users)))
            tile = scores[:, : part.stop - start]
            for i in range(n):
                torch.addmm(bias[i], states[i, part], weight[i].mT, out=tile[i])
            if not alone:
                if factors is None:
                    torch.mean(tile[:n], 0, out=tile[n])
                else:
                    tile[n] = torch.einsum("n, n r v -> r v", factors, tile[:n])
                    tile[n, :, 0] = -torch.inf  # 0 · -inf is no number
                sum_members_(tile[n], place)  # a positive factor changes no rank
            found[:, users[part]] = ranks(tile, wanted[part], None if seen is None else seen[part]).cpu()
    return found.repeat(2, 1) if alone else found


def evaluate_popularity(
    data: SequenceData, split: Literal["valid", "test"], *, exclude: Exclude = "history", max_len: int = 50
) -> Evaluation:
    """Evaluate by the same protocol the scorer that ranks items by their count in the training part.

    Args:
        data: the users' sequences.
        split: "valid" or "test".
        exclude: as for ``evaluate``.
        max_len: length of the "window" of ``exclude``; to compare with a model, pass the model's.

    Raises:
        EnsembleKDError: an argument that cannot be used.

    Examples:
        >>> from ensemble_kd.data import SequenceData
        >>> data = SequenceData.from_sequences([[1, 2, 3, 4], [4, 3, 2]])
        >>> evaluate_popularity(data, "test").ranks["popularity"].tolist()
        [0, 1]
    """
    instance("evaluate_popularity", "data", data, SequenceData, "Pass sequences in memory.")
    choice("evaluate_popularity", "exclude", exclude, get_args(Exclude))
    max_len = whole("evaluate_popularity", "max_len", max_len, least=1)
    _require_targets("evaluate_popularity", data, split)
    popularity, target, (history, offsets) = data.popularity(), data.target(split), data.history(split)
    found = torch.empty(len(target), dtype=torch.int64)
    totals = offsets.diff().clamp(max=max_len) if exclude == "window" else offsets.diff()
    for users in totals.argsort(stable=True).split(512):
        width = int(totals[users].max())
        seen = None if exclude == "none" else left_padded(history, offsets[users + 1], totals[users], width)
        found[users] = ranks(popularity.expand(len(users), -1), target[users], seen)
    words = protocol(data, split, exclude, max_len, len(target))
    return Evaluation(words, {"popularity": metric_row(found)}, {"popularity": found})


def protocol(data: AnySequences, split: str, exclude: Exclude, window: int, users: int) -> str:
    """Return the protocol in words, to go with every result."""
    of = f" of the newest {window} items" if exclude == "window" else ""
    return f"{data.held_out} {split}, {users} users, all {data.num_items} items ranked, exclude={exclude!r}{of}"


def _require_targets(where: str, data: AnySequences, split: Literal["valid", "test"]) -> None:
    choice(where, "split", split, ("valid", "test"))
    if not data.has_targets(split):
        fix = 'Hold some items out: holdout="last", or from_interactions(..., holdout=AtTime(...)).'
        raise EnsembleKDError(where, f"users with a {split} target", f"none ({data.held_out})", fix)


def _shown(model: EnsembleKD, max_len: int | None) -> int:
    """Columns of input: no more than the encoder reads once the objective has made its query of them."""
    if model.max_len is None:
        return max_len or LONGEST
    room = max(1, model.max_len - model.objective.query_columns)
    return min(max_len or room, room)
