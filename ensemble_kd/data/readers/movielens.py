"""Reader of MovieLens' ``ratings.dat`` and ``movies.dat``."""

from __future__ import annotations

from os import PathLike

from ensemble_kd.data.numbering import Repeats
from ensemble_kd.data.readers.interactions import read_fields, require_polars, to_sequences
from ensemble_kd.data.sequences import SequenceData
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import existing_file


def read_movielens(
    ratings_path: str | PathLike[str],
    movies_path: str | PathLike[str] | None = None,
    *,
    k_core: int = 5,
    repeats: Repeats = "drop",
) -> SequenceData:
    """Read ``UserID::MovieID::Rating::Timestamp`` lines, and genres from ``MovieID::Title::Genre|Genre`` lines.

    Every rating is an interaction, whatever its value (Sec. 4.1.1). Files are latin-1.

    Args:
        ratings_path: ``ratings.dat``.
        movies_path: ``movies.dat``, for the genres as attributes.
        k_core: fewest interactions of a user and of an item; 1 keeps every movie that has a rating.
        repeats: a user's later interactions with an item: "drop" leaves them out, as the published data sets do; "keep"
            has every one of them, as for plays of a song.

    Returns:
        The data, with ``item_names`` and ``user_names``.

    Raises:
        EnsembleKDError: a line of another layout, with file and line; polars is not installed.

    Examples:
        >>> read_movielens("ml-1m/ratings.dat", "ml-1m/movies.dat")  # doctest: +SKIP
        SequenceData(num_users=6040, num_items=3416, num_interactions=999611, num_attributes=18)
    """
    require_polars("read_movielens")
    ratings_path = existing_file("read_movielens", "ratings_path", ratings_path)
    if movies_path is not None:
        movies_path = existing_file("read_movielens", "movies_path", movies_path)
    table = read_fields(ratings_path, "::", ["user", "item", "rating", "time"], encoding="latin-1", skip=0)
    genres = None if movies_path is None else _read_genres(movies_path)
    return to_sequences(
        table.drop("rating"), source=str(ratings_path), k_core=k_core, repeats=repeats, attributes=genres
    )


def _read_genres(path: str | PathLike[str]) -> dict[str, list[str]]:
    genres: dict[str, list[str]] = {}
    with open(path, encoding="latin-1") as lines:
        for number, line in enumerate(lines, start=1):
            # A title may have "::" in it, so the first and the last field are cut off from the outside.
            movie, _, rest = line.rstrip("\r\n").partition("::")
            _, separator, names = rest.rpartition("::")
            if not separator:
                fix = "Fields are MovieID::Title::Genres."
                raise EnsembleKDError(f"{path}:{number}", "3 fields", f"{line[:60]!r}", fix)
            genres[movie] = [] if names == "(no genres listed)" else [name for name in names.split("|") if name]
    return genres
