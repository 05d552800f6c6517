"""Ranks over the whole item set, the means HR@K, NDCG@K and MRR of them, and how much members disagree."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import tensor, whole, widest

CUTOFFS = (5, 10)
METRICS = (*(f"{name}@{k}" for name in ("HR", "NDCG") for k in CUTOFFS), "MRR")  # of the paper, and MRR


def ranks(scores: Tensor, target: Tensor, exclude: Tensor | None = None) -> Tensor:
    """Return the 0-based rank of each user's target among all items: the number of others that score at least as much.

    Source: the full-ranking protocol of Sec. 4.1.2. A tie counts against the target, so a constant scorer gets the
    worst rank. A score of NaN, the target's or another's, counts against it, too. Column 0 is padding and never counts.
    Nothing is sorted and ``scores`` is not copied: excluded items are counted apart and subtracted.

    Args:
        scores: (..., b, v + 1) real numbers, column i for item i. Leading axes (members, say) are kept.
        target: (b,) int64, item ids 1..v.
        exclude: (b, k) int64 ids padded with 0, in any order, repeats allowed; these items do not compete. The target
            always does, even if it is listed.

    Returns:
        (..., b) int64, from 0 (best) to v - 1.

    Raises:
        EnsembleKDError: shapes that do not fit together, ids that are not int64 or are out of range.

    Examples:
        >>> scores = torch.tensor([[9.0, 0.3, 0.2, 0.4, 0.3]])
        >>> ranks(scores, torch.tensor([1])), ranks(scores, torch.tensor([1]), torch.tensor([[0, 3]]))
        (tensor([2]), tensor([1]))
    """
    _check(scores, target, exclude)
    column = target.expand(scores.shape[:-1]).unsqueeze(-1)  # (..., b, 1)
    mark = scores.gather(-1, column)
    # Counting "not lower" rather than "higher or equal" is what makes a NaN count against the target.
    rank = scores.shape[-1] - 1 - _count_below(scores.detach(), mark)
    rank -= (~(scores[..., 0] < mark.squeeze(-1))).long()
    if exclude is not None and exclude.shape[-1]:
        ids = exclude.sort(dim=-1).values
        counts = (ids != 0) & (ids != target.unsqueeze(-1))
        counts[:, 1:] &= ids[:, 1:] != ids[:, :-1]
        ahead = ~(scores.gather(-1, ids.expand(*scores.shape[:-1], ids.shape[-1])) < mark)
        rank -= (ahead & counts).sum(-1)
    return rank


def _count_below(scores: Tensor, mark: Tensor) -> Tensor:
    """Count the scores (..., v) below (..., 1). A CPU takes 10 times as long to add up truth values as floats."""
    if scores.device.type != "cpu":
        return (scores < mark).sum(-1)
    exact = torch.float32 if scores.shape[-1] <= 1 << 24 else torch.float64  # counts up to here are exact
    below = torch.empty(scores.shape, dtype=exact, device=scores.device)
    return torch.lt(scores, mark, out=below).sum(-1).long()


def hit_rate(ranks: Tensor, k: int) -> Tensor:
    """Return HR@K = mean of [rank < K] over the last axis (Sec. 4.1.2).

    Args:
        ranks: (..., b) int64, 0-based.
        k: length of the list, at least 1.

    Returns:
        (...) float64; float32 on a device that has no other.

    Raises:
        EnsembleKDError: no rank, or k < 1.

    Examples:
        >>> hit_rate(torch.tensor([0, 4, 10]), 5).item()
        0.6666666666666666
    """
    return _top(ranks, k, "hit_rate").to(widest(ranks.device)).mean(-1)


def ndcg(ranks: Tensor, k: int) -> Tensor:
    """Return NDCG@K with one relevant item = mean of [rank < K] / log2(rank + 2) over the last axis (Sec. 4.1.2).

    Shapes, and the errors raised: as ``hit_rate``.

    Examples:
        >>> ndcg(torch.tensor([0, 2, 10]), 10).item()
        0.5
    """
    top = _top(ranks, k, "ndcg")
    return (top / torch.log2(ranks.to(widest(ranks.device)) + 2)).mean(-1)


def mrr(ranks: Tensor) -> Tensor:
    """Return MRR = mean of 1 / (rank + 1) over the last axis, with no cut-off.

    Args:
        ranks: (..., b) int64, 0-based.

    Returns:
        (...) float64; float32 on a device that has no other.

    Raises:
        EnsembleKDError: no rank.

    Examples:
        >>> mrr(torch.tensor([0, 1])).item()
        0.75
    """
    _top(ranks, 1, "mrr")
    return (1 / (ranks.to(widest(ranks.device)) + 1)).mean(-1)


def metric_named(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function from ranks (..., b) to values (...) that a name such as "NDCG@20" stands for.

    Args:
        name: "HR@K" or "NDCG@K" with a whole number K, or "MRR".

    Raises:
        EnsembleKDError: any other name.

    Examples:
        >>> metric_named("HR@2")(torch.tensor([0, 1, 2, 3])).item()
        0.5
    """
    if isinstance(name, str) and name == "MRR":
        return mrr
    found = re.fullmatch("(HR|NDCG)@([1-9][0-9]{0,8})", name) if isinstance(name, str) else None
    if found is None:
        raise EnsembleKDError("metric", "'HR@K', 'NDCG@K' or 'MRR'", repr(name), 'Pass one, such as "NDCG@20".')
    measure, k = {"HR": hit_rate, "NDCG": ndcg}[found[1]], int(found[2])
    return lambda ranks: measure(ranks, k)


