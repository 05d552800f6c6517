"""Small requests of many threads, one after the other.

Python runs one thread at a time. A request makes hundreds of small steps in torch, each of which lets Python go and
waits for it again. If both cores were free, four threads answered half as many requests a second as one did: most of
their time went into handing Python over. In turn they answer as many as one. Results do not depend on it.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sized
from typing import Any, TypeVar, cast

import torch

LARGEST = 32  # sequences of a request that takes a turn; with more of them, steps are large and run beside each other

Method = TypeVar("Method", bound=Callable[..., Any])

_turn = threading.RLock()


def _renew() -> None:
    """Forget who had the turn when the process was forked: that thread is not in the child."""
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def in_turn(method: Method) -> Method:
    """Let small calls of a method wait for each other; the first argument is a batch.

    Examples:
        >>> class Model:
        ...     @in_turn
        ...     def rows(self, item_ids):
        ...         return len(item_ids)
        >>> Model().rows(torch.ones(2, 3))
        2
    """

    @functools.wraps(method)
    def taken(self: object, item_ids: object, *args: Any, **options: Any) -> Any:
        is_small = isinstance(item_ids, Sized) and not isinstance(item_ids, type) and _length(item_ids) <= LARGEST
        if not is_small or torch.compiler.is_compiling():
            return method(self, item_ids, *args, **options)
        with _turn:
            return method(self, item_ids, *args, **options)

    return cast(Method, taken)


def _length(given: Sized) -> int:
    try:
        return len(given)
    except TypeError:  # a tensor without axes; the method refuses it
        return LARGEST + 1
