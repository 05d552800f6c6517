"""The answers of a trained ensemble: the best items, vectors for an index, and how sure the members are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import CACHE_BYTES, aside, choice, shown, tensor, whole
from ensemble_kd.metrics import disagreement

Aggregate = Literal["logits", "probabilities", "ranks"]
BLOCK_BYTES = 64 << 20  # of the members' scores of some users: the memory of a call besides its input and output
_ACCELERATOR_TIMES = 8  # as much on an accelerator, whose kernels are slow on few rows
_ASIDE = 2**18  # weights whose product with states takes longer than it takes to hand the turn over, twice
# On a CPU a block fits the cache, or has so many rows. The C library gives larger ones back to the system each time,
# and the next one costs a page fault for every 4 KiB.
_ROWS = 32
ENCODER_BYTES = 2 * BLOCK_BYTES  # of an encoder's intermediate values, as estimated
_TOGETHER = 128  # sequences that are encoded at once on a CPU: more share no work, and have more padding


class Recommendations(NamedTuple):
    """The best items of each sequence, best first.

    If fewer than k items are left for a sequence, its last items are 0, no item, with a score of -inf. ``lists`` leaves
    them out; ``item_names[i - 1]`` would take a 0 for the last item.

    Examples:
        >>> found = Recommendations(torch.tensor([[2, 1], [2, 0]]), torch.tensor([[0.9, 0.5], [0.7, -torch.inf]]))
        >>> found.lists(), found.lists(("tea", "milk"))
        ([[2, 1], [2]], [['milk', 'tea'], ['milk']])
    """

    items: Tensor  # (b, k) int64
    scores: Tensor  # (b, k)

    def lists(self, item_names: Sequence[Any] | None = None) -> list[list[Any]]:
        """Return each sequence's items as a list without the zeros at its end.

        Args:
            item_names: the source's own ids, ``item_names[i - 1]`` for item i, as in ``SequenceData``; None: item ids.
        """
        rows = [[item for item in row if item] for row in self.items.tolist()]
        return rows if item_names is None else [[item_names[item - 1] for item in row] for row in rows]


class Uncertainty(NamedTuple):
    """The uncertainty of an ensemble about each sequence's next item, in nats; see ``uncertainty``."""

    entropy: Tensor  # (b,) of the members' mean distribution
    mutual_information: Tensor  # (b,) the part of it that comes from members that differ
    disagreement: Tensor  # (b,) from 0, equal lists of the k best, to 1, lists with nothing in common


def encoded(encode: Callable[[Tensor], Tensor], item_ids: Tensor, *, n: int, d: int, longest: int | None) -> Tensor:
    """Encode some sequences at a time, those of similar length together and without columns that are all padding.

    So memory does not grow with the number of sequences, nor time with the width to which short ones are padded.

    Args:
        encode: (r, l) sequences -> (n, r, d) states, which do not depend on padding.
        item_ids: (b, l) sequences, left-padded with 0.
        n: members that are encoded here.
        d: width of the states.
        longest: positions that the encoder reads; None: any number.

    Returns:
        (n, b, d).

    Examples:
        >>> ids = torch.tensor([[0, 0, 1], [0, 3, 4]])
        >>> encoded(lambda ids: ids[None, :, :1].float(), ids, n=1, d=1, longest=None)
        tensor([[[0.],
                 [3.]]])
    """
    b, length = item_ids.shape
    length = length if longest is None else min(length, longest)
    # About 16 values per feature and position, as a Transformer's block has, and 4 attention weights per pair.
    most = _times(item_ids) * ENCODER_BYTES // max(1, 4 * n * length * (16 * d + 4 * length))
    rows = max(1, min(most, _times(item_ids) * _TOGETHER))
    lengths = (item_ids != 0).sum(dim=1)
    if rows >= b:
        return encode(item_ids[:, -max(1, int(lengths.max())) :])
    lengths, order = lengths.sort(stable=True)
    blocks = order.split(rows)
    ends = torch.stack([lengths[min(start + rows, b) - 1] for start in range(0, b, rows)]).tolist()  # read once
    states = None
    for users, end in zip(blocks, ends, strict=True):
        some = encode(item_ids[users, -max(1, end) :])
        if states is None:
            states = some.new_empty(len(some), b, some.shape[-1])
        states[:, users] = some  # a copy: the newest states alone would keep those of all positions in memory
        del some
    assert states is not None
    return states


