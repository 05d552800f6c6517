"""Reader of RecBole's atomic files."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from ensemble_kd.data.numbering import Repeats
from ensemble_kd.data.readers.interactions import read_fields, require_polars, to_sequences
from ensemble_kd.data.sequences import SequenceData
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import existing_file, instance

if TYPE_CHECKING:
    from polars import DataFrame


def read_recbole(
    inter_path: str | PathLike[str],
    item_path: str | PathLike[str] | None = None,
    *,
    attribute_field: str | None = None,
    k_core: int = 5,
    repeats: Repeats = "drop",
    user_field: str = "user_id",
    item_field: str = "item_id",
    time_field: str | None = "timestamp",
) -> SequenceData:
    """Read a ``.inter`` file and, for the attributes, a ``.item`` file: tab-separated, with a typed header.

    Args:
        inter_path: header such as ``user_id:token  item_id:token  timestamp:float``; more fields are passed over.
        item_path: header such as ``item_id:token  genre:token_seq``.
        attribute_field: the field of the ``.item`` file whose words are the attributes; needed with ``item_path``. A
            ``token_seq`` is split at spaces, a ``token`` is one attribute.
        k_core: fewest interactions of a user and of an item (Sec. 4.1.1).
        repeats: a user's later interactions with an item: "drop" leaves them out, as the published data sets do; "keep"
            has every one of them, as for plays of a song.
        user_field: name of the user's field.
        item_field: name of the item's field, in both files.
        time_field: name of the time's field; None takes the file's order.

    Returns:
        The data, with ``item_names`` and ``user_names``.

    Raises:
        EnsembleKDError: a field that is missing or a line that does not fit the header, with file and line; polars is
            not installed.

    Examples:
        >>> read_recbole("ml-1m.inter", "ml-1m.item", attribute_field="genre")  # doctest: +SKIP
        SequenceData(num_users=6040, num_items=3416, num_interactions=999611, num_attributes=18)
    """
    pl = require_polars("read_recbole")
    if (item_path is None) != (attribute_field is None):
        given = "item_path alone" if attribute_field is None else "attribute_field alone"
        raise EnsembleKDError(
            "read_recbole", "both item_path and attribute_field, or neither", given, "Name the other."
        )
    fields = {"user_field": user_field, "item_field": item_field, "time_field": time_field}
    for name, field in {**fields, "attribute_field": attribute_field}.items():
        if field is not None or name in ("user_field", "item_field"):
            instance("read_recbole", name, field, str, "Pass the name of a field.")
    inter_path = existing_file("read_recbole", "inter_path", inter_path)
    item_path = None if item_path is None else existing_file("read_recbole", "item_path", item_path)
    table, types = _read_atomic(inter_path)
    names = {user_field: "user", item_field: "item"} | ({} if time_field is None else {time_field: "time"})
    _require_fields(inter_path, list(names), types)
    table = table.select("line", *(pl.col(field).alias(name) for field, name in names.items()))
    if time_field is None:
        table = table.with_columns(pl.col("line").cast(pl.String).alias("time"))
    attributes: dict[str, list[str]] | None = None
    if item_path is not None and attribute_field is not None:
        about, types = _read_atomic(item_path)
        _require_fields(item_path, [item_field, attribute_field], types)
        several = types[attribute_field].endswith("_seq")
        pairs = zip(about[item_field].to_list(), about[attribute_field].to_list(), strict=True)
        attributes = {item: words.split() if several else [words] if words else [] for item, words in pairs}
    return to_sequences(table, source=str(inter_path), k_core=k_core, repeats=repeats, attributes=attributes)


def _read_atomic(path: str | PathLike[str]) -> tuple[DataFrame, dict[str, str]]:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        header = file.readline().rstrip("\r\n")
    types = {name: kind for name, _, kind in (field.partition(":") for field in header.split("\t"))}
    if not all(types.values()):
        fix = "A RecBole header is tab-separated name:type fields."
        raise EnsembleKDError(f"{path}:1", "a typed header such as 'user_id:token'", repr(header[:60]), fix)
    return read_fields(path, "\t", list(types), encoding="utf-8-sig", skip=1), types


def _require_fields(path: str | PathLike[str], fields: list[str], types: dict[str, str]) -> None:
    for field in fields:
        if field not in types:
            raise EnsembleKDError(f"{path}:1", f"a field {field!r}", f"{', '.join(types)}", "Name the field to read.")
