"""Splits, windows and batches against loops over lists; readers on small files; the synthetic process on its own."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble_kd.data import (
    BatchPlan,
    ItemAttributes,
    SequenceData,
    Split,
    read_amazon,
    read_movielens,
    read_recbole,
    read_text,
    synthetic,
)
from ensemble_kd.data.synthetic import draw_process
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.metrics import metric_row, ranks

quick = settings(deadline=None, max_examples=60)
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
sequences = st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=14), min_size=1, max_size=6)


def rows(split: Split, lists: list[list[int]]) -> list[list[int]]:
    return [row[: {"train": -2, "valid": -2, "test": -1}[split]] for row in lists]


def pad(row: list[int], width: int) -> list[int]:
    return [0] * (width - len(row)) + row


# --- splits ---------------------------------------------------------------------------------------------------------


@quick
@given(sequences, st.integers(1, 16), st.sampled_from(["train", "valid", "test"]))
def test_history_and_inputs_equal_slices(lists: list[list[int]], width: int, split: Split) -> None:
    data = SequenceData.from_sequences(lists)
    want = rows(split, lists)
    items, offsets = data.history(split)
    assert [items[a:b].tolist() for a, b in itertools.pairwise(offsets)] == want
    assert data.inputs(split, width).tolist() == [pad(row[-width:], width) for row in want]
    assert data.max_history == max(len(row) for row in rows("test", lists))


@quick
@given(sequences)
def test_targets_and_sizes(lists: list[list[int]]) -> None:
    data = SequenceData.from_sequences(lists)
    assert data.target("test").tolist() == [row[-1] for row in lists]
    assert data.target("valid").tolist() == [row[-2] for row in lists]
    assert (data.num_users, data.num_interactions) == (len(lists), sum(map(len, lists)))
    assert data.num_items == max(max(row) for row in lists)


@quick
@given(sequences)
def test_popularity_counts_the_training_part(lists: list[list[int]]) -> None:
    data = SequenceData.from_sequences(lists, num_items=9)
    flat = [item for row in rows("train", lists) for item in row]
    assert data.popularity().tolist() == [0.0] + [float(flat.count(item)) for item in range(1, 10)]


def test_no_held_out_item_reaches_training() -> None:
    # Every item is one of a kind, so an item names its place.
    lists = [list(range(100 * u + 1, 100 * u + 1 + length)) for u, length in enumerate((3, 7, 40))]
    data = SequenceData.from_sequences(lists)
    held_out = set(data.target("valid").tolist()) | set(data.target("test").tolist())
    for max_len, step in ((1, 1), (5, 1), (5, 3), (50, 1)):
        assert held_out.isdisjoint(data.train_windows(max_len, step).flatten().tolist())
    assert held_out.isdisjoint(data.inputs("valid", 50).flatten().tolist())
    assert set(data.target("test").tolist()).isdisjoint(data.inputs("test", 50).flatten().tolist())
    assert data.popularity()[sorted(held_out)].sum() == 0


# --- windows --------------------------------------------------------------------------------------------------------


def windows_by_loop(lists: list[list[int]], width: int, step: int, min_len: int) -> list[list[int]]:
    windows: list[list[int]] = []
    for row in rows("train", lists):
        if len(row) < min_len:
            continue
        if len(row) <= width:
            windows.append(pad(row, width))
            continue
        starts = {0}
        start = len(row) - width
        while start > 0:
            starts.add(start)
            start -= step
        windows += [row[start : start + width] for start in sorted(starts)]
    return windows


@quick
@given(sequences, st.integers(1, 8), st.integers(1, 5))
def test_windows_equal_the_loop(lists: list[list[int]], width: int, step: int) -> None:
    data = SequenceData.from_sequences(lists)
    for min_len in range(1, max(len(row) for row in lists) - 1):
        got = data.train_windows(width, step, min_len)
        assert got.dtype == torch.int64
        assert got.tolist() == windows_by_loop(lists, width, step, min_len)


def test_windows_of_too_short_users_are_an_error() -> None:
    with pytest.raises(EnsembleKDError, match="expected a user with 3 training items, got at most 2"):
        SequenceData.from_sequences([[1, 2, 3, 4]]).train_windows(5, min_len=3)


# --- batches --------------------------------------------------------------------------------------------------------


@st.composite
def window_sets(draw: st.DrawFn) -> Tensor:
    """Windows whose first column holds nothing and whose last column names the window."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=40))
    return torch.tensor([pad([99] * (length - 1) + [number], 7) for number, length in enumerate(lengths, start=1)])


