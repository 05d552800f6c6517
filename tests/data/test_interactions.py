"""Tables of pandas, polars and Arrow alike: order, ids of any type, what is held out, attributes."""

from __future__ import annotations

import datetime
import itertools
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_kd.data import AtTime, ItemAttributes, SequenceData, Vocabulary
from ensemble_kd.errors import EnsembleKDError

KINDS = ["dict", "pandas", "polars", "arrow"]


def make(kind: str) -> Callable[[dict[str, Any]], Any]:
    if kind == "pandas":
        return pytest.importorskip("pandas").DataFrame
    if kind == "polars":
        return pytest.importorskip("polars").DataFrame
    if kind == "arrow":
        return pytest.importorskip("pyarrow").table
    return dict


def named(data: SequenceData) -> dict[Any, list[Any]]:
    """Each user's items, by the source's own ids."""
    assert data.user_names is not None
    assert data.vocabulary is not None
    items = [data.vocabulary.name(int(i)) for i in data.items]
    return {
        name: items[int(a) : int(b)]
        for name, a, b in zip(data.user_names, data.offsets[:-1], data.offsets[1:], strict=True)
    }


ROWS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["x", "y", "z", "ü"]), st.integers(-3, 3)), min_size=1
)


@pytest.mark.parametrize("kind", KINDS)
@given(rows=ROWS)
def test_a_table_in_plain_python(kind: str, rows: list[tuple[str, str, int]]) -> None:
    """Sorted by time, equal times in the table's order; users by first appearance."""
    table = make(kind)(dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*rows, strict=True)), strict=True)))
    data = SequenceData.from_interactions(table, holdout="none")
    expected: dict[str, list[str]] = {}
    for user, _, _ in rows:
        expected.setdefault(user, [])
    for user, item, _ in sorted(rows, key=lambda row: row[2]):  # Python's sort is stable
        expected[user].append(item)
    assert named(data) == expected
    assert list(named(data)) == list(expected)
    assert data.item_names == tuple(dict.fromkeys(item for row in expected.values() for item in row))
    as_listed = SequenceData.from_interactions(table, time=None, holdout="none")
    assert named(as_listed) == {u: [i for v, i, _ in rows if v == u] for u in expected}
    once = SequenceData.from_interactions(table, holdout="none", repeats="drop")
    assert named(once) == {u: list(dict.fromkeys(items)) for u, items in expected.items()}
    long = {u: items for u, items in expected.items() if len(items) >= 3}
    if long:
        assert named(SequenceData.from_interactions(table)) == long
    else:
        with pytest.raises(EnsembleKDError, match="users and items that are left, got none with 3 interactions"):
            SequenceData.from_interactions(table)


