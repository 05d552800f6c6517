"""Identities of a formula and the wrong versions that they have to kill, as tests; and a second process, played."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from ensemble_kd.losses import Spread
from tests.spec.test_identities import Identity
from tests.spec.test_mutants import BRIEF, HUNT

Kind = tuple[Identity, Callable[..., Any], list[str]]  # what must hold, a family of versions, and its faults
Test = Callable[..., None]


def checked_by(kinds: Sequence[Kind]) -> tuple[Test, Test, Test]:
    """Return three tests: the library holds, a family without a fault passes, each fault is killed."""
    names = [identity.check.__name__ for identity, *_ in kinds]
    faults = [(identity, family, fault) for identity, family, faults in kinds for fault in faults]
    killed = [f"{fault} killed-by {identity.check.__name__}" for identity, _, fault in faults]

    @pytest.mark.parametrize("identity", [identity for identity, *_ in kinds], ids=names)
    def holds(identity: Identity) -> None:
        identity.hold(identity.of)

    @pytest.mark.parametrize(("identity", "family"), [kind[:2] for kind in kinds], ids=names)
    def passes(identity: Identity, family: Callable[..., Any]) -> None:
        identity.hold(family, BRIEF)

    @pytest.mark.parametrize(("identity", "family", "fault"), faults, ids=killed)
    def kills(identity: Identity, family: Callable[..., Any], fault: str) -> None:
        with pytest.raises(AssertionError):
            identity.hold(partial(family, fault=fault), HUNT)

    return holds, passes, kills


def played(n: int, other: Callable[..., object]) -> Spread:
    """Return a spread over two processes, n members in all, of which ``other(spread=...)`` is the second one.

    What the other process would send is noted, and added to each sum of the first.
    """
    sent: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        sent.append(x.clone())
        return x

    other(spread=Spread(n, note))
    received: Iterator[Tensor] = iter(sent)
    return Spread(n, lambda x: x.add_(next(received)))
