"""Content of a file as the types that it should have: dataclasses and typed dictionaries of tensors and numbers."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints, is_typeddict

T = TypeVar("T")
EXACT = (bool, int, float, str, dict, list)  # True is no number, and a subclass may compare otherwise


def plain(value: object) -> Any:
    """Return a value with each dataclass as a dictionary, to be written. Tensors are not copied.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Position:
        ...     epoch: int
        >>> plain([Position(3)])
        [{'epoch': 3}]
    """
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: plain(below) for name, below in value.items()}
    return [plain(below) for below in value] if isinstance(value, list) else value


def conform(kind: type[T], value: object, name: str = "content") -> T:
    """Return ``value``, which ``plain`` has made, as a ``kind``: every field is there, and of its type.

    Raises:
        TypeError: a field that is missing, unknown or of another type, by name.

    Examples:
        >>> conform(dict[str, float], {"kd": 0.5})
        {'kd': 0.5}
        >>> conform(dict[str, float], {"kd": "a"}, "terms")
        Traceback (most recent call last):
            ...
        TypeError: terms['kd'] is a str, not a float
    """
    return _conform(kind, value, name)  # type: ignore[no-any-return]


def _conform(kind: Any, value: Any, name: str) -> Any:
    if kind is Any:
        return value
    if is_dataclass(kind) or is_typeddict(kind):
        return kind(**_fields(kind, value, name))
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    fits = type(value) is origin if origin in EXACT else isinstance(value, origin)
    if not fits:
        raise TypeError(f"{name} is a {type(value).__name__}, not a {origin.__name__}")
    if origin is list and arguments:
        return [_conform(arguments[0], below, f"{name}[{i}]") for i, below in enumerate(value)]
    if origin is dict and arguments:
        for key in value:
            _conform(arguments[0], key, f"a key of {name}")
        return {key: _conform(arguments[1], below, f"{name}[{key!r}]") for key, below in value.items()}
    return value


def _fields(kind: Any, value: Any, name: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise TypeError(f"{name} is a {type(value).__name__}, not a dict")
    hints = get_type_hints(kind)
    missing, unknown = hints.keys() - value.keys(), value.keys() - hints.keys()
    if missing or unknown:
        raise TypeError(
            f"{name} lacks {sorted(missing)}" if missing else f"{name} has {sorted(map(str, unknown))}, too"
        )
    return {field: _conform(hint, value[field], f"{name}.{field}") for field, hint in hints.items()}
