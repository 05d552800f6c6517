"""Who teaches whom: all pairs of members, some by architecture, or on each target only those who know it better."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Between = Literal["all", "same", "other"]
Gate = Literal["open", "better"]


class Spread(NamedTuple):
    """An ensemble whose members are spread over processes. KD needs only sums of the members elsewhere.

    Every process has members of the same kinds in the same order.
    """

    n: int  # members in all
    sum_: Callable[[Tensor], Tensor]  # adds up a tensor over the processes, in place


@dataclass(frozen=True)
class Pairs:
    """The ordered pairs (teacher, student) of members."""

    between: Between = "all"
    kinds: tuple[int, ...] = ()  # one per member; empty for "all"
    gate: Gate = "open"
    spread: Spread | None = None

    @property
    def everybody(self) -> bool:
        """True if each member teaches each other one, and all are in this process."""
        return self == EVERYBODY

    def pulls(self, z: Sequence[Tensor], log_p: Sequence[Tensor]) -> list[Tensor]:
        """Return G_y = Σ_x (z_y − z_x) over the teachers x of every member y.

        Args:
            z: a tensor per member.
            log_p: the members' log-probabilities of the targets, of shapes that broadcast. A gate compares them.
        """
        if self.gate == "open":
            return [c * x - total for x, (c, total) in zip(z, self.teachers(z), strict=True)]
        pulls = [torch.zeros_like(x) for x in z]
        for x, y in self.unordered(len(z)):
            gap = z[x] - z[y]
            pulls[x] = pulls[x].addcmul(gap, (log_p[y] > log_p[x]).to(gap.dtype))
            pulls[y] = pulls[y].addcmul(gap, (log_p[x] > log_p[y]).to(gap.dtype), value=-1)
        return pulls

    def unordered(self, n: int) -> Iterator[tuple[int, int]]:
        """Return the pairs x < y that may teach each other."""
        kinds = self.kinds or (0,) * n
        for y in range(n):
            for x in range(y):
                if (kinds[x] == kinds[y]) != (self.between == "other"):
                    yield x, y

    def teachers(self, z: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """Return c and T of G = c z − T for every member. For "all" they are n and S: a member may teach itself."""
        kinds = self.kinds or (0,) * len(z)
        sums: dict[int, Tensor] = {}
        for kind, x in zip(kinds, z, strict=True):
            sums[kind] = sums[kind] + x if kind in sums else x
        processes = 1
        if self.spread is not None:
            processes = self.spread.n // len(z)
            sums = dict(zip(sums, self.spread.sum_(torch.stack(list(sums.values()))), strict=True))
        counts = {kind: processes * kinds.count(kind) for kind in sums}
        if self.between == "other":
            others = {kind: [other for other in sums if other != kind] for kind in sums}
            found = {
                kind: (sum(counts[k] for k in rest), functools.reduce(torch.add, [sums[k] for k in rest]))
                for kind, rest in others.items()
            }
        else:
            found = {kind: (counts[kind], sums[kind]) for kind in sums}
        return [found[kind] for kind in kinds]

    def mean(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the mean over all members, those of other processes included."""
        total = functools.reduce(torch.add, rows) if len(rows) > 1 else rows[0].clone()
        if self.spread is None:
            return total.div_(len(rows))
        return self.spread.sum_(total).div_(self.spread.n)


EVERYBODY = Pairs()
