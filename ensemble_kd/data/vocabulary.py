"""The source's own ids of items or users, and the numbers that stand for them here."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cached_property
from typing import Any, Literal, TypeAlias

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import choice, instance, shown

Unknown: TypeAlias = Literal["error", "drop"]
UNKNOWN: tuple[Unknown, ...] = ("error", "drop")
MOST_NAMED = 5  # names that an error lists
# Types of names that a saved model may have, and the ways into JSON and back.
SAVED: Mapping[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "str": (str, str, str),
    "int": (int, int, int),
    "float": (float, float, float),
    "UUID": (uuid.UUID, str, uuid.UUID),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
}


class Vocabulary:
    """Names of items 1..v, or of users from 0: the source's own ids, of any type that can be the key of a dict.

    ``len()`` is the number of names, and two vocabularies with the same names in the same order are equal.

    Args:
        names: each once, and all of one type, since 1 and "1" would be two items for one.
        first: the number of the first name: 1 for items, 0 for users.
        kind: the word for one of them in error texts.

    Raises:
        EnsembleKDError: names that come twice, are missing, or are of several types.

    Examples:
        >>> vocabulary = Vocabulary(["tea", "milk"])
        >>> vocabulary.numbers(["milk", "tea"]), vocabulary.name(2)
        ([2, 1], 'milk')
        >>> vocabulary.numbers(["milk", "rum"])
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: vocabulary: expected known items, got 1 unknown: 'rum'. \
Pass unknown="drop" to leave them out, or look for another spelling or type.
        >>> vocabulary.numbers(["milk", "rum"], unknown="drop")
        [2]
    """

    def __init__(self, names: Iterable[Hashable], *, first: int = 1, kind: str = "item") -> None:
        instance("vocabulary", "names", names, Iterable, "Pass a list.")
        if isinstance(names, str | bytes):
            raise EnsembleKDError(
                "vocabulary", "a list of names", shown(names), "Pass a list, of one name if there is one."
            )
        self.names, self.first, self.kind = tuple(names), first, kind
        where = "vocabulary"
        types = dict.fromkeys(map(type, self.names))
        if len(types) > 1:
            got = " and ".join(repr(next(n for n in self.names if type(n) is t)) for t in list(types)[:2])
            fix = "Convert the column, to text for example: an id and its text would be two."
            raise EnsembleKDError(where, f"{kind} ids of one type", got, fix)
        if len(self._numbers) != len(self.names):
            again = next(n for i, n in enumerate(self.names, start=first) if self._numbers[n] != i)
            raise EnsembleKDError(where, f"each {kind} id once", f"{again!r} again", "Leave repeated ones out.")

    @cached_property
    def _numbers(self) -> dict[Hashable, int]:
        try:
            return {name: number for number, name in enumerate(self.names, start=self.first)}
        except TypeError as error:
            got = shown(next(name for name in self.names if not _hashable(name)))
            fix = "Convert them, to text for example."
            raise EnsembleKDError("vocabulary", f"{self.kind} ids that can be keys of a dict", got, fix) from error

    def numbers(self, names: Iterable[Hashable], *, unknown: Unknown = "error", where: str = "vocabulary") -> list[int]:
        """Return the numbers of names, in their order.

        Args:
            names: the source's own ids.
            unknown: "error", or "drop" to leave out names that the vocabulary does not have.
            where: the public call, for the message.

        Raises:
            EnsembleKDError: unknown names, all of them in one error.
        """
        choice(where, "unknown", unknown, UNKNOWN)
        if isinstance(names, str | bytes) or not isinstance(names, Iterable):
            fix = f"Pass a list, of one {self.kind} id if there is one."
            raise EnsembleKDError(where, f"a list of {self.kind} ids", shown(names), fix)
        names = list(names)
        found = [self._numbers.get(name) if _hashable(name) else None for name in names]
        if unknown == "error" and None in found:
            missing = list(dict.fromkeys(shown(n) for n, number in zip(names, found, strict=True) if number is None))
            more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
            got = f"{len(missing)} unknown: {', '.join(missing[:MOST_NAMED])}{more}"
            fix = 'Pass unknown="drop" to leave them out, or look for another spelling or type.'
            raise EnsembleKDError(where, f"known {self.kind}s", got, fix)
        return [number for number in found if number is not None]

    def name(self, number: int) -> Hashable:
        """Return the name of an item or a user.

        Raises:
            EnsembleKDError: there is no such number.
        """
        if not self.first <= number < self.first + len(self.names):
            last = self.first + len(self.names) - 1
            fix = "0 is no item." if self.first else "Users count from 0."
            raise EnsembleKDError("vocabulary", f"a number in {self.first}..{last}", number, fix)
        return self.names[number - self.first]

    def extended(self, names: Iterable[Hashable]) -> Vocabulary:
        """Return a vocabulary in which those names that are new come after the old ones.

        Examples:
            >>> Vocabulary(["tea", "milk"]).extended(["milk", "rum"])
            Vocabulary(3 items: 'tea', 'milk', 'rum')
        """
        return Vocabulary(dict.fromkeys((*self.names, *names)), first=self.first, kind=self.kind)

    def begins_with(self, other: Vocabulary) -> bool:
        """Return True if the names of ``other`` have the same numbers here."""
        return self.first == other.first and self.names[: len(other)] == other.names

    def to_json(self) -> str:
        """Return the names as JSON, for ``from_json``.

        Raises:
            EnsembleKDError: names of a type that JSON cannot keep.

        Examples:
            >>> Vocabulary.from_json(Vocabulary([7, 9]).to_json())
            Vocabulary(2 items: 7, 9)
        """
        own = type(self.names[0]) if self.names else str
        for kind, (known, dump, _) in SAVED.items():
            if own is known:
                return json.dumps({"type": kind, "names": [dump(name) for name in self.names]})
        fix = f"Convert the ids before training: {', '.join(SAVED)} can be saved."
        raise EnsembleKDError("vocabulary", "item ids that can be saved", own.__name__, fix)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Return the items' vocabulary that ``to_json`` wrote."""
        content = json.loads(text)
        return cls(map(SAVED[content["type"]][2], content["names"]))

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: Hashable) -> bool:
        return name in self._numbers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (self.first, self.names) == (other.first, other.names)

    def __hash__(self) -> int:
        return hash((self.first, self.names))

    def __repr__(self) -> str:
        listed = ", ".join(map(repr, self.names[:3])) + (", ..." if len(self) > 3 else "")
        return f"Vocabulary({len(self)} {self.kind}s{listed and ': ' + listed})"


def _hashable(name: object) -> bool:
    try:
        hash(name)
    except TypeError:
        return False
    return True
