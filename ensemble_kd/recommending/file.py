"""``recommend_all``: recommendations of every user as a Parquet file."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ensemble_kd.data import AnySequences, Unknown
from ensemble_kd.ensemble import EnsembleKD, check_model_and_data
from ensemble_kd.errors import EnsembleKDError, import_extra
from ensemble_kd.internal import file_path, flag, make_folder, replacing
from ensemble_kd.recommending.answers import (
    answers,
    check_known,
    names_of,
    question,
    translation,
    user_names_of,
)
from ensemble_kd.serving import Aggregate


def recommend_all(
    model: EnsembleKD,
    data: AnySequences,
    path: str | PathLike[str],
    *,
    k: int = 10,
    exclude_seen: bool = True,
    candidates: Iterable[Hashable] | None = None,
    aggregate: Aggregate = "logits",
    unknown: Unknown = "error",
    progress: bool = True,
) -> Path:
    """Write the k best next items of every user to a Parquet file, some users at a time, whole or not at all.

    Its columns are user_id, item_id, rank (from 1) and score, under the source's own ids; UUIDs are text. Needs pyarrow
    (the extra ``tables``).

    Args:
        model: trained on this data or on other data.
        data: in memory or on disk; all items of a user count, held out or not.
        path: of the file; its folder is made if it is missing.
        k, exclude_seen, candidates, aggregate: as of ``recommend``.
        unknown: "error", or "drop" to leave out items that the model does not know. A user with no known item then has
            no rows.
        progress: show a bar (needs tqdm, the extra ``train``).

    Returns:
        The path.

    Raises:
        EnsembleKDError: as ``recommend_for``; pyarrow is not installed; the file cannot be written; no user has a known
            item. What stood at ``path`` is then unchanged.
    """
    where = "recommend_all"
    import_extra("pyarrow", extra="tables", where=where)
    parquet = import_extra("pyarrow.parquet", extra="tables", where=where)
    check_model_and_data(where, model, data)
    path = file_path(where, "path", path)
    flag(where, "progress", progress)
    model.place.require_whole(where)
    names = names_of(model)
    asked = question(where, names, k, exclude_seen, candidates, aggregate, unknown)
    own = translation(where, model, data)
    histories = _histories(where, data, own, unknown, progress)
    make_folder(where, path.parent)
    with replacing(path) as file:
        writer: Any = None
        try:
            for part in answers(model, names, histories, asked):
                block = part.to_arrow()
                writer = parquet.ParquetWriter(file, block.schema) if writer is None else writer
                writer.write_table(block)
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            fix = "Compare the ids of data and model, and their types."
            raise EnsembleKDError(where, "users with items that the model knows", "none", fix)
    return path


def _histories(
    where: str, data: AnySequences, own: Tensor, unknown: Unknown, progress: bool
) -> Iterator[tuple[Hashable, Tensor]]:
    """Return each user's name and the model's numbers of the items, one after the other."""
    names, user, bar = user_names_of(data), 0, None
    if progress:
        with suppress(ImportError):
            from tqdm.auto import tqdm

            bar = tqdm(total=data.num_users, desc=where, unit="user", mininterval=1.0)
    try:
        for piece in data.pieces():
            check_known(where, data, own, piece.items, unknown)
            items = own[piece.items]
            for start, end in zip(piece.offsets[:-1].tolist(), piece.offsets[1:].tolist(), strict=True):
                row = items[start:end]
                yield names.name(user), row[row > 0]
                user += 1
                if bar is not None:
                    bar.update()
    finally:
        if bar is not None:
            bar.close()
