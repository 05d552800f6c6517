"""Hidden states of sequences of unequal length, without most of the padding between them.

Sequences of similar length (up to a factor of 2) are encoded together, in as many columns as the longest of them has.
Nothing is put back into a padded tensor afterwards. Whole batches of similar length would save as much, but then an
item of a short sequence counts more than an item of a long one: it cost SASRec on Beauty a tenth of its NDCG@10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ensemble_kd.functional import Pool, pool_sequence
from ensemble_kd.internal import to_device


@dataclass(frozen=True)
class Group:
    """Sequences that were encoded together."""

    users: Tensor  # (r,) their numbers among the b sequences
    real: Tensor  # (k, r, w) bool, False at padding
    hidden: Tensor  # (n, k, r, w, d)


@dataclass(frozen=True)
class Packed:
    """Hidden states of k copies of b sequences, such as their views and their anchors.

    Examples:
        >>> item_ids = torch.tensor([[[0, 0, 0, 0, 0, 0, 7], [1, 2, 3, 4, 5, 6, 7]]])
        >>> packed = pack(lambda ids: ids[None, ..., None].float(), item_ids, by_length=True)
        >>> [tuple(group.hidden.shape) for group in packed.groups]
        [(1, 1, 1, 1, 1), (1, 1, 1, 7, 1)]
        >>> packed.at(torch.tensor([6, 7, 13])).flatten().tolist()
        [7.0, 1.0, 7.0]
    """

    groups: tuple[Group, ...]
    length: int  # of the padded sequences; 1 where the encoder gives the newest position alone

    def copies(self, chosen: slice) -> Packed:
        """Return some of the copies."""
        return Packed(tuple(Group(g.users, g.real[chosen], g.hidden[:, chosen]) for g in self.groups), self.length)

    @cached_property
    def flat(self) -> Tensor:
        """All states (n, t, d), group after group; a single group is (n, (k b length), d)."""
        parts = [rearrange(group.hidden, "n k r w d -> n (k r w) d") for group in self.groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def at(self, positions: Tensor) -> Tensor:
        """Return the states (n, t, d) at positions (t,) of the padded (k b length), none of which may be padding."""
        shape = self.groups[0].real.shape
        if len(self.groups) > 1 or shape[-1] < self.length:
            place = positions.new_zeros(shape[0], sum(len(group.users) for group in self.groups), self.length)
            start = 0
            for group in self.groups:
                own = torch.arange(start, start + group.real.numel(), device=place.device)
                place[:, group.users, self.length - group.real.shape[-1] :] = own.view_as(group.real)
                start += group.real.numel()
            positions = place.flatten()[positions]
        return self.flat.index_select(1, positions)

    def by_group(self, pool: Pool) -> list[Tensor]:
        """Return H(s) (n, k, r, e) per group, see ``functional.pool_sequence``; "flatten" has e = w d per group."""
        return [pool_sequence(group.hidden, group.real, pool=pool) for group in self.groups]

    def pooled(self, pool: Pool) -> Tensor:
        """Return H(s) of all, (n, k, b, e), in the order of the batch."""
        parts = self.by_group(pool)
        widest = self.length * self.flat.shape[-1] if pool == "flatten" else parts[0].shape[-1]
        parts = [F.pad(part, (widest - part.shape[-1], 0)) for part in parts]
        users = torch.cat([group.users for group in self.groups])
        return torch.cat(parts, dim=2).index_select(2, users.argsort())


def pack(
    encode: Callable[[Tensor], Tensor],
    item_ids: Tensor,
    *,
    by_length: bool,
    lengths: Sequence[int] | None = None,
    worth: int = 0,
) -> Packed:
    """Encode k copies of b sequences, (k, b, l) int64, left-padded with 0.

    Args:
        encode: (rows, w) -> (n, rows, w, d), or (n, rows, d) for the newest position alone.
        item_ids: (k, b, l) the input of ``encode``, before its first two axes are joined.
        by_length: encode sequences of similar length together, else all at once.
        lengths: (b,) real positions of each sequence; None: they are read, for which an accelerator would wait.
        worth: the padded positions that a further group has to save.
    """
    groups, k, newest_only = [], len(item_ids), False
    for users, width in _similar(item_ids, lengths, worth) if by_length else [_all(item_ids)]:
        read = item_ids[:, users, -width:] if by_length else item_ids
        hidden, real = encode(read.flatten(0, 1)), read != 0
        if newest_only := hidden.ndim == 3:
            hidden, real = hidden[:, :, None], real[..., -1:]
        groups.append(Group(users, real, rearrange(hidden, "n (k r) w d -> n k r w d", k=k)))
    return Packed(tuple(groups), 1 if newest_only else item_ids.shape[-1])


def _all(item_ids: Tensor) -> tuple[Tensor, int]:
    return torch.arange(item_ids.shape[1], device=item_ids.device), item_ids.shape[2]


def _similar(item_ids: Tensor, known: Sequence[int] | None, worth: int) -> Iterator[tuple[Tensor, int]]:
    """Yield the sequences whose lengths have the same logarithm, rounded up, with the longest length among them.

    Groups that save too little join the next longer one. A group of all is in the order of the batch.
    """
    k, _, longest = item_ids.shape
    if known is None:
        real = (item_ids != 0).any(dim=0).to(torch.uint8)
        lengths = longest - real.argmax(dim=1)  # a sequence of padding alone is as long as the batch
    else:
        lengths = torch.tensor([items or longest for items in known])
    kinds = lengths.clamp(min=4).double().log2().ceil().long()
    order = kinds.argsort(stable=True)
    parts = [(len(part), int(lengths[part].max())) for part in order.split(kinds.bincount().tolist()) if len(part)]
    order, start, rows = to_device(order, item_ids.device), 0, 0
    everyone = torch.arange(len(order), device=item_ids.device)  # one group of all keeps the batch's own order
    for i, (size, width) in enumerate(parts):
        rows += size
        if i + 1 == len(parts) or k * rows * (parts[i + 1][1] - width) >= worth:
            yield everyone if rows == len(order) else order[start : start + rows], width
            start, rows = start + rows, 0
