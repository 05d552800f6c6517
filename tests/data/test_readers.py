"""Readers: the text layout, RecBole, MovieLens and Amazon, on small files and on real ones."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from pathlib import Path

import pytest

from ensemble_kd.data import (
    SequenceData,
    read_amazon,
    read_movielens,
    read_recbole,
    read_text,
)
from ensemble_kd.errors import EnsembleKDError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def test_text_round_trip(tmp_path: Path) -> None:
    path, about = tmp_path / "tiny.txt", tmp_path / "tiny.json"
    path.write_text("u7 4 1 2\n12 2 3 1 4 \n")
    about.write_text('{"0": [9], "1": [2, 1, 2], "4": [3]}')
    data = read_text(path, about)
    assert (data.items.tolist(), data.offsets.tolist(), data.num_items) == ([4, 1, 2, 2, 3, 1, 4], [0, 3, 7], 4)
    assert data.user_names == ("u7", "12")
    assert data.item_names is None
    assert data.item_attributes is not None
    assert data.item_attributes.table.tolist() == [[-1, -1], [0, 1], [-1, -1], [-1, -1], [2, -1], [-1, -1]]


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("7 1 2 3\n8 3 2 1\n", encoding="utf-8-sig")
    (tmp_path / "a.json").write_text('{"1": [1]}', encoding="utf-8-sig")
    data = read_text(tmp_path / "t.txt", tmp_path / "a.json")
    assert data.user_names == ("7", "8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 1 2 3\n2 1 x 3\n", r"t\.txt:2: expected item ids that are whole numbers from 1, got 'x'"),
        ("1 1 2 3.0\n", r"t\.txt:1: expected item ids .* got '3\.0'"),
        ("1 1 2 -3\n", r"t\.txt:1: expected item ids .* got '-3'"),
        ("1 1 2 1_0\n", r"t\.txt:1: expected item ids .* got '1_0'"),
        ("1 1 2 ٣\n", r"t\.txt:1: expected item ids .* got '٣'"),
        ("1 1 0 3\n", r"t\.txt:1: expected item ids .* got 0"),
        ("1 1 2 3\n\n2 1 2 3\n", r"t\.txt:2: expected a user and items, got an empty line"),
        ("1 1 2 3\n2 1 2\n", r"t\.txt:2: expected at least 3 items per user, got 2 of user 2"),
        ("1 1 2 3\n1 1 2 3\n", r"t\.txt:2: expected one line per user, got user 1 of line 1 again"),
        ("1 1 2 3\n2 1 1041 2\n", r"t\.txt:2: expected item ids without large gaps, got id 1041 among 4 distinct"),
        (f"1 1 2 {10**30}\n", r"t\.txt:1: expected item ids without large gaps"),
        (f"1 1 2 {'9' * 5000}\n", r"t\.txt:1: expected item ids without large gaps"),
        ("", r"t\.txt: expected at least one line, got an empty file"),
        (
            "1 5\n1 6\n",
            r"t\.txt:1: expected at least 3 items per user, got 1 of user 1\. Put a user's items",
        ),
        ("1::5::3::978\n", r"t\.txt:1: expected a line 'user item_1 item_2 …'.*Read it with read_movielens"),
        ("user_id:token\titem_id:token\n", r"t\.txt:1: .*Read it with read_recbole"),
        ('{"reviewerID": "A"}\n', r"t\.txt:1: .*Read it with read_amazon"),
        ("user,item\n1,2\n", r"t\.txt:1: .*with spaces in place of commas"),
    ],
)
def test_text_errors_name_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    with pytest.raises(EnsembleKDError, match=words):
        read_text(tmp_path / "t.txt")


def test_the_largest_gap_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("1 1 2 1030\n")
    assert read_text(tmp_path / "t.txt").num_items == 1030


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"4": [1]}', r"a\.json: expected attributes of items 1\.\.3, got item 4"),
        ('{"one": [1]}', "expected item ids as keys, got 'one'"),
        ('{"1": 1}', "expected a list of whole numbers from 1, got 1 for item 1"),
        ('{"1": [0]}', r"expected a list of whole numbers from 1, got \[0\] for item 1"),
        ('{"1": [true]}', r"expected a list of whole numbers from 1, got \[True\] for item 1"),
        ("[]", "expected a JSON object .* got a list"),
        ("{", "expected a JSON object .* got no JSON"),
        ("[" * 100_000, "expected a JSON object .* got no JSON"),
        (
            '{"1": [4611686018427387904]}',
            r"a\.json: expected attribute ids without large gaps, got id 46116",
        ),
        (f'{{"1": [{2**70}]}}', r"a\.json: expected attribute ids from 1, got"),
        (f'{{"{"1" * 5000}": [1]}}', r"a\.json: expected attributes of items 1\.\.3, got item 111"),
    ],
)
def test_attribute_file_errors(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "t.txt").write_text("1 1 2 3\n")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(EnsembleKDError, match=words):
        read_text(tmp_path / "t.txt", tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "users", "items", "actions", "attributes"),
    [
        ("Beauty", 22_363, 12_101, 198_502, 637),
        ("ML-1M", 6_040, 3_706, 1_000_209, 18),
        ("LastFM", 1_090, 3_646, 52_551, 388),
    ],
)
def test_real_files(name: str, users: int, items: int, actions: int, attributes: int) -> None:
    if not (REAL / f"{name}.txt").exists():
        pytest.skip(f"{name}.txt is not distributed with the code; put it into ../shared/data")
    data = read_text(REAL / f"{name}.txt", REAL / f"{name}_item2attributes.json")
    assert (data.num_users, data.num_items, data.num_interactions) == (users, items, actions)
    assert data.item_attributes is not None
    assert data.item_attributes.num_attributes == attributes
    assert (data.item_attributes.table[1:-1] >= 0).any(1).all()


RAW = [
    ("b", "z", 1), ("a", "z", 5), ("a", "y", 5), ("a", "x", 2), ("a", "x", 9), ("b", "x", 3), ("b", "y", 2),
    ("c", "y", 1), ("c", "x", 2), ("c", "z", 3), ("c", "rare", 4), ("d", "w", 1), ("d", "x", 2), ("c", "w", 5),
]  # fmt: skip
ORDERED = {"b": ["z", "y", "x"], "a": ["x", "z", "y"], "c": ["y", "x", "z"]}
TAGS = {"x": ["red", "big"], "y": ["red"], "z": [], "w": ["gone"]}


def check_raw(data: SequenceData, tags: dict[str, list[str]]) -> None:
    assert data.user_names == tuple(ORDERED)
    assert data.item_names == ("z", "y", "x")  # in order of first appearance
    named = [[data.item_names[i - 1] for i in data.items[a:b]] for a, b in itertools.pairwise(data.offsets)]
    assert named == list(ORDERED.values())
    assert data.item_attributes is not None
    ids: dict[str, int] = {}
    wanted = [sorted(ids.setdefault(tag, len(ids)) for tag in tags[item]) for item in data.item_names]
    assert [[a for a in row if a >= 0] for row in data.item_attributes.table.tolist()[1:-1]] == wanted
    assert data.item_attributes.num_attributes == len(ids)


def test_recbole(tmp_path: Path) -> None:
    pytest.importorskip("polars")
    inter, item = tmp_path / "t.inter", tmp_path / "t.item"
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    inter.write_text("\n".join(lines + [f"{u}\t{i}\t4.0\t{t}.5" for u, i, t in RAW]) + "\n")
    item.write_text("item_id:token\ttags:token_seq\n" + "".join(f"{i}\t{' '.join(t)}\n" for i, t in TAGS.items()))
    check_raw(read_recbole(inter, item, attribute_field="tags", k_core=2), TAGS)
    by_file = read_recbole(inter, k_core=2, time_field=None)
    assert by_file.user_names == ("b", "a", "c")
    assert by_file.item_names is not None
    assert [by_file.item_names[i - 1] for i in by_file.items[:3]] == ["z", "x", "y"]
    with pytest.raises(EnsembleKDError, match=r"t\.inter:1: expected a field 'when', got user_id, item_id, rating"):
        read_recbole(inter, time_field="when")
    with pytest.raises(EnsembleKDError, match="both item_path and attribute_field, or neither, got item_path alone"):
        read_recbole(inter, item)
    with pytest.raises(EnsembleKDError, match=r"t\.inter: expected users and items that are left, got none with 5"):
        read_recbole(inter)
    with pytest.raises(EnsembleKDError, match="k_core, a whole number >= 1, got 0"):
        read_recbole(inter, k_core=0)
    inter.write_text(inter.read_text() + "a\tx\n")
    with pytest.raises(EnsembleKDError, match=r"t\.inter:16: expected 4 fields, got 2 in 'a\\tx'"):
        read_recbole(inter)
    inter.write_text("user_id\titem_id\n")
    with pytest.raises(EnsembleKDError, match=r"t\.inter:1: expected a typed header"):
        read_recbole(inter)


def test_recbole_token_is_one_attribute(tmp_path: Path) -> None:
    pytest.importorskip("polars")
    inter, item = tmp_path / "t.inter", tmp_path / "t.item"
    inter.write_text("user_id:token\titem_id:token\n" + "".join(f"u\t{i}\n" for i in "xyz"))
    item.write_text("item_id:token\tbrand:token\nx\tOld Spice\ny\t\nz\tOld Spice\n")
    data = read_recbole(inter, item, attribute_field="brand", k_core=1, time_field=None)
    assert data.item_attributes is not None
    assert data.item_attributes.table.tolist() == [[-1], [0], [-1], [0], [-1]]


def test_movielens(tmp_path: Path) -> None:
    pytest.importorskip("polars")
    ratings, movies = tmp_path / "ratings.dat", tmp_path / "movies.dat"
    ratings.write_bytes("".join(f"{u}::{i}::5::{t}\r\n" for u, i, t in RAW).encode())
    text = "".join(f"{i}::Amélie :: {i}::{'|'.join(t) or '(no genres listed)'}\n" for i, t in TAGS.items())
    movies.write_bytes(text.encode("latin-1"))
    check_raw(read_movielens(ratings, movies, k_core=2), TAGS)
    assert read_movielens(ratings, k_core=2).item_attributes is None
    movies.write_text("1::no genres\n")
    with pytest.raises(EnsembleKDError, match=r"movies\.dat:1: expected 3 fields"):
        read_movielens(ratings, movies, k_core=2)
    ratings.write_text("1::2::3::4\n1::2::3::soon\n")
    with pytest.raises(EnsembleKDError, match=r"ratings\.dat:2: expected a timestamp, got 'soon'"):
        read_movielens(ratings)


@pytest.mark.parametrize("packed", [True, False])
def test_amazon(tmp_path: Path, packed: bool) -> None:
    pytest.importorskip("polars")
    end = ".gz" if packed else ""
    reviews, meta = tmp_path / f"reviews.json{end}", tmp_path / f"meta.json{end}"

    def write(path: Path, lines: list[str]) -> None:
        content = "".join(line + "\n" for line in lines).encode()
        path.write_bytes(gzip.compress(content) if packed else content)

    write(reviews, [json.dumps({"reviewerID": u, "asin": i, "unixReviewTime": t}) for u, i, t in RAW])
    paths = {i: [["Root", *tags]] for i, tags in TAGS.items()}
    about = [{"asin": i, "categories": path, "brand": "red" if i == "z" else None} for i, path in paths.items()]
    write(meta, [repr(record) for record in about])  # None has no JSON spelling like this
    tags = {item: [f"category: {tag}" for tag in tags] for item, tags in TAGS.items()}
    tags["z"].append("brand: red")
    check_raw(read_amazon(reviews, meta, k_core=2), tags)
    write(meta, ["{'asin': 'x'", ""])
    with pytest.raises(EnsembleKDError, match=r"meta\.json.*:1: expected a JSON object or a Python dict literal"):
        read_amazon(reviews, meta)
    write(meta, ["__import__('os').getcwd()"])
    with pytest.raises(EnsembleKDError, match=r"meta\.json.*:1: expected a JSON object"):
        read_amazon(reviews, meta)
    write(meta, ["{'asin': 'x', 'categories': 'Root'}"])
    with pytest.raises(EnsembleKDError, match=r"meta\.json.*:1: expected categories as a list of paths, got 'Root'"):
        read_amazon(reviews, meta)
    write(reviews, ['{"asin": "x"}'])
    with pytest.raises(EnsembleKDError, match=r"reviews\.json.*:1: expected the key 'reviewerID', got keys asin"):
        read_amazon(reviews)


def test_a_gzip_file_that_is_cut_short(tmp_path: Path) -> None:
    pytest.importorskip("polars")
    path = tmp_path / "reviews.json.gz"
    record = json.dumps({"reviewerID": "u", "asin": "i", "unixReviewTime": 1})
    packed = gzip.compress("\n".join([record] * 1000).encode())
    for content in (packed[:-9], packed[:60], b"not gzip at all", packed[:30] + b"\xff" * 20 + packed[50:]):
        path.write_bytes(content)
        with pytest.raises(EnsembleKDError, match=r"reviews\.json\.gz: expected a whole gzip file, got .*Download it"):
            read_amazon(path)
    path = tmp_path / "reviews.json"
    path.write_text("[" * 100_000)
    with pytest.raises(EnsembleKDError, match=r"reviews\.json:1: expected a JSON object"):
        read_amazon(path)


def test_repeated_items_are_kept_or_dropped(tmp_path: Path) -> None:
    """Seven plays of three songs: seven with "keep", three with "drop", which is the default."""
    pytest.importorskip("polars")
    plays = "xyxzxyz"
    inter, ratings, reviews = tmp_path / "t.inter", tmp_path / "ratings.dat", tmp_path / "reviews.json"
    inter.write_text("user_id:token\titem_id:token\n" + "".join(f"u\t{item}\n" for item in plays))
    ratings.write_text("".join(f"u::{item}::5::{time}\n" for time, item in enumerate(plays)))
    records = [{"reviewerID": "u", "asin": item, "unixReviewTime": time} for time, item in enumerate(plays)]
    reviews.write_text("".join(json.dumps(record) + "\n" for record in records))

    def named(data: SequenceData) -> str:
        assert data.item_names is not None
        return "".join(data.item_names[i - 1] for i in data.items)

    for read in (
        lambda **options: read_recbole(inter, time_field=None, k_core=1, **options),
        lambda **options: read_movielens(ratings, k_core=1, **options),
        lambda **options: read_amazon(reviews, k_core=1, **options),
    ):
        assert named(read()) == named(read(repeats="drop")) == "xyz"
        assert named(read(repeats="keep")) == plays
        with pytest.raises(EnsembleKDError, match="expected repeats 'drop' or 'keep', got 'first'"):
            read(repeats="first")


def test_readers_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    for reader in (read_recbole, read_movielens, read_amazon):
        with pytest.raises(EnsembleKDError, match=r"pip install 'ensemble_kd\[data\]'"):
            reader(tmp_path / "none")
