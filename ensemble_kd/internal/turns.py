"""Small requests of many threads, one after the other.

Python runs one thread at a time. A request makes hundreds of small steps in torch, each of which lets Python go and
waits for it again. If both cores were free, four threads answered half as many requests a second as one did: most of
their time went into handing Python over. So they go in turn, and step aside for what is one long step, the product with
the classifiers of all items, while the next request is encoded. Results do not depend on it.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

LARGEST = 32  # sequences of a request that takes a turn; with more of them, steps are large and run beside each other

Method = TypeVar("Method", bound=Callable[..., Any])

_turn = threading.Lock()
_mine = threading.local()  # depth: how many calls of this thread, one within the other, have the turn


def _renew() -> None:
    """Forget who had the turn when the process was forked: that thread is not in the child."""
    global _turn
    _turn = threading.Lock()
    if _depth():
        _turn.acquire()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def _depth() -> int:
    return getattr(_mine, "depth", 0)


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
    def turned(self: object, item_ids: object, *args: Any, **options: Any) -> Any:
        is_small = isinstance(item_ids, Sized) and not isinstance(item_ids, type) and _length(item_ids) <= LARGEST
        if not is_small or torch.compiler.is_compiling():
            return method(self, item_ids, *args, **options)
        with taken():
            return method(self, item_ids, *args, **options)

    return cast(Method, turned)


@contextmanager
def taken() -> Iterator[None]:
    """Run a block in turn; a thread that has the turn keeps it."""
    depth = _depth()
    if not depth:
        _turn.acquire()
    _mine.depth = depth + 1
    try:
        yield
    finally:
        _mine.depth = depth
        if not depth:
            _turn.release()


@contextmanager
def aside() -> Iterator[None]:
    """Run a long step that does not need Python, while another thread has the turn; in no turn, just run it.

    Examples:
        >>> with aside():
        ...     torch.ones(2, 2) @ torch.ones(2)
        tensor([2., 2.])
    """
    depth = _depth()
    if not depth:
        yield
        return
    _mine.depth = 0
    _turn.release()
    try:
        yield
    finally:
        _turn.acquire()
        _mine.depth = depth


def _length(given: Sized) -> int:
    try:
        return len(given)
    except TypeError:  # a tensor without axes; the method refuses it
        return LARGEST + 1
