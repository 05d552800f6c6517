"""Made-up users of a made-up catalogue, drawn from a process that a sequence model can learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ensemble_kd.data.attributes import ItemAttributes
from ensemble_kd.data.rows import MIN_ITEMS
from ensemble_kd.data.sequences import SequenceData
from ensemble_kd.internal import whole

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SUCCESSOR, CLUSTER, TASTE = 0.1, 0.5, 0.3  # chances of each rule for the next item; the rest is popularity alone
SUCCESSOR_ODDS = (0.5, 0.3, 0.2)
ATTRIBUTE_NOISE = 0.15  # chance that an attribute of an item has nothing to do with its cluster
CONTEXTS = 3  # kinds of the last item but one that matter to what follows
NUM_BRANDS = 30


@dataclass(frozen=True, eq=False)
class Process:
    """The rules and chances that draw the next item. Items, clusters and users are counted from 0 here.

    Args:
        cluster: (v,) the cluster of each item.
        popularity: (v,) chances that sum to 1.
        successors: (v, 3) items that tend to follow an item.
        follows: (3, clusters) the cluster of the next item, by the kind of the last item but one (its cluster modulo
            3) and the cluster of the last.
        early: (users, clusters) each user's taste at the start of the sequence, chances that sum to 1.
        late: (users, clusters) the taste at its end.
        lengths: (users,) length of each sequence.
    """

    cluster: Ints
    popularity: Floats
    successors: Ints
    follows: Ints
    early: Floats
    late: Floats
    lengths: Ints


def synthetic(
    num_users: int = 2000,
    num_items: int = 600,
    seed: int = 0,
    *,
    num_clusters: int = 40,
    min_len: int = 5,
    max_len: int = 40,
) -> SequenceData:
    """Draw sequences and attributes of a made-up catalogue; the same arguments always give the same data.

    Items belong to clusters, and their popularity follows Zipf's law. The next item of a user comes from the cluster
    that follows the last two items (probability 0.5), from a cluster of the user's taste, which drifts over the
    sequence (0.3), from three items that tend to follow the last one (0.1), or from all items by their popularity
    (0.1). A user never has an item twice. Lengths are ``min_len`` plus a geometric draw of mean 8, at
    most ``max_len``. An item has three attributes: its cluster, its department (a pair of clusters), each wrong with
    probability 0.15, and one of 30 brands, drawn at random.

    Args:
        num_users: at least 1.
        num_items: v, at least twice ``num_clusters`` and at least twice ``max_len``.
        seed: non-negative.
        num_clusters: at least 2.
        min_len: fewest items of a user, at least 3.
        max_len: most items of a user.

    Returns:
        The data, with attributes.

    Raises:
        EnsembleKDError: a number out of range.

    Examples:
        >>> synthetic(num_users=50, num_items=100)  # doctest: +ELLIPSIS
        SequenceData(num_users=50, num_items=100, num_interactions=..., num_attributes=90)
    """
    num_users, seed = _whole("num_users", num_users, 1), _whole("seed", seed, 0)
    num_clusters, min_len = _whole("num_clusters", num_clusters, 2), _whole("min_len", min_len, MIN_ITEMS)
    max_len = _whole("max_len", max_len, min_len)
    num_items = _whole("num_items", num_items, 2 * max(num_clusters, max_len))
    rng = np.random.default_rng(seed)
    process = draw_process(rng, num_users, num_items, num_clusters, min_len, max_len)
    sequences = _walk(process, rng)
    items = sequences[np.arange(sequences.shape[1]) < process.lengths[:, None]] + 1
    offsets = np.concatenate([[0], process.lengths.cumsum()])
    attributes = _attributes(rng, process.cluster, num_clusters)
    return SequenceData(torch.from_numpy(items), torch.from_numpy(offsets), num_items, attributes)


def draw_process(
    rng: np.random.Generator, num_users: int, num_items: int, num_clusters: int, min_len: int, max_len: int
) -> Process:
    """Draw clusters, popularity, transitions and tastes."""
    # The first items are dealt out, so that no cluster is empty.
    cluster = np.concatenate([np.arange(num_clusters), rng.integers(num_clusters, size=num_items - num_clusters)])
    popularity = (rng.permutation(num_items) + 5.0) ** -0.8
    successors = rng.integers(num_items, size=(num_items, len(SUCCESSOR_ODDS)))
    follows = rng.integers(num_clusters, size=(CONTEXTS, num_clusters))
    early, late = rng.dirichlet(np.full(num_clusters, 0.1), size=(2, num_users))
    lengths = np.minimum(min_len - 1 + rng.geometric(1 / 9, size=num_users), max_len)
    return Process(cluster, popularity / popularity.sum(), successors, follows, early, late, lengths)


def _walk(process: Process, rng: np.random.Generator) -> Ints:
    """Draw all users side by side: (users, longest) items; entries past a user's length mean nothing."""
    users, longest = process.lengths.size, int(process.lengths.max())
    by_cluster = np.argsort(process.cluster, kind="stable")
    mass = process.popularity[by_cluster].cumsum()
    ends = np.searchsorted(process.cluster[by_cluster], np.arange(process.follows.shape[1]), side="right")
    high = mass[ends - 1]
    low = np.concatenate([[0.0], high[:-1]])
    tastes = np.stack([process.early, process.late]).cumsum(-1)

    def propose(user: Ints, step: int, sequences: Ints) -> Ints:
        kind, which, when, inside = rng.random((4, user.size))
        last, before = sequences[user, max(step - 1, 0)], sequences[user, max(step - 2, 0)]
        taste = tastes[(when < step / process.lengths[user]).astype(np.int64), user]
        liked = np.minimum((taste < which[:, None]).sum(1), taste.shape[1] - 1)  # a sum may fall short of 1 by rounding
        due = process.follows[process.cluster[before] % CONTEXTS, process.cluster[last]]
        cluster = np.where(kind < SUCCESSOR + CLUSTER, due, liked)
        anything = kind >= SUCCESSOR + CLUSTER + TASTE
        if step == 0:  # nothing to follow yet
            cluster, anything = liked, kind >= TASTE
        start = np.where(anything, 0.0, low[cluster])
        stop = np.where(anything, mass[-1], high[cluster])
        place = np.searchsorted(mass, start + inside * (stop - start), side="right")
        item: Ints = by_cluster[np.minimum(place, mass.size - 1)]
        rank = np.searchsorted(np.cumsum(SUCCESSOR_ODDS)[:-1], which, side="right")
        if step > 0:
            item = np.where(kind < SUCCESSOR, process.successors[last, rank], item)
        return item

    sequences = np.zeros((users, longest), dtype=np.int64)
    for step in range(longest):
        pending = np.flatnonzero(process.lengths > step)
        # Users who got an item that they had draw again: the process, given that no item comes twice.
        while pending.size:
            item = propose(pending, step, sequences)
            sequences[pending, step] = item
            pending = pending[(sequences[pending, :step] == item[:, None]).any(1)]
    return sequences


def _attributes(rng: np.random.Generator, cluster: Ints, num_clusters: int) -> ItemAttributes:
    num_items, departments = cluster.size, -(-num_clusters // 2)
    noise = rng.random((2, num_items)) < ATTRIBUTE_NOISE
    shown = np.where(noise, rng.integers(num_clusters, size=(2, num_items)), cluster)
    brands = rng.integers(NUM_BRANDS, size=num_items)
    columns = [shown[0], num_clusters + shown[1] // 2, num_clusters + departments + brands]
    table = np.full((num_items + 2, len(columns)), -1, dtype=np.int64)
    table[1:-1] = np.stack(columns, axis=1)
    return ItemAttributes(num_clusters + departments + NUM_BRANDS, torch.from_numpy(table))


def _whole(name: str, value: int, least: int) -> int:
    return whole("synthetic", name, value, least=least)
