"""From a table of raw interactions, as text, to sequences."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_kd.data.attributes import ItemAttributes
from ensemble_kd.data.numbering import Repeats, number
from ensemble_kd.data.rows import MIN_ITEMS
from ensemble_kd.data.sequences import SequenceData
from ensemble_kd.errors import EnsembleKDError, import_extra

if TYPE_CHECKING:
    from polars import DataFrame


def require_polars(where: str) -> Any:
    """Return the polars module, or raise an error that names the extra to install."""
    return import_extra("polars", extra="data", where=where)


def read_fields(path: str | PathLike[str], separator: str, names: list[str], *, encoding: str, skip: int) -> DataFrame:
    """Read the text columns of a file whose separator may be several characters long and whose fields are never quoted.

    Args:
        path: the file; empty lines are passed over.
        separator: what stands between two fields.
        names: the columns, in the file's order.
        encoding: of the file.
        skip: lines of the header.

    Returns:
        The columns as strings, and "line", counted from 1.

    Raises:
        EnsembleKDError: a line of another number of fields.
    """
    pl = require_polars(str(path))
    text = Path(path).read_bytes().decode(encoding, errors="replace").replace("\r\n", "\n")
    lines = pl.DataFrame({"raw": text.split("\n")}, schema={"raw": pl.String}).with_row_index("line", offset=1)
    lines = lines.slice(skip).filter(pl.col("raw") != "")
    wrong = lines.filter(pl.col("raw").str.count_matches(separator, literal=True) != len(names) - 1)
    if wrong.height:
        number, raw = wrong["line"][0], wrong["raw"][0]
        fields = raw.count(separator) + 1
        fix = f"Fields are {', '.join(names)}, separated by {separator!r}."
        raise EnsembleKDError(f"{path}:{number}", f"{len(names)} fields", f"{fields} in {raw[:60]!r}", fix)
    split = pl.col("raw").str.split_exact(separator, len(names) - 1).struct.rename_fields(names)
    table: DataFrame = lines.select("line", split.alias("fields")).unnest("fields")
    return table


def to_sequences(
    table: DataFrame,
    *,
    source: str,
    k_core: int,
    repeats: Repeats,
    attributes: Mapping[str, Iterable[str]] | None,
) -> SequenceData:
    """Order, filter and number the interactions.

    By the rules of ``number``; users need 3 interactions at least. Attributes are numbered by first appearance, item by
    item.

    Args:
        table: string columns "user", "item", "time", and "line", in the file's order. An empty time is an error.
        source: the file's name, for error texts.
        k_core: fewest interactions of a user and of an item; 1 keeps all items.
        repeats: "drop" or "keep" a user's later interactions with an item.
        attributes: names of the attributes of each item; items unknown here are left out.

    Returns:
        The data, with the names of users and items.

    Raises:
        EnsembleKDError: k_core < 1, a time that is no number, or nothing is left.
    """
    pl = require_polars(source)
    # Whole numbers stay exact; only a file with fractions is read as float64.
    exact = table["time"].cast(pl.Int64, strict=False)
    time = exact if exact.null_count() == 0 else table["time"].cast(pl.Float64, strict=False)
    bad = table.filter(~time.is_finite().fill_null(False))
    if bad.height:
        fix = "Remove the line or correct it."
        raise EnsembleKDError(f"{source}:{bad['line'][0]}", "a timestamp", repr(bad["time"][0]), fix)
    found = number(
        source,
        table["user"].to_list(),
        table["item"].to_list(),
        time.to_numpy(),
        k_core=k_core,
        least=MIN_ITEMS,
        repeats=repeats,
    )
    return SequenceData(
        found.items,
        found.offsets,
        len(found.item_names),
        None if attributes is None else _number(attributes, found.item_names),
        item_names=found.item_names,
        user_names=found.user_names,
    )


def _number(attributes: Mapping[str, Iterable[str]], items: tuple[Hashable, ...]) -> ItemAttributes:
    ids: dict[str, int] = {}
    rows = {
        item: [ids.setdefault(attribute, len(ids) + 1) for attribute in attributes.get(str(name), ())]
        for item, name in enumerate(items, start=1)
    }
    return ItemAttributes.from_dict(rows, len(items))
