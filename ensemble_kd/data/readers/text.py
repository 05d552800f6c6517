"""Reader of the field's usual text layout: one user per line, oldest item first."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ensemble_kd.data.attributes import ItemAttributes, far_ahead
from ensemble_kd.data.rows import MIN_ITEMS
from ensemble_kd.data.sequences import SequenceData
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import existing_file, shown

MOST_DIGITS = 18  # of a number that fits into 64 bits
OTHER_LAYOUTS = {  # a sign of another layout -> the way out
    "::": "Read it with read_movielens.",
    ":token": "Read it with read_recbole.",
    "{": "Read it with read_amazon.",
    ",": "Write one line per user, with spaces in place of commas.",
}


def read_text(path: str | PathLike[str], attributes_path: str | PathLike[str] | None = None) -> SequenceData:
    """Read ``user_id item_1 item_2 … item_T`` lines, oldest first, and the items' attributes.

    The layout of S3-Rec, FMLP, BSARec and others. Item ids are 1..V, V the largest id; 0 is padding and never occurs.
    Attributes are JSON, ``{"item id": [attribute ids, from 1]}``; an entry for "0" is padding and is passed over.

    Args:
        path: the sequences.
        attributes_path: the attributes, or None.

    Returns:
        The data, with ``user_names`` from the first column.

    Raises:
        EnsembleKDError: with file and line: an empty line, an id that is no positive number, a user that comes twice
            or has fewer than 3 items, ids that skip far ahead of the number of items, attributes of an item beyond
            the largest id. A file that is not there raises FileNotFoundError.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "tiny.txt")
        ...     _ = path.write_text("1 1 2 3\\n2 3 1 2 4\\n")
        ...     read_text(path)
        SequenceData(num_users=2, num_items=4, num_interactions=7, num_attributes=0)
    """
    path = existing_file("read_text", "path", path)
    if attributes_path is not None:
        attributes_path = existing_file("read_text", "attributes_path", attributes_path)
    flat: list[int] = []
    offsets = [0]
    users: dict[str, int] = {}
    largest, largest_line = 0, 0
    with open(path, encoding="utf-8-sig", errors="replace") as lines:  # a byte-order mark is no part of a name
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            user, ids = _split(line, where)
            if user in users:
                got = f"user {user} of line {users[user]} again"
                raise EnsembleKDError(where, "one line per user", got, "Join the user's lines.")
            users[user] = number
            flat += ids
            offsets.append(len(flat))
            top = max(ids)
            if top > largest:
                largest, largest_line = top, number
    if not users:
        raise EnsembleKDError(str(path), "at least one line", "an empty file", "Check the path.")
    if far_ahead(largest, distinct := len(set(flat))):
        got = f"id {largest} among {distinct} distinct items"
        fix = "Renumber the items 1..V: the model has a row for every id up to the largest."
        raise EnsembleKDError(f"{path}:{largest_line}", "item ids without large gaps", got, fix)
    attributes = None if attributes_path is None else _read_attributes(attributes_path, largest)
    return SequenceData(torch.tensor(flat), torch.tensor(offsets), largest, attributes, user_names=tuple(users))


def _split(line: str, where: str) -> tuple[str, list[int]]:
    tokens = line.split()
    if not tokens:
        raise EnsembleKDError(where, "a user and items", "an empty line", "Remove the line.")
    user, *words = tokens
    if len(words) < MIN_ITEMS:
        raise _too_short(line, user, len(words), where)
    # One join and one check for the whole line: per-token checks would cost a second on a million actions.
    if not ("".join(words).isascii() and "".join(words).isdigit()):
        bad = next(word for word in words if not (word.isascii() and word.isdigit()))
        raise EnsembleKDError(where, "item ids that are whole numbers from 1", repr(bad), "Renumber the items 1..V.")
    if len(longest := max(words, key=len)) > MOST_DIGITS:
        raise EnsembleKDError(where, "item ids without large gaps", shown(longest), "Renumber the items 1..V.")
    ids = [int(word) for word in words]
    if min(ids) < 1:
        raise EnsembleKDError(where, "item ids that are whole numbers from 1", 0, "0 is padding: count items from 1.")
    return user, ids


def _too_short(line: str, user: str, count: int, where: str) -> EnsembleKDError:
    """The error of a line of fewer than 3 items: another layout, or a user to leave out."""
    layout = "a line 'user item_1 item_2 …', separated by spaces"
    for sign, fix in OTHER_LAYOUTS.items():
        if sign in line:
            return EnsembleKDError(where, layout, shown(line.strip()), fix)
    if count == 1:
        fix = "Put a user's items on one line (read_recbole reads an interaction per line). Leave shorter users out."
        return EnsembleKDError(where, f"at least {MIN_ITEMS} items per user", f"1 of user {user}", fix)
    fix = "Leave-one-out needs one to train on, one to validate and one to test: leave the user out."
    return EnsembleKDError(where, f"at least {MIN_ITEMS} items per user", f"{count} of user {user}", fix)


def _read_attributes(path: str | PathLike[str], num_items: int) -> ItemAttributes:
    where = str(path)
    layout = 'a JSON object {"item id": [attribute ids, from 1]}'
    try:
        content: Any = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise EnsembleKDError(where, layout, f"no JSON ({error})", "Check the file.") from error
    if not isinstance(content, dict):
        raise EnsembleKDError(where, layout, f"a {type(content).__name__}", "Check the file.")
    attributes: dict[int, list[int]] = {}
    for key, ids in content.items():
        if not (key.isascii() and key.isdigit()):
            raise EnsembleKDError(where, "item ids as keys", repr(key), "Use the ids of the sequences.")
        if not isinstance(ids, list) or not all(type(a) is int and a >= 1 for a in ids):
            got = f"{shown(ids)} for item {key}"
            raise EnsembleKDError(where, "a list of whole numbers from 1", got, "Correct it.")
        if len(key) > MOST_DIGITS or int(key) > num_items:
            fix = "Sequences and attributes are of different versions of the dataset."
            raise EnsembleKDError(where, f"attributes of items 1..{num_items}", f"item {key:.40}", fix)
        if int(key):
            attributes[int(key)] = ids
    try:
        return ItemAttributes.from_dict(attributes, num_items)
    except EnsembleKDError as error:
        raise EnsembleKDError(where, error.expected, error.got, error.fix) from error
