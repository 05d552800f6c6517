"""From interactions to numbered sequences: order, repeats, k-core and numbers (Sec. 4.1.1)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.data.vocabulary import Vocabulary
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import choice, whole

Repeats: TypeAlias = Literal["drop", "keep"]
_Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


class Numbered(NamedTuple):
    """Sequences of numbered items, user after user."""

    items: Tensor  # (num_interactions,) int64, from 1
    offsets: Tensor  # (num_users + 1,) int64
    item_names: tuple[Hashable, ...]
    user_names: tuple[Hashable, ...]
    rows: _Ints  # (num_interactions,) the place of each interaction in the table


def number(
    where: str,
    users: Sequence[Hashable],
    items: Sequence[Hashable],
    times: np.ndarray[Any, Any] | None,
    *,
    k_core: int,
    least: int,
    repeats: Repeats,
    known: Vocabulary | None = None,
) -> Numbered:
    """Order, filter and number interactions.

    Each user's interactions are ordered by time, equal times by their order in the table. With ``repeats="drop"``, only
    the first interaction of a user with an item stays. Then users and items with fewer than ``k_core`` interactions
    are removed, again and again until all that are left have as many. Users are numbered by first appearance in the
    table, items by first appearance in the sequences.

    Args:
        where: the public call or the file, for the message.
        users: the user of each interaction.
        items: the item of each.
        times: (num_interactions,) what they are ordered by; None: the order of the table.
        k_core: fewest interactions of a user and of an item; 1 keeps all items.
        least: fewest interactions of a user in any case.
        repeats: "drop" or "keep" a user's later interactions with an item.
        known: items that keep their numbers and are never removed; others follow them.

    Raises:
        EnsembleKDError: k_core < 1, or nothing is left.

    Examples:
        >>> found = number("f", "aaba", "xyzx", np.array([3, 2, 0, 1]), k_core=1, least=1, repeats="drop")
        >>> found.items.tolist(), found.offsets.tolist(), found.item_names, found.user_names
        ([1, 2, 3], [0, 2, 3], ('x', 'y', 'z'), ('a', 'b'))
    """
    k_core = whole(where, "k_core", k_core, least=1)
    choice(where, "repeats", repeats, get_args(Repeats))
    user, user_names = _codes(users)
    item, item_names = _codes(items)
    order = np.argsort(user, kind="stable") if times is None else np.lexsort((times, user))  # both are stable
    user, item = user[order], item[order]
    kept = np.arange(len(order))
    if repeats == "drop":
        kept = np.sort(np.unique(user * len(item_names) + item, return_index=True)[1])
    always = np.array([known is not None and name in known for name in item_names], dtype=bool)
    before = -1
    while before != len(kept):
        before = len(kept)
        kept = kept[np.bincount(user[kept], minlength=len(user_names))[user[kept]] >= max(k_core, least)]
        enough = np.bincount(item[kept], minlength=len(item_names)) >= k_core
        kept = kept[(enough | always)[item[kept]]]
    if not len(kept):
        got = f"none with {max(k_core, least)} interactions"
        fix = 'Lower k_core, or hold nothing out (holdout="none") where users have few interactions.'
        raise EnsembleKDError(where, "users and items that are left", got, fix)
    user, item = user[kept], item[kept]
    present, first = np.unique(item, return_index=True)
    names = [item_names[code] for code in present[np.argsort(first)]]
    vocabulary = Vocabulary(names) if known is None else known.extended(names)
    numbers = np.zeros(len(item_names), dtype=np.int64)
    numbers[present] = vocabulary.numbers([item_names[code] for code in present])
    owners, counts = np.unique(user, return_counts=True)
    return Numbered(
        torch.from_numpy(numbers[item]),
        torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
        vocabulary.names,
        tuple(user_names[code] for code in owners),
        order[kept],
    )


def _codes(names: Sequence[Hashable]) -> tuple[_Ints, list[Hashable]]:
    """Return a number per name, from 0 by first appearance, and the names by number."""
    found: dict[Hashable, int] = {}
    codes = np.fromiter((found.setdefault(name, len(found)) for name in names), dtype=np.int64, count=len(names))
    return codes, list(found)
