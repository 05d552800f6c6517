"""Recommendations as a table of the source's own ids."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from ensemble_kd.errors import import_extra

SHOWN = 10  # rows of a repr


@dataclass(frozen=True, repr=False)
class NamedRecommendations:
    """A table with a row per recommended item: user after user, and the best first.

    ``len()`` is the number of rows.

    Examples:
        >>> found = NamedRecommendations(["ann", "ann"], ["tea", "rum"], [1, 2], [0.9, 0.5])
        >>> found
        user_id  item_id  rank  score
        ann      tea         1  0.9000
        ann      rum         2  0.5000
        >>> found.lists()
        {'ann': ['tea', 'rum']}
    """

    user_id: list[Hashable]
    item_id: list[Hashable]
    rank: list[int]  # from 1
    score: list[float]

    def columns(self) -> dict[str, list[Any]]:
        """Return the columns by name, as ``pandas.DataFrame`` and ``polars.DataFrame`` take them."""
        return {"user_id": self.user_id, "item_id": self.item_id, "rank": self.rank, "score": self.score}

    def lists(self) -> dict[Hashable, list[Hashable]]:
        """Return the items of each user, the best first."""
        found: dict[Hashable, list[Hashable]] = {}
        for user, item in zip(self.user_id, self.item_id, strict=True):
            found.setdefault(user, []).append(item)
        return found

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame``.

        Raises:
            EnsembleKDError: pandas is not installed.
        """
        return import_extra("pandas", extra="tables", where="to_pandas").DataFrame(self.columns())

    def to_polars(self) -> Any:
        """Return a ``polars.DataFrame``.

        Raises:
            EnsembleKDError: polars is not installed.
        """
        return import_extra("polars", extra="data", where="to_polars").DataFrame(self.columns())

    def to_arrow(self) -> Any:
        """Return a ``pyarrow.Table``, with UUIDs as text.

        Raises:
            EnsembleKDError: pyarrow is not installed.
        """
        pa = import_extra("pyarrow", extra="tables", where="to_arrow")
        users, items = (_as_text(names) for names in (self.user_id, self.item_id))
        types = {"rank": pa.int32(), "score": pa.float32()}
        columns = {**self.columns(), "user_id": users, "item_id": items}
        return pa.table({name: pa.array(column, types.get(name)) for name, column in columns.items()})

    def __len__(self) -> int:
        return len(self.rank)

    def __repr__(self) -> str:
        rows = list(zip(*self.columns().values(), strict=True))
        cells = [[str(user), str(item), str(rank), f"{score:.4f}"] for user, item, rank, score in rows[:SHOWN]]
        table = [list(self.columns()), *cells]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = [
            f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:<{widths[3]}}".rstrip()
            for row in table
        ]
        return "\n".join([*lines, f"... {len(rows)} rows"] if len(rows) > SHOWN else lines)


def _as_text(names: list[Hashable]) -> list[Any]:
    return [str(name) for name in names] if names and isinstance(names[0], UUID) else names