@quick
@given(window_sets(), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_each_window_is_in_one_batch_and_batches_are_trimmed(windows: Tensor, size: int, seed: int, epoch: int) -> None:
    plan = BatchPlan(windows, size, seed, epoch)
    batches = list(plan)
    assert len(batches) == len(plan)
    assert sorted(torch.cat([batch[:, -1] for batch in batches]).tolist()) == list(range(1, len(windows) + 1))
    for index, batch in enumerate(batches):
        assert (batch[:, 0] != 0).any()  # no column of padding alone
        whole = windows[plan.rows(index)]
        assert torch.equal(batch, whole[:, -batch.shape[1] :])
        assert int((whole != 0).sum()) == int((batch != 0).sum())


def test_no_window_is_alone_and_other_batches_are_full() -> None:
    for count, size in itertools.product(range(2, 20), range(2, 8)):
        sizes = sorted(map(len, BatchPlan(torch.ones(count, 3, dtype=torch.int64), size, 0, 0)))
        full, rest = divmod(count, size)
        wanted = [size] * full + [rest] * (rest > 0)
        if rest == 1 and full:
            wanted = [size] * (full - 1) + [size + 1]
        assert sizes == sorted(wanted)
    assert [len(batch) for batch in BatchPlan(torch.ones(3, 1, dtype=torch.int64), 1, 0, 0)] == [1, 1, 1]


@quick
@given(window_sets(), st.integers(1, 9), st.integers(0, 50))
def test_a_plan_resumes_where_it_stopped(windows: Tensor, size: int, start: int) -> None:
    whole = list(BatchPlan(windows, size, seed=3, epoch=1))
    rest = list(BatchPlan(windows, size, seed=3, epoch=1).batches(start))
    assert len(rest) == max(len(whole) - start, 0)
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_plans_differ_by_seed_and_epoch_and_leave_the_global_generators_alone() -> None:
    windows = torch.arange(1, 201).unsqueeze(1)
    before = torch.get_rng_state()
    orders = [torch.cat(list(BatchPlan(windows, 8, seed, epoch))) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(orders[0], orders[3])
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[1], orders[2])


def test_batches_do_not_go_by_length() -> None:
    """A batch of short windows alone would let their items count more."""
    windows = synthetic(num_users=1000).train_windows(30)[:640]
    means = [float((batch != 0).sum()) / len(batch) for batch in BatchPlan(windows, 64, 0, 0)]
    assert max(means) < 1.5 * min(means)


def test_a_plan_refuses() -> None:
    windows = torch.ones(4, 2, dtype=torch.int64)
    for bad in (windows.float(), windows[0], windows[:0]):
        with pytest.raises(EnsembleKDError, match=r"BatchPlan: expected windows \(w, l\) int64"):
            BatchPlan(bad, 2, 0, 0)
    for numbers in ((0, 0, 0), (2, -1, 0), (2, 0, -1)):
        with pytest.raises(EnsembleKDError, match=r"BatchPlan: expected .*, a whole number >= "):
            BatchPlan(windows, *numbers)
    with pytest.raises(IndexError):
        BatchPlan(windows, 2, 0, 0)[2]


# --- SequenceData and ItemAttributes --------------------------------------------------------------------------------


def test_sequence_data_refuses() -> None:
    items, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 3])
    cases = [
        ((items.float(), offsets, 3), "flat int64 items on the CPU"),
        ((items, offsets[None], 3), "flat int64 offsets on the CPU"),
        ((items, torch.tensor([0, 2]), 3), r"offsets from 0 to 3"),
        ((items, torch.tensor([0]), 3), r"at least one user"),
        ((items, torch.tensor([0, 1, 3]), 3), r"at least 3 items a user, got 1 of user 0"),
        ((items - 1, offsets, 3), r"item ids in 1\.\.3, got 0\.\.2"),
        ((items, offsets, 2), r"item ids in 1\.\.2, got 1\.\.3"),
        ((items, offsets, 3, ItemAttributes.from_dict({1: [1]}, 2)), "item_attributes of length 3, got 2"),
        ((items, offsets, 3, None, ("a",)), "item_names of length 3, got 1"),
        ((items, offsets, 3, None, None, ("a", "b")), "user_names of length 1, got 2"),
    ]
    for arguments, words in cases:
        with pytest.raises(EnsembleKDError, match=words):
            SequenceData(*arguments)
    for made in ((items.numpy(), offsets, 3), (items, [0, 3], 3)):
        with pytest.raises(EnsembleKDError, match=r"as a tensor, got .*Use SequenceData\.from_sequences"):
            SequenceData(*made)
    data = SequenceData(items, offsets, np.int64(3))
    assert type(data.num_items) is int
    with pytest.raises(EnsembleKDError, match="split 'valid' or 'test', got 'train'"):
        data.target("train")
    with pytest.raises(EnsembleKDError, match="split 'train', 'valid' or 'test', got 'dev'"):
        data.history("dev")  # type: ignore[arg-type]
    for call in (lambda: data.inputs("test", 0), lambda: data.train_windows(0), lambda: data.train_windows(2, 0)):
        with pytest.raises(EnsembleKDError, match=">= 1, got 0"):
            call()
    with pytest.raises(EnsembleKDError, match="at least one sequence"):
        SequenceData.from_sequences([])


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ([[1, 1.5, 2]], r"at least 3 whole numbers per user, got float64 \(3,\) of user 0"),
        ([[1, 2, 3], [1, True, 2]], "at least 3 whole numbers per user, got object .* of user 1"),
        ([[1, 2, [3]]], "at least 3 whole numbers per user, got object"),
        ([["1", "2", "3"]], "at least 3 whole numbers per user, got <U1"),
        ([1, 2, 3], r"at least 3 whole numbers per user, got int64 \(\) of user 0"),
        ([[1, 2]], r"at least 3 whole numbers per user, got int64 \(2,\) of user 0"),
        ([[1, 2, 2**62]], r"item ids in 1\.\.2147483646, got 1\.\.4611686018427387904 of user 0"),
        ([[1, 2, 2**64]], "at least 3 whole numbers per user, got object|item ids in"),
        ([[1, 2, 0]], r"item ids in .*, got 0\.\.2 of user 0"),
    ],
)
def test_sequences_of_anything_else_are_refused(lists: list[list[int]], words: str) -> None:
    with pytest.raises(EnsembleKDError, match=words):
        SequenceData.from_sequences(lists)