IDS: dict[str, list[Any]] = {
    "text": ["u1", "u1", "u2"],
    "integers": [7, 7, -9],
    "large integers": [2**62, 2**62, 5],
    "uuid": [uuid.UUID(int=1), uuid.UUID(int=1), uuid.UUID(int=2)],
    "bytes": [b"a", b"a", b"\xff"],
    "dates": [datetime.date(2024, 1, 1)] * 2 + [datetime.date(2024, 1, 2)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", IDS)
def test_ids_of_any_type(kind: str, ids: str) -> None:
    if ids == "uuid" and kind in ("polars", "arrow"):
        pytest.skip("no such column there")
    values = IDS[ids]
    table = make(kind)({"who": values, "what": values[::-1], "when": [1, 2, 3]})
    data = SequenceData.from_interactions(table, user="who", item="what", time="when", holdout="none")
    assert named(data) == {values[0]: [values[2], values[0]], values[2]: [values[0]]}


START = datetime.datetime(2024, 5, 1, 12)
DAY = datetime.timedelta(days=1)
ZONE = datetime.timezone(datetime.timedelta(hours=2))
TIMES: dict[str, list[Any]] = {
    "integers": [30, 10, 20],
    "fractions": [0.3, 0.1, 0.2],
    "unsigned": [np.uint8(200), np.uint8(1), np.uint8(100)],
    "datetimes": [START + 2 * DAY, START, START + DAY],
    "zones": [(START + 2 * DAY).replace(tzinfo=ZONE), START.replace(tzinfo=ZONE), (START + DAY).replace(tzinfo=ZONE)],
    "dates": [(START + 2 * DAY).date(), START.date(), (START + DAY).date()],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", TIMES)
def test_times_of_any_type(kind: str, times: str) -> None:
    values = TIMES[times]
    table = make(kind)({"user_id": ["u"] * 3, "item_id": ["c", "a", "b"], "timestamp": values})
    assert named(SequenceData.from_interactions(table)) == {"u": ["a", "b", "c"]}
    middle, last = values[2], values[0]
    split = SequenceData.from_interactions(table, holdout=AtTime(test=last, valid=middle))
    assert [split.target(name).tolist() for name in ("valid", "test")] == [[2], [3]]  # type: ignore[arg-type]
    assert split.history("train")[0].tolist() == [1]
    if times in ("datetimes", "dates"):
        by_text = SequenceData.from_interactions(table, holdout=AtTime("2024-05-03", "2024-05-02"))
        assert by_text.checksum == split.checksum
        assert by_text.held_out == "from 2024-05-02 and 2024-05-03 on"


def test_zones_to_the_nanosecond() -> None:
    pd = pytest.importorskip("pandas")
    begin = pd.Timestamp("2024-05-01", tz="Europe/Berlin")
    times = [begin + pd.Timedelta(2, "ns"), begin, begin + pd.Timedelta(1, "ns")]
    for zone in ("Europe/Berlin", "America/Lima"):
        column = pd.Series(times).dt.tz_convert(zone)
        for when in (column, column.astype(object), list(column)):
            table = {"user_id": ["u"] * 3, "item_id": ["c", "a", "b"], "timestamp": when}
            assert named(SequenceData.from_interactions(table)) == {"u": ["a", "b", "c"]}
            split = SequenceData.from_interactions(table, holdout=AtTime("2024-04-30T22:00:00.000000001"))  # in UTC
            assert split.target("test").tolist() == [2]
    late = pd.Series([begin, None, begin])
    with pytest.raises(EnsembleKDError, match="'timestamp' in every row, got NaT in row 1"):
        SequenceData.from_interactions({"user_id": ["u"] * 3, "item_id": ["c", "a", "b"], "timestamp": late})


@given(ROWS, st.integers(-3, 3), st.integers(-3, 3))
def test_a_point_of_time_in_plain_python(rows: list[tuple[str, str, int]], one: int, two: int) -> None:
    valid, test = sorted((one, two))
    table = dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*rows, strict=True)), strict=True))
    data = SequenceData.from_interactions(table, holdout=AtTime(test, valid))
    sequences: dict[str, list[tuple[int, str]]] = {user: [] for user, _, _ in rows}
    for user, item, when in sorted(rows, key=lambda row: row[2]):
        sequences[user].append((when, item))
    assert data.vocabulary is not None
    for split, begin, end in (("valid", valid, test), ("test", test, 99)):
        found = []
        for row in sequences.values():
            past = [item for when, item in row if when < begin]
            later = [item for when, item in row if begin <= when < end]
            if past and later:
                found.append((past, later[0]))
        items, offsets = data.history(split)  # type: ignore[arg-type]
        shown = [items[int(a) : int(b)].tolist() for a, b in itertools.pairwise(offsets)]
        assert shown == [data.vocabulary.numbers(past) for past, _ in found]
        assert data.target(split).tolist() == data.vocabulary.numbers(target for _, target in found)  # type: ignore[arg-type]
    trained = [item for row in sequences.values() for when, item in row if when < valid]
    assert data.history("train")[0].tolist() == data.vocabulary.numbers(trained)


def test_the_items_of_a_model_keep_their_numbers() -> None:
    old = Vocabulary(["z", "y", "never seen again"])
    table = {"user_id": list("aaabb"), "item_id": ["new", "y", "newer", "new", "y"], "timestamp": [1, 2, 3, 4, 5]}
    data = SequenceData.from_interactions(table, vocabulary=old, holdout="none")
    assert data.item_names == ("z", "y", "never seen again", "new", "newer")
    assert data.items.tolist() == [4, 2, 5, 4, 2]
    table["item_id"][-1] = "z"
    core = SequenceData.from_interactions(table, vocabulary=old, holdout="none", k_core=2)
    assert core.item_names == ("z", "y", "never seen again", "new")  # "z" and "y" are known, "newer" comes once
    assert named(core) == {"a": ["new", "y"], "b": ["new", "z"]}