def query_vectors(states: Tensor, widths: Sequence[int] | None = None) -> Tensor:
    """Return the ensemble's side of one inner product: (n, b, d) states -> (b, n d + 1).

    The mean of logits (Eq. 20) is Σ_n ⟨h_n / n, w_n⟩ + mean bias: a single product of concatenated vectors.

    Args:
        states: of the members.
        widths: each member's own d, beyond which there are only zeros, which are left out; None: d.

    Raises:
        EnsembleKDError: states that are not finite.

    Examples:
        >>> query_vectors(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
        tensor([[0.5000, 1.0000, 1.5000, 2.0000, 1.0000]])
    """
    tensor("query_vectors", "states", states, "n b d", "floating")
    joined = _side_by_side(states / len(states), widths)
    return _finite("query_vectors", torch.cat([joined, joined.new_ones(len(joined), 1)], dim=1))


def item_vectors(weight: Tensor, bias: Tensor, widths: Sequence[int] | None = None) -> Tensor:
    """Return the items' side of it: weights (n, v, d) and biases (n, v) -> (v, n d + 1), row j for item j + 1.

    Raises:
        EnsembleKDError: weights that are not finite.

    Examples:
        >>> item_vectors(torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[0.5], [1.5]]))
        tensor([[1., 2., 1.]])
    """
    sizes: dict[str, int] = {}
    tensor("item_vectors", "weight", weight, "n v d", "floating", sizes)
    tensor("item_vectors", "bias", bias, "n v", "floating", sizes)
    return _finite("item_vectors", torch.cat([_side_by_side(weight, widths), bias.mean(dim=0)[:, None]], dim=1))


def _side_by_side(x: Tensor, widths: Sequence[int] | None) -> Tensor:
    """(n, r, d) -> (r, n d), or (r, the sum of the widths)."""
    n, _, d = x.shape
    return torch.cat([rows[:, :width] for rows, width in zip(x, widths or (d,) * n, strict=True)], dim=1)


def aggregate_scores(logits: Tensor, aggregate: Aggregate, weights: Tensor | None = None) -> Tensor:
    """Return one score per item from the members': (n, ..., c) -> (..., c), higher is better.

    "logits": their mean (Eq. 20); "probabilities": the mean of softmaxes over the c items; "ranks": minus the mean of
    the ranks, from 0, which leaves out how far apart scores are (Borda's count). If a logit is NaN, so are scores.
    Means are weighted by ``weights`` (n,), whose mean is 1, if they are given.

    Examples:
        >>> logits = torch.tensor([[3.0, 0.0, 2.0], [0.0, 9.0, 1.0], [1.0, 0.0, 2.0]])
        >>> [aggregate_scores(logits, how).argmax().item() for how in ("logits", "probabilities", "ranks")]
        [1, 1, 2]
    """
    choice("aggregate_scores", "aggregate", aggregate, get_args(Aggregate))
    tensor("aggregate_scores", "logits", logits, "... c", "floating")
    if logits.ndim < 2:
        raise EnsembleKDError("aggregate_scores", "logits (n, ..., c)", shown(logits), "Stack one row for each member.")
    if aggregate == "logits":
        return _mean(logits, weights)
    if aggregate == "probabilities":
        return _mean(logits.softmax(dim=-1), weights)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(logits.shape[-1], device=logits.device).expand_as(order)
    borda = -_mean(torch.empty_like(order).scatter_(-1, order, places).to(logits.dtype), weights)
    unranked = logits.isnan().any(dim=-1).any(dim=0)
    return borda.masked_fill(unranked[..., None], torch.nan)