def test_sequences_may_be_arrays_and_tensors() -> None:
    rows = [[3, 1, 2], [2, 2, 4, 1]]
    plain = SequenceData.from_sequences(rows)
    for kind in (np.array, torch.tensor, tuple, iter, lambda row: np.array(row, dtype=np.uint8)):
        data = SequenceData.from_sequences([kind(row) for row in rows])
        assert data.checksum == plain.checksum
    assert type(SequenceData.from_sequences(rows, num_items=np.int32(4)).num_items) is int


@quick
@given(st.dictionaries(st.integers(1, 8), st.lists(st.integers(1, 12), max_size=6), min_size=1))
def test_attribute_rows_list_what_each_item_has(attributes: dict[int, list[int]]) -> None:
    if not any(attributes.values()):
        attributes[1] = [1]
    built = ItemAttributes.from_dict(attributes, num_items=8)
    assert built.table.shape == (10, max(len(set(ids)) for ids in attributes.values()))
    assert built.num_attributes == max(max(ids) for ids in attributes.values() if ids)
    assert (len(built), built.num_items) == (8, 8)
    for item, row in enumerate(built.table.tolist()):
        wanted = sorted(attribute - 1 for attribute in set(attributes.get(item, [])))
        assert row == wanted + [-1] * (len(row) - len(wanted))


