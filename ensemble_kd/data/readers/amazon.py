"""Reader of the Amazon review files of 2014."""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import IO, Any

from ensemble_kd.data.numbering import Repeats
from ensemble_kd.data.readers.interactions import require_polars, to_sequences
from ensemble_kd.data.sequences import SequenceData
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import existing_file


def read_amazon(
    reviews_path: str | PathLike[str],
    meta_path: str | PathLike[str] | None = None,
    *,
    k_core: int = 5,
    repeats: Repeats = "drop",
) -> SequenceData:
    """Read ``reviews_*.json.gz`` and, for the attributes, ``meta_*.json.gz``; uncompressed files are read as well.

    Attributes are the fine-grained categories and the brand (Sec. 4.1.1): every category of every path but the path's
    root, which all products share. Lines are JSON objects or, as in the files of 2014, Python dict literals.

    Args:
        reviews_path: objects with ``reviewerID``, ``asin`` and ``unixReviewTime``.
        meta_path: objects with ``asin`` and, where known, ``categories`` (a list of paths) and ``brand``.
        k_core: fewest interactions of a user and of an item.
        repeats: a user's later interactions with an item: "drop" leaves them out, as the published data sets do; "keep"
            has every one of them, as for plays of a song.

    Returns:
        The data, with ``item_names`` (asin) and ``user_names``.

    Raises:
        EnsembleKDError: a line that is no object or lacks a key, with file and line; a compressed file that is cut
            short; polars is not installed.

    Examples:
        >>> read_amazon("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz")  # doctest: +SKIP
        SequenceData(num_users=22363, num_items=12101, num_interactions=198502, num_attributes=...)
    """
    pl = require_polars("read_amazon")
    reviews_path = existing_file("read_amazon", "reviews_path", reviews_path)
    meta_path = None if meta_path is None else existing_file("read_amazon", "meta_path", meta_path)
    columns: dict[str, list[str]] = {"user": [], "item": [], "time": []}
    numbers: list[int] = []
    for number, record in _records(reviews_path):
        for name, key in (("user", "reviewerID"), ("item", "asin"), ("time", "unixReviewTime")):
            columns[name].append(str(_required(record, key, f"{reviews_path}:{number}")))
        numbers.append(number)
    schema = {name: pl.String for name in columns}
    table = pl.DataFrame(columns, schema=schema).with_columns(pl.Series("line", numbers, dtype=pl.Int64))
    attributes: dict[str, list[str]] | None = None
    if meta_path is not None:
        attributes = {
            str(_required(record, "asin", f"{meta_path}:{number}")): _attributes(record, f"{meta_path}:{number}")
            for number, record in _records(meta_path)
        }
    return to_sequences(table, source=str(reviews_path), k_core=k_core, repeats=repeats, attributes=attributes)


def _records(path: str | PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    def lines(file: IO[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse(line, f"{path}:{number}")

    if Path(path).suffix == ".gz":
        try:
            with gzip.open(path, "rt", encoding="utf-8-sig", errors="replace") as file:
                yield from lines(file)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise EnsembleKDError(str(path), "a whole gzip file", str(error), "Download it again.") from error
    else:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            yield from lines(file)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        try:
            record = ast.literal_eval(line.strip())  # literals only: nothing in the file is run
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            record = None
    if not isinstance(record, dict):
        fix = "The files of 2014 have one object per line."
        raise EnsembleKDError(where, "a JSON object or a Python dict literal", repr(line.strip()[:60]), fix)
    return record


def _required(record: dict[str, Any], key: str, where: str) -> Any:
    if key not in record:
        raise EnsembleKDError(
            where, f"the key {key!r}", f"keys {', '.join(map(str, record))}", "Check the file's kind."
        )
    return record[key]


def _attributes(record: dict[str, Any], where: str) -> list[str]:
    paths = record.get("categories") or []
    if not (isinstance(paths, list) and all(isinstance(path, list) for path in paths)):
        got = f"{paths!r:.60}"
        raise EnsembleKDError(where, "categories as a list of paths", got, "The files of 2014 have such lists.")
    names = [f"category: {name}" for path in paths for name in path[1:]]
    brand = record.get("brand")
    return [*names, f"brand: {brand}"] if brand else names
