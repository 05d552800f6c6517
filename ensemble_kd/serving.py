"""What a trained ensemble answers with: the best items, vectors for an index, and how sure the members are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.metrics import disagreement

Aggregate = Literal["logits", "probabilities", "ranks"]
BLOCK_BYTES = 64 << 20  # of the members' scores of some users: what a call needs beside its input and output


class Recommendations(NamedTuple):
    """The best items of each sequence, best first; 0 with a score of -inf where fewer than k are left."""

    items: Tensor  # (b, k) int64
    scores: Tensor  # (b, k)


class Uncertainty(NamedTuple):
    """How sure an ensemble is of each sequence's next item, in nats; see ``uncertainty``."""

    entropy: Tensor  # (b,) of the members' mean distribution
    mutual_information: Tensor  # (b,) the part of it that comes from members saying different things
    disagreement: Tensor  # (b,) from 0, equal lists of the k best, to 1, lists with nothing in common


def query_vectors(states: Tensor) -> Tensor:
    """The ensemble's side of one inner product: (n, b, d) states -> (b, n d + 1).

    The mean of logits (Eq. 20) is Σ_n ⟨h_n / n, w_n⟩ + mean bias: a single product of concatenated vectors.

    Examples:
        >>> query_vectors(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
        tensor([[0.5000, 1.0000, 1.5000, 2.0000, 1.0000]])
    """
    n, b, d = states.shape
    joined = (states / n).transpose(0, 1).reshape(b, n * d)
    return torch.cat([joined, joined.new_ones(b, 1)], dim=1)


def item_vectors(weight: Tensor, bias: Tensor) -> Tensor:
    """The items' side of it: weights (n, v, d) and biases (n, v) -> (v, n d + 1), row j for item j + 1.

    Examples:
        >>> item_vectors(torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[0.5], [1.5]]))
        tensor([[1., 2., 1.]])
    """
    n, v, d = weight.shape
    return torch.cat([weight.transpose(0, 1).reshape(v, n * d), bias.mean(dim=0)[:, None]], dim=1)


def aggregate_scores(logits: Tensor, aggregate: Aggregate) -> Tensor:
    """One score an item from the members': (n, ..., c) -> (..., c), higher is better.

    "logits": their mean (Eq. 20); "probabilities": the mean of softmaxes over the c items; "ranks": minus the mean of
    the ranks, from 0, which leaves out how far apart scores are (Borda's count).

    Examples:
        >>> logits = torch.tensor([[3.0, 0.0, 2.0], [0.0, 9.0, 1.0], [1.0, 0.0, 2.0]])
        >>> [aggregate_scores(logits, how).argmax().item() for how in ("logits", "probabilities", "ranks")]
        [1, 1, 2]
    """
    if aggregate == "logits":
        return logits.mean(dim=0)
    if aggregate == "probabilities":
        return logits.softmax(dim=-1).mean(dim=0)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(logits.shape[-1], device=logits.device).expand_as(order)
    return -torch.empty_like(order).scatter_(-1, order, places).to(logits.dtype).mean(dim=0)