def test_k_core_until_all_have_as_many() -> None:
    table = {"user_id": list("aabbc"), "item_id": list("xyxyx"), "timestamp": range(5)}
    table["timestamp"] = list(table["timestamp"])
    assert named(SequenceData.from_interactions(table, k_core=2, holdout="none")) == {"a": ["x", "y"], "b": ["x", "y"]}


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_from_a_table(kind: str) -> None:
    table = make(kind)({"user_id": list("aaa"), "item_id": ["x", "y", "z"], "timestamp": [1, 2, 3]})
    about = make(kind)(
        {
            "item_id": ["y", "unseen", "x"],
            "genre": [["war", "love"], ["space"], ["love"]],
            "studio": ["A", "B", None],
        }
    )
    data = SequenceData.from_interactions(table, item_table=about, attributes=["genre", "studio"])
    assert data.item_attributes is not None
    assert data.item_attributes.table[1:-1].tolist() == [[0, -1, -1], [0, 1, 2], [-1, -1, -1]]
    more = ItemAttributes.from_table(about, Vocabulary(["x", "y", "z", "unseen"]), attributes=["genre", "studio"])
    assert more.table[1:4].tolist() == data.item_attributes.table[1:-1].tolist()
    assert more.num_attributes == 5
    with pytest.raises(EnsembleKDError, match="both item_table and attributes, or neither, got item_table alone"):
        SequenceData.from_interactions(table, item_table=about)
    with pytest.raises(EnsembleKDError, match="attributes of items such as 'q', got none"):
        ItemAttributes.from_table(about, Vocabulary(["q"]), attributes="studio")


GOOD = {"user_id": ["a"] * 3, "item_id": ["x", "y", "z"], "timestamp": [1, 2, 3]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"item_id": ["x", None, "z"]}, "'item_id' in every row, got none in row 1"),
        ({"user_id": ["a", "a", None]}, "'user_id' in every row, got none in row 2"),
        ({"timestamp": [1, 2, None]}, "'timestamp' in every row, got n.* in row 2"),
        ({"timestamp": [START, None, START]}, "'timestamp' in every row, got [Nn].* in row 1"),
        ({"timestamp": ["1", "2", "3"]}, "'timestamp' of numbers, dates or times, got text such as '1'"),
        ({"timestamp": [True, True, False]}, "'timestamp' of numbers, dates or times, got bool"),
        ({"time": [1, 2, 3], "timestamp": ...}, "a table with a column 'timestamp', got user_id, item_id, time"),
    ],
)
def test_tables_that_cannot_be_read(kind: str, changes: dict[str, Any], words: str) -> None:
    columns = {name: value for name, value in {**GOOD, **changes}.items() if value is not ...}
    with pytest.raises(EnsembleKDError, match=words):
        SequenceData.from_interactions(make(kind)(columns))


def test_what_is_no_table() -> None:
    for table, words in (
        ({**GOOD, "item_id": ["x", "y"]}, "columns of one length >= 1, got 3 and 2"),
        ({name: [] for name in GOOD}, "columns of one length >= 1, got 0"),
        ({**GOOD, "item_id": ["1", 1, "z"]}, "item ids of one type, got '1' and 1"),
        ({**GOOD, "item_id": [["x"], ["y"], ["z"]]}, "'item_id' of ids that can be keys of a dict"),
        (3, "a table with a column 'user_id', got int"),
    ):
        with pytest.raises(EnsembleKDError, match=words):
            SequenceData.from_interactions(table)
    for options, words in (
        ({"holdout": "first"}, "holdout 'last' or 'none', got 'first'"),
        ({"holdout": AtTime(2), "time": None}, "a column of times for AtTime"),
        ({"holdout": AtTime("2024-01-01")}, "a point of time as the column has them"),
        ({"holdout": AtTime(1, 2)}, "valid <= test, got 2 > 1"),
        ({"repeats": "first"}, "repeats 'drop' or 'keep', got 'first'"),
        ({"k_core": 0}, "k_core, a whole number >= 1"),
    ):
        with pytest.raises(EnsembleKDError, match=words):
            SequenceData.from_interactions(GOOD, **options)  # type: ignore[arg-type]
    lazy = pytest.importorskip("polars").LazyFrame(GOOD)
    with pytest.raises(EnsembleKDError, match="A lazy or streamed table is to be collected first"):
        SequenceData.from_interactions(lazy)