def test_attributes_refuse() -> None:
    cases = [
        ({3: [1]}, r"item ids in 1\.\.2, got 3"),
        ({0: [1]}, r"item ids in 1\.\.2, got 0"),
        ({1: [0]}, "attribute ids from 1, got 0"),
        ({1: []}, "at least one attribute, got none"),
        ({"1": [1]}, r"item ids in 1\.\.2, got '1'"),
        ({True: [1]}, r"item ids in 1\.\.2, got True"),
        ({1: 5}, "a list of attribute ids per item, got 5 of item 1"),
        ({1: "12"}, "a list of attribute ids per item, got '12' of item 1"),
        ({1: [1.5]}, "a list of attribute ids per item"),
        ({1: [2**62]}, "attribute ids without large gaps, got id 4611686018427387904 among 1"),
        ({1: [2**64]}, "attribute ids from 1, got 18446744073709551616"),
    ]
    for attributes, words in cases:
        with pytest.raises(EnsembleKDError, match=words):
            ItemAttributes.from_dict(attributes, 2)
    with pytest.raises(EnsembleKDError, match="attributes spread over the items, got 600 on item 7"):
        ItemAttributes.from_dict({7: range(1, 601), 8: [1]}, 100_000)
    with pytest.raises(EnsembleKDError, match="-1 throughout the first and the last row"):
        ItemAttributes(1, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(EnsembleKDError, match=r"classes -1\.\.0"):
        ItemAttributes(1, torch.full((3, 1), 5))
    with pytest.raises(EnsembleKDError, match="a table"):
        ItemAttributes(1, torch.zeros(3, 1))


# --- the text layout ------------------------------------------------------------------------------------------------


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


# --- raw files ------------------------------------------------------------------------------------------------------

# (user, item, time). c's last item is rare, d has too few, and without d the item w falls below 2. a's repeat of x at
# time 9 goes; a's z and y share a time and keep the file's order, which no sorting by name would give.
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


# --- the synthetic catalogue ----------------------------------------------------------------------------------------


def test_synthetic_is_a_function_of_its_arguments() -> None:
    one, two, other = synthetic(300, seed=1), synthetic(300, seed=1), synthetic(300, seed=2)
    assert torch.equal(one.items, two.items)
    assert torch.equal(one.offsets, two.offsets)
    assert not torch.equal(one.items[:1000], other.items[:1000])
    assert one.item_attributes is not None
    assert two.item_attributes is not None
    assert torch.equal(one.item_attributes.table, two.item_attributes.table)


def test_synthetic_has_the_promised_form() -> None:
    data = synthetic()
    lengths = data.offsets.diff()
    assert (data.num_users, data.num_items) == (2000, 600)
    assert (int(lengths.min()), int(lengths.max())) == (5, 40)
    assert 10 < lengths.double().mean() < 16
    histories = [data.items[a:b] for a, b in itertools.pairwise(data.offsets)]
    assert all(history.unique().numel() == history.numel() for history in histories)
    top = data.popularity().sort(descending=True).values
    assert top[:60].sum() > 0.25 * top.sum()  # a tenth of the items, over a quarter of the actions
    assert data.item_attributes is not None
    assert ((data.item_attributes.table[1:-1] >= 0).sum(1) == 3).all()


def test_synthetic_optimum_is_far_from_1_and_far_above_popularity() -> None:
    """The chances of the true process, written from its description, are the best ranking there is."""
    size = (2000, 600, 40, 5, 40)
    data = synthetic(*size[:2])
    process = draw_process(np.random.default_rng(0), *size)
    within = (process.cluster == np.arange(40)[:, None]) * process.popularity
    within /= within.sum(1, keepdims=True)
    history = data.inputs("test", data.max_history)
    last, before = history[:, -1].numpy() - 1, history[:, -2].numpy() - 1
    age = ((process.lengths - 1) / process.lengths)[:, None]
    everyone = np.arange(2000)

    def true_chances(first: np.ndarray, final: np.ndarray) -> np.ndarray:
        chances = 0.1 * process.popularity + 0.3 * ((1 - age) * first + age * final) @ within
        chances += 0.5 * within[process.follows[process.cluster[before] % 3, process.cluster[last]]]
        for rank, odds in enumerate((0.5, 0.3, 0.2)):
            chances[everyone, process.successors[last, rank]] += 0.1 * odds
        return chances

    chances = true_chances(process.early, process.late)
    assert chances.sum(1) == pytest.approx(1)
    target = data.target("test")

    def quality(scores: Tensor) -> float:
        return metric_row(ranks(scores, target, history))["NDCG@10"]

    best = quality(torch.from_numpy(np.pad(chances, ((0, 0), (1, 0)))))
    assert 0.2 < best < 0.35
    assert quality(data.popularity().expand(2000, -1)) < best / 3
    # Calibration: where the process gives the chance p, given what the user already had, the item comes with chance p.
    swapped = true_chances(process.late, process.early)[everyone, target.numpy() - 1]
    assert np.log(chances[everyone, target.numpy() - 1]).mean() > np.log(swapped).mean() + 0.05  # tastes drift
    had = np.zeros((2000, 601), dtype=bool)
    had[everyone[:, None], history.numpy()] = True
    chances = np.where(had[:, 1:], 0.0, chances)
    chances /= chances.sum(1, keepdims=True)
    hit = chances[everyone, target.numpy() - 1]
    expected, spread = (chances**2).sum(), math.sqrt((chances**3).sum() - ((chances**2).sum(1) ** 2).sum())
    assert abs(hit.sum() - expected) < 4 * spread


def test_synthetic_attributes_tell_the_cluster() -> None:
    data = synthetic()
    process = draw_process(np.random.default_rng(0), 2000, 600, 40, 5, 40)
    assert data.item_attributes is not None
    first = data.item_attributes.table[1:-1, 0].numpy()
    assert 0.75 < (first == process.cluster).mean() < 0.95


def test_synthetic_refuses() -> None:
    for arguments in ({"num_users": 0}, {"num_items": 79}, {"seed": -1}, {"min_len": 2}, {"max_len": 4}):
        name, value = next(iter(arguments.items()))
        with pytest.raises(EnsembleKDError, match=f"synthetic: expected {name}, a whole number >= .*, got {value}"):
            synthetic(**arguments)