def metric_row(ranks: Tensor, names: Sequence[str] = METRICS) -> dict[str, float]:
    """Return metrics by name, as plain floats.

    Args:
        ranks: (b,) int64, 0-based.
        names: see ``metric_named``; default: all of the paper, and MRR.

    Raises:
        EnsembleKDError: ranks are not (b,), there is none, or a name is unknown.

    Examples:
        >>> metric_row(torch.tensor([0, 6]))["HR@5"], metric_row(torch.tensor([0, 6]), ["HR@7"])
        (0.5, {'HR@7': 1.0})
    """
    tensor("metric_row", "ranks", ranks)
    if ranks.ndim != 1:
        raise EnsembleKDError(
            "metric_row", "ranks of shape (b,)", tuple(ranks.shape), "Pass one member's ranks per call."
        )
    return {name: metric_named(name)(ranks).item() for name in names}


def disagreement(lists: Tensor) -> Tensor:
    """Return how different the members' lists are: 1 − the mean, over pairs of members, of the lists' Jaccard index.

    Args:
        lists: (n, ..., k) items, none twice in a list.

    Returns:
        (...) from 0, the same items in every list, to 1, no item in two of them; 0 for one member.

    Examples:
        >>> disagreement(torch.tensor([[[1, 2]], [[2, 3]]]))  # one item of three in common
        tensor([0.6667])
    """
    tensor("disagreement", "lists", lists, "... k", "whole")
    if lists.ndim < 2:
        fix = "Stack one list for each member."
        raise EnsembleKDError("disagreement", "lists (n, ..., k)", tuple(lists.shape), fix)
    n, k = len(lists), lists.shape[-1]
    common = (lists[:, None, ..., :, None] == lists[None, ..., None, :]).sum(dim=(-1, -2))  # (n, n, ...)
    apart = 1 - common / (2 * k - common)
    return apart.sum(dim=(0, 1)) / max(n * (n - 1), 1)  # a member and itself have nothing apart


def _top(ranks: Tensor, k: int, where: str) -> Tensor:
    k = whole(where, "k", k, least=1)
    tensor(where, "ranks", ranks, kind="whole")
    if ranks.ndim == 0 or ranks.shape[-1] == 0:
        raise EnsembleKDError(where, "ranks (..., b) with b >= 1", tuple(ranks.shape), "Evaluate at least one user.")
    return ranks < k


def _check(scores: Tensor, target: Tensor, exclude: Tensor | None) -> None:
    for name, given in {"scores": scores, "target": target, "exclude": exclude}.items():
        if given is not None or name != "exclude":
            tensor("ranks", name, given)
    if scores.is_complex() or scores.dtype == torch.bool:
        raise EnsembleKDError("ranks", "scores of real numbers", str(scores.dtype), "Convert them with .float().")
    if scores.ndim < 2 or scores.shape[-1] < 2:
        got = tuple(scores.shape)
        raise EnsembleKDError("ranks", "scores (..., b, v + 1) with v >= 1", got, "Column 0 stands for padding.")
    b, v = scores.shape[-2], scores.shape[-1] - 1
    if tuple(target.shape) != (b,):
        got = tuple(target.shape)
        raise EnsembleKDError("ranks", f"target of shape (b,) = ({b},)", got, "Pass one target item for each user.")
    if exclude is not None and (exclude.ndim != 2 or exclude.shape[0] != b):
        got = tuple(exclude.shape)
        raise EnsembleKDError("ranks", f"exclude of shape (b, k) = ({b}, k)", got, "Pad each user's ids with 0.")
    ids = {"target": (target, 1)} | ({} if exclude is None else {"exclude": (exclude, 0)})
    for name, (values, lowest) in ids.items():
        if values.dtype != torch.int64:
            raise EnsembleKDError("ranks", f"{name} of dtype int64", values.dtype, "Item ids are int64.")
        if values.numel():
            low, high = torch.stack(values.aminmax()).tolist()
            if low < lowest or high > v:
                fix = "Scores need num_items + 1 columns, and ids lie within them."
                raise EnsembleKDError("ranks", f"{name} ids in {lowest}..{v}", f"{low}..{high}", fix)