def top_items(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    k: int,
    seen: Tensor | None = None,
    candidates: Tensor | None = None,
    aggregate: Aggregate = "logits",
    mean: Callable[[Tensor], Tensor] | None = None,
) -> Recommendations:
    """The k best items of each query, some users at a time, so that no (n, b, v) scores are held.

    Args:
        states: (n, b, d) what each member scores by.
        weight: (n, v, d) item classifiers; row j scores item j + 1.
        bias: (n, v).
        k: how many.
        seen: (b, l) items that are not recommended, padded with 0; None: all may be.
        candidates: (c,) or (b, c) items to choose from, padded with 0 in the second form; None: all.
        aggregate: see ``aggregate_scores``.
        mean: over processes that hold other members; None: there are none.

    Returns:
        Items and their scores.

    Raises:
        EnsembleKDError: arguments that cannot be used.

    Examples:
        >>> states, weight, bias = torch.ones(1, 1, 1), torch.tensor([[[1.0], [3.0], [2.0]]]), torch.zeros(1, 3)
        >>> top_items(states, weight, bias, k=2).items
        tensor([[2, 3]])
        >>> top_items(states, weight, bias, k=1, seen=torch.tensor([[0, 2]])).items
        tensor([[3]])
    """
    v, b = weight.shape[1], states.shape[1]
    _check(v, b, k, candidates, aggregate)
    found = []
    for rows in _blocks(states, v if candidates is None else candidates.shape[-1]):
        own = candidates[rows] if candidates is not None and candidates.ndim == 2 else candidates
        logits = _logits(states[:, rows], weight, bias, own)
        scores = aggregate_scores(logits, aggregate)
        scores = scores if mean is None else mean(scores)
        items = torch.arange(1, v + 1, device=states.device) if own is None else own
        if own is not None:
            scores = scores.masked_fill(own == 0, -torch.inf)
        if seen is not None and own is None:
            past = seen[rows]
            scores = torch.cat([scores, scores.new_empty(len(scores), 1)], dim=1)  # a last column for the padding
            scores = scores.scatter_(1, (past - 1) % (v + 1), -torch.inf)[:, :v]
        elif seen is not None:
            past = (items.expand(len(scores), -1)[:, :, None] == seen[rows][:, None, :]).any(dim=-1)
            scores = scores.masked_fill(past, -torch.inf)
        best = scores.topk(k, dim=1)
        chosen = items.expand(len(scores), -1).gather(1, best.indices)
        found.append((chosen.masked_fill(best.values == -torch.inf, 0), best.values))
    return Recommendations(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def uncertainty(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    k: int = 10,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Uncertainty:
    """How sure the ensemble is: entropy of the mean p̄ of the members' softmaxes, mutual information, disagreement.

    Mutual information is H(p̄) − mean of H(p_n): it is 0 where all members say the same, however unsure each is.
    Disagreement is 1 − the mean, over pairs of members, of the Jaccard index of their k best items; 0 for one member.

    Args:
        states, weight, bias: as for ``top_items``.
        k: length of the lists that are compared.
        gather: adds what members of other processes say, along the first dimension; None: there are none.

    Examples:
        >>> weight = torch.tensor([[[9.0], [0.0]], [[0.0], [9.0]]])  # two members, each sure of another item
        >>> sure = uncertainty(torch.ones(2, 1, 1), weight, torch.zeros(2, 2), k=1)
        >>> [round(float(value), 2) for value in sure]
        [0.69, 0.69, 1.0]
    """
    _check(weight.shape[1], states.shape[1], k, None, "logits")
    found = []
    for rows in _blocks(states, weight.shape[1]):
        logs = _logits(states[:, rows], weight, bias, None).log_softmax(dim=-1)
        logs = logs if gather is None else gather(logs)
        n = len(logs)
        mean = logs.logsumexp(dim=0) - math.log(n)
        entropy, each = -(mean.exp() * mean).sum(dim=-1), -(logs.exp() * logs).sum(dim=-1)
        apart = disagreement(logs.topk(k, dim=-1).indices)
        found.append((entropy, (entropy - each.mean(dim=0)).clamp(min=0), apart.to(entropy)))
    return Uncertainty(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _blocks(states: Tensor, columns: int) -> Iterator[slice]:
    n, b, _ = states.shape
    rows = max(1, BLOCK_BYTES // (n * columns * states.element_size()))
    return (slice(start, min(start + rows, b)) for start in range(0, b, rows))


def _logits(states: Tensor, weight: Tensor, bias: Tensor, candidates: Tensor | None) -> Tensor:
    """(n, r, c); -inf where a candidate is padding."""
    if candidates is None:
        return torch.baddbmm(bias[:, None], states, weight.mT)
    rows = (candidates - 1).clamp(min=0)
    if candidates.ndim == 1:
        return torch.baddbmm(bias[:, None, rows], states, weight[:, rows].mT)
    logits = (weight[:, rows] @ states[..., None]).squeeze(-1) + bias[:, rows]
    return logits.masked_fill(candidates == 0, -torch.inf)


def _check(v: int, b: int, k: int, candidates: Tensor | None, aggregate: str) -> None:
    if aggregate not in get_args(Aggregate):
        expected = "aggregate " + " or ".join(map(repr, get_args(Aggregate)))
        raise EnsembleKDError("recommend", expected, repr(aggregate), "Choose one of these.")
    if candidates is not None:
        shaped = candidates.ndim == 1 or (candidates.ndim == 2 and len(candidates) == b)
        if candidates.dtype != torch.int64 or not shaped or not candidates.numel():
            got, fix = (
                f"{candidates.dtype} {tuple(candidates.shape)}",
                "Pass one list of item ids for all, or one each.",
            )
            raise EnsembleKDError("recommend", f"candidates int64 (c,) or ({b}, c)", got, fix)
        low, high = (int(x) for x in candidates.aminmax())
        if not (low >= (1 if candidates.ndim == 1 else 0) and high <= v):
            raise EnsembleKDError("recommend", f"candidates in 1..{v} (num_items)", f"{low}..{high}", "Pass item ids.")
    most, name = (v, "num_items") if candidates is None else (candidates.shape[-1], "candidates")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= most:
        raise EnsembleKDError("recommend", f"a whole number 1 <= k <= {most} ({name})", repr(k), "Ask for fewer items.")