def _mean(x: Tensor, weights: Tensor | None) -> Tensor:
    """The mean over members (n, ...) -> (...)."""
    return (x if weights is None else weights.view(-1, *[1] * (x.ndim - 1)) * x).mean(dim=0)


def top_items(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    k: int,
    seen: Tensor | None = None,
    candidates: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    aggregate: Aggregate = "logits",
    mean: Callable[[Tensor], Tensor] | None = None,
    weights: Tensor | None = None,
    temperatures: Tensor | None = None,
) -> Recommendations:
    """Find the k best items of each query, some users at a time, so that there never are (n, b, v) scores.

    Args:
        states: (n, b, d) what each member scores by.
        weight: (n, v, d) item classifiers; row j scores item j + 1.
        bias: (n, v).
        k: how many.
        seen: (b, l) items that are not recommended, padded with 0; None: all may be. What is no item, such as a mask
            token, is passed over.
        candidates: (c,) or (b, c) items to choose from, padded with 0 in the second form; None: all. Repeated ones
            count once.
        aggregate: see ``aggregate_scores``.
        mean: over processes that have other members; None: there are none.
        weights: (n,) of the members, with a mean of 1; None: 1 each.
        temperatures: (n,) that the members' logits are divided by; None: 1 each.

    Returns:
        Items and their scores.

    Raises:
        EnsembleKDError: arguments that cannot be used, or scores that are not finite.

    Examples:
        >>> states, weight, bias = torch.ones(1, 1, 1), torch.tensor([[[1.0], [3.0], [2.0]]]), torch.zeros(1, 3)
        >>> top_items(states, weight, bias, k=2).items
        tensor([[2, 3]])
        >>> top_items(states, weight, bias, k=1, seen=torch.tensor([[0, 2]])).items
        tensor([[3]])
        >>> top_items(states, weight, bias, k=2, candidates=[3, 3, 1]).items
        tensor([[3, 1]])
    """
    where = "recommend"
    _check_scoring(where, states, weight, bias)
    if seen is not None:
        tensor(where, "seen", seen, "b l", "int64", {"b": states.shape[1]})
    (v, d), b = weight.shape[1:], states.shape[1]
    choice(where, "aggregate", aggregate, get_args(Aggregate))
    if temperatures is not None and aggregate != "logits":
        states, bias = states / temperatures[:, None, None], bias / temperatures[:, None]
    elif temperatures is not None:  # a member's share, in place of both
        weights = (1 if weights is None else weights) / temperatures
    is_mean = aggregate == "logits" and candidates is None  # of which there never are the members' own
    chosen = None if candidates is None else _candidates(candidates, v, b, states.device)
    c = v if chosen is None else chosen.shape[-1]
    k = whole(where, f"k of {c} {'items' if chosen is None else 'candidates'}", k, least=1, most=c)
    # Lists of each user's own take a copy of their classifiers' rows; seen items are compared with every candidate.
    columns = c if chosen is None else c * (d + 1) if chosen.ndim == 2 else c
    columns = columns if chosen is None or seen is None else max(columns, c * seen.shape[1] // 4)
    found = []
    for rows in _blocks(states[:1] if is_mean else states, columns):
        own = chosen[rows] if chosen is not None and chosen.ndim == 2 else chosen
        some = states[:, rows]
        if is_mean:
            scores = _mean_logits(some, weight, bias, weights)
        else:
            scores = aggregate_scores(_logits(some, weight, bias, own), aggregate, weights)
        scores = scores if mean is None else mean(scores)
        if own is not None:
            scores = scores.masked_fill(own == 0, -torch.inf)
        scores = scores if seen is None else _without(scores, seen[rows], own)
        best = scores.topk(k, dim=1)
        is_left_out = best.values == -torch.inf
        _finite(where, best.values.masked_fill(is_left_out, 0))
        picked = best.indices + 1 if own is None else own.expand(len(scores), -1).gather(1, best.indices)
        found.append(Recommendations(picked.masked_fill_(is_left_out, 0), best.values))
    return found[0] if len(found) == 1 else Recommendations(*map(torch.cat, zip(*found, strict=True)))


def mean_logits(states: Tensor, weight: Tensor, bias: Tensor, factors: Tensor | None = None) -> Tensor:
    """Return the mean of the members' logits, Eq. 20, without the members' own: (n, b, d) states -> (b, v).

    The mean of n inner products is one product of concatenated vectors; member by member it needs no copy of them.

    Args:
        states: of the members.
        weight: (n, v, d) item classifiers.
        bias: (n, v).
        factors: (n,) of the members' logits in the mean; None: 1 each.

    Raises:
        EnsembleKDError: arguments that do not fit together.

    Examples:
        >>> mean_logits(torch.ones(2, 1, 1), torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[0.5], [1.5]]))
        tensor([[2.5000]])
    """
    sizes = _check_scoring("mean_logits", states, weight, bias)
    if factors is not None:
        tensor("mean_logits", "factors", factors, "n", "floating", sizes)
    return _mean_logits(states, weight, bias, factors)


def _mean_logits(states: Tensor, weight: Tensor, bias: Tensor, factors: Tensor | None) -> Tensor:
    n = len(weight)
    shares = bias.new_full((n,), 1 / n) if factors is None else factors.to(bias.dtype) / n
    with _aside(weight):
        first, *others = zip(shares[:, None, None] * states, weight, strict=True)
        mean = torch.addmm(shares @ bias, first[0], first[1].mT)
        for h, w in others:
            mean.addmm_(h, w.mT)
    return mean


def uncertainty(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    k: int = 10,
    gather: Callable[[Tensor], Tensor] | None = None,
    weights: Tensor | None = None,
    temperatures: Tensor | None = None,
) -> Uncertainty:
    """Measure how sure the ensemble is: entropy of the mean p̄ of the members' softmaxes, and how they differ.

    Mutual information is H(p̄) − mean of H(p_n): it is 0 if all members have the same distribution, however unsure each
    is. Disagreement is 1 − the mean, over pairs of members, of the Jaccard index of their k best items; 0 for one
    member.

    Args:
        states: (n, b, d), as for ``top_items``.
        weight: (n, v, d), likewise.
        bias: (n, v), likewise.
        k: length of the lists that are compared.
        gather: adds the members of other processes, along the first dimension; None: there are none.
        weights, temperatures: as for ``top_items``.

    Raises:
        EnsembleKDError: a k that cannot be used, or scores that are not finite.

    Examples:
        >>> weight = torch.tensor([[[9.0], [0.0]], [[0.0], [9.0]]])  # two members, each sure of another item
        >>> sure = uncertainty(torch.ones(2, 1, 1), weight, torch.zeros(2, 2), k=1)
        >>> [round(float(value), 2) for value in sure]
        [0.69, 0.69, 1.0]
    """
    _check_scoring("uncertainty", states, weight, bias)
    v = weight.shape[1]
    k = whole("uncertainty", f"k of {v} items", k, least=1, most=v)
    if temperatures is not None:
        states, bias = states / temperatures[:, None, None], bias / temperatures[:, None]
    weights = weights if weights is None or gather is None else gather(weights)
    found = []
    for rows in _blocks(states, v):
        logs = _logits(states[:, rows], weight, bias, None).log_softmax(dim=-1)
        logs = logs if gather is None else gather(logs)
        n = len(logs)
        shares = logs if weights is None else logs + weights.log()[:, None, None]
        mean = shares.logsumexp(dim=0) - math.log(n)
        entropy, each = -(mean.exp() * mean).sum(dim=-1), -(logs.exp() * logs).sum(dim=-1)
        apart = disagreement(logs.topk(k, dim=-1).indices)
        found.append(
            (_finite("uncertainty", entropy), (entropy - _mean(each, weights)).clamp(min=0), apart.to(entropy))
        )
    return Uncertainty(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _check_scoring(where: str, states: Tensor, weight: Tensor, bias: Tensor) -> dict[str, int]:
    sizes: dict[str, int] = {}
    tensor(where, "states", states, "n b d", "floating", sizes)
    tensor(where, "weight", weight, "n v d", "floating", sizes)
    tensor(where, "bias", bias, "n v", "floating", sizes)
    return sizes


def _blocks(states: Tensor, columns: int) -> Iterator[slice]:
    n, b, _ = states.shape
    row = n * columns * states.element_size()
    most = _times(states) * BLOCK_BYTES
    some = min(most, max(CACHE_BYTES, _ROWS * row)) if states.device.type == "cpu" else most
    rows = max(1, some // row)
    return (slice(start, min(start + rows, b)) for start in range(0, b, rows))


def _times(tensor: Tensor) -> int:
    return 1 if tensor.device.type == "cpu" else _ACCELERATOR_TIMES


def _aside(weight: Tensor) -> AbstractContextManager[None]:
    """While the product with so many weights runs, another thread may have the turn, if that is worth it."""
    return aside() if weight.numel() >= _ASIDE and not torch.compiler.is_compiling() else nullcontext()


def _logits(states: Tensor, weight: Tensor, bias: Tensor, candidates: Tensor | None) -> Tensor:
    """(n, r, c); -inf where a candidate is padding."""
    if candidates is None:
        with _aside(weight):
            return torch.baddbmm(bias[:, None], states, weight.mT)
    rows = (candidates - 1).clamp(min=0)
    if candidates.ndim == 1:
        return torch.baddbmm(bias[:, None, rows], states, weight[:, rows].mT)
    logits = (weight[:, rows] @ states[..., None]).squeeze(-1) + bias[:, rows]
    return logits.masked_fill(candidates == 0, -torch.inf)


def _without(scores: Tensor, seen: Tensor, candidates: Tensor | None) -> Tensor:
    """Scores (r, c) with -inf for seen items (r, l); in place, where all items have one."""
    if candidates is None:
        v = scores.shape[1]
        is_item = (seen > 0) & (seen <= v)
        limits = torch.where(is_item, -torch.inf, torch.inf).to(scores.dtype)  # what is no item takes nothing away
        return scores.scatter_reduce_(1, (seen - 1).clamp_(0, v - 1), limits, "amin")
    past = (candidates.expand(len(scores), -1)[:, :, None] == seen[:, None, :]).any(dim=-1)
    return scores.masked_fill(past, -torch.inf)


def _candidates(candidates: object, v: int, b: int, device: torch.device) -> Tensor:
    """(c,) or (b, c) int64 on the states' device, each item once per list."""
    expected, fix = f"candidates int64 (c,) or ({b}, c)", "Pass one list of item ids for all, or one each."
    try:
        ids = torch.as_tensor(candidates, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise EnsembleKDError("recommend", expected, shown(candidates), fix) from error
    whole_numbers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    shaped = ids.ndim == 1 or (ids.ndim == 2 and len(ids) == b)
    if not whole_numbers or not shaped or not ids.numel():
        raise EnsembleKDError("recommend", expected, f"{ids.dtype} {tuple(ids.shape)}", fix)
    ids = ids.long()
    low, high = (int(x) for x in ids.aminmax())
    if not (low >= (1 if ids.ndim == 1 else 0) and high <= v):
        raise EnsembleKDError("recommend", f"candidates in 1..{v} (num_items)", f"{low}..{high}", "Pass item ids.")
    ordered, places = ids.sort(dim=-1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again.scatter_(-1, places[..., 1:], ordered[..., 1:] == ordered[..., :-1])
    return ids[~again] if ids.ndim == 1 else ids.masked_fill(again, 0)


def _finite(where: str, values: Tensor) -> Tensor:
    """Return the values, or raise if a score is NaN or infinite: topk would take NaN for the best."""
    if not bool(values.isfinite().all()):
        bad = int((~values.isfinite()).reshape(len(values), -1).any(dim=1).sum())
        fix = "The weights are damaged or their training diverged: load another checkpoint."
        raise EnsembleKDError(where, "finite scores", f"NaN or infinite ones in {bad} of {len(values)} rows", fix)
    return values
