"""Values that an argument of a given kind cannot take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HUGE = 2**70


class Nothing:
    """An object of a class that the library does not know."""

    def __repr__(self) -> str:
        return "Nothing()"


def _odd() -> list[Any]:
    return [Nothing(), object, [], {}, (1, 2), "x", b"x", 1j, len, nn.Linear(2, 2), np.zeros(3), torch.zeros(2, 2)]


def whole_number(_: Any) -> list[Any]:
    return [*_odd(), None, True, 1.5, 3.0, -1, -HUGE, "3", float("nan"), float("inf"), np.float64(2), torch.tensor(2.0)]


def natural(_: Any) -> list[Any]:
    return [*whole_number(_), 0]


def positive(_: Any) -> list[Any]:
    return [*_odd(), None, True, 0, 0.0, -1e-9, float("nan"), -float("inf"), "0.1", HUGE**20]


def not_negative(_: Any) -> list[Any]:
    return [*_odd(), None, True, -1, -1e-9, float("nan"), -float("inf"), "0.1", HUGE**20]


def share(_: Any) -> list[Any]:
    return [*_odd(), None, True, -0.1, 1.1, float("nan"), float("inf"), "0.5"]


def flag(_: Any) -> list[Any]:
    return [*_odd(), None, 2, -1, 0.5, "no", "False", float("nan")]


def choice(_: Any) -> list[Any]:
    return [*_odd(), True, 0, 1.5, "", "Logits", ["logits"]]


def word(_: Any) -> list[Any]:
    """For a name that may also be a function."""
    return [value for value in choice(_) if not callable(value)]


def function(_: Any) -> list[Any]:
    return [value for value in [*_odd(), 3, 1.5, True, "fit"] if not callable(value)]


def factory(_: Any) -> list[Any]:
    """Functions without arguments that return no encoder, too."""
    made: list[Callable[..., Any]] = [
        lambda: 3,
        lambda: None,
        lambda: nn.Linear(2, 2),
        lambda: nn.Embedding(4, 2),
        nn.Identity,
        lambda: nn.Linear,
        lambda x: x,
        object,
    ]
    return [None, *function(_), *made]


def path(_: Any) -> list[Any]:
    """What names no file that can be read."""
    return [None, 3, 1.5, True, [], {}, Nothing(), object, torch.zeros(2), "", "\0", "/no/such/file", "/", "x" * 5000]


def written_path(_: Any) -> list[Any]:
    """What names no file that can be written."""
    return [None, 1.5, [], {}, Nothing(), object, torch.zeros(2), "\0", "/dev/null/x", "x" * 5000]


def thing(_: Any) -> list[Any]:
    """For a model, data, a loss: anything of another class, and the class itself."""
    return [*_odd(), 3, 1.5, "model", [[1, 2, 3]], type(_)]


def module(_: Any) -> list[Any]:
    """For a module: anything else, and the class itself."""
    return [value for value in [*_odd(), None, 3, "model", [[1, 2, 3]], type(_)] if not isinstance(value, nn.Module)]


def ids(given: Tensor) -> list[Any]:
    """For item_ids (b, l)."""
    return [
        *module(given),
        given.tolist(),
        given.numpy(),
        given.float(),
        given.int(),
        given.bool(),
        given + 1j,
        given[0],
        given[None],
        given[:0],
        given[:, :0],
        -given,
        given + 1_000_000,
        torch.full_like(given, 2**62),
        torch.zeros_like(given),
        given.flip(1),
        torch.tensor(3),
        given.to("meta"),
        given.to_sparse(),
    ]


def tensor(given: Tensor) -> list[Any]:
    """For any other tensor: other kinds, shapes and types."""
    return [
        *module(given),
        given.tolist(),
        given.numpy(),
        given[..., None, None, None],
        torch.cat([given, given], dim=-1),
        torch.tensor(3.0),
        given.to(torch.complex64),
        given.long() if given.is_floating_point() else given.double(),
        given[..., :0],
        given.to("meta"),
    ]


KINDS: dict[str, Callable[[Any], list[Any]]] = {
    kind.__name__: kind
    for kind in (
        whole_number,
        natural,
        positive,
        not_negative,
        share,
        flag,
        choice,
        word,
        function,
        factory,
        path,
        written_path,
        thing,
        module,
        ids,
        tensor,
    )
}
