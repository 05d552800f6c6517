"""Names in, names out: against ``EnsembleKD.recommend`` on numbers, in memory and in a Parquet file."""

from __future__ import annotations

import random
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble_kd import EnsembleKD, fit
from ensemble_kd.data import MappedSequences, SequenceData, Vocabulary, write_sequences
from ensemble_kd.encoders import SASRec
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.export import load, save
from ensemble_kd.growing import grow
from ensemble_kd.recommending import NamedRecommendations, answers, recommend, recommend_all, recommend_for

RNG = random.Random(0)
ITEMS = [f"item-{i}" for i in range(30)]
HISTORIES = {f"u{u}": RNG.sample(ITEMS, RNG.randint(3, 12)) for u in range(40)}
TABLE = {
    "user_id": [user for user, row in HISTORIES.items() for _ in row],
    "item_id": [item for row in HISTORIES.values() for item in row],
    "timestamp": [t for row in HISTORIES.values() for t in range(len(row))],
}
DATA = SequenceData.from_interactions(TABLE)


def factory(num_items: int = DATA.num_items) -> SASRec:
    return SASRec(num_items, d_model=4, max_len=6, init_std=0.3)


@pytest.fixture(scope="module")
def model() -> EnsembleKD:
    return EnsembleKD(factory, 2, vocabulary=DATA.vocabulary).eval()


def by_hand(model: EnsembleKD, history: list[Any], k: int, **options: Any) -> list[Any]:
    assert model.vocabulary is not None
    ids = torch.tensor([model.vocabulary.numbers(history)])
    return model.recommend(ids, k, **options).lists(model.vocabulary.names)[0]


def test_histories_of_names(model: EnsembleKD) -> None:
    found = recommend(model, HISTORIES, k=4)
    assert found.lists() == {user: by_hand(model, row, 4) for user, row in HISTORIES.items()}
    assert found.rank[:4] == [1, 2, 3, 4]
    assert found.score[:4] == sorted(found.score[:4], reverse=True)
    counted = recommend(model, list(HISTORIES.values()), k=4)
    assert list(counted.lists()) == list(range(40))
    assert counted.item_id == found.item_id
    some = ITEMS[:6]
    assert recommend(model, HISTORIES, k=2, candidates=some, exclude_seen=False, aggregate="ranks").lists() == {
        user: by_hand(
            model,
            row,
            2,
            candidates=model.vocabulary.numbers(some),
            exclude_seen=False,
            aggregate="ranks",  # type: ignore[union-attr]
        )
        for user, row in HISTORIES.items()
    }


def test_users_of_the_data_after_all_of_their_items(model: EnsembleKD) -> None:
    wanted = ["u17", "u4"]
    found = recommend_for(model, wanted, DATA, k=3)
    assert found.lists() == {user: by_hand(model, HISTORIES[user], 3) for user in wanted}
    assert recommend_for(model, [], DATA).lists() == {}


def test_users_that_training_has_not_seen_and_other_numbers(model: EnsembleKD) -> None:
    """Names connect data and model: this data numbers its items in another way."""
    table = {"user_id": ["new", "new", "newer"], "item_id": [ITEMS[7], ITEMS[3], ITEMS[29]], "timestamp": [1, 2, 0]}
    data = SequenceData.from_interactions(table, holdout="none")
    assert data.item_names != DATA.item_names
    expected = {"new": by_hand(model, [ITEMS[7], ITEMS[3]], 5), "newer": by_hand(model, [ITEMS[29]], 5)}
    assert recommend_for(model, ["new", "newer"], data, k=5).lists() == expected


def test_unknown_names_come_in_one_error_or_are_dropped(model: EnsembleKD, tmp_path: Path) -> None:
    with pytest.raises(EnsembleKDError, match="recommend: expected known items, got 2 unknown: 'x', 'y'"):
        recommend(model, [["x", ITEMS[0]], ["y", "x"]])
    found = recommend(model, {"a": ["x", ITEMS[0]], "b": ["y", "x"]}, k=2, unknown="drop")
    assert found.lists() == {"a": by_hand(model, [ITEMS[0]], 2)}
    with pytest.raises(EnsembleKDError, match="recommend_for: expected known users, got 1 unknown: 'u99'"):
        recommend_for(model, ["u1", "u99"], DATA)
    assert list(recommend_for(model, ["u1", "u99"], DATA, unknown="drop").lists()) == ["u1"]
    table = {"user_id": ["a", "a", "b"], "item_id": ["x", ITEMS[0], "y"], "timestamp": [1, 2, 3]}
    data = SequenceData.from_interactions(table, holdout="none")
    with pytest.raises(EnsembleKDError, match="recommend_for: expected known items, got 2 unknown: 'x', 'y'"):
        recommend_for(model, ["a", "b"], data)
    assert recommend_for(model, ["a", "b"], data, k=2, unknown="drop").lists() == found.lists()
    with pytest.raises(EnsembleKDError, match="recommend_for: expected known items, got 1 unknown: 'y'"):
        recommend_for(model, ["b"], data)
    pytest.importorskip("pyarrow")
    with pytest.raises(EnsembleKDError, match="recommend_all: expected known items, got 2 unknown"):
        recommend_all(model, data, tmp_path / "r.parquet", progress=False)
    assert list(tmp_path.iterdir()) == []
    other = SequenceData.from_interactions({**table, "item_id": ["x", "y", "z"]}, holdout="none")
    with pytest.raises(EnsembleKDError, match="users with items that the model knows, got none"):
        recommend_all(model, other, tmp_path / "r.parquet", progress=False, unknown="drop")


def test_names_on_one_side_alone(model: EnsembleKD) -> None:
    plain = SequenceData(DATA.items, DATA.offsets, DATA.num_items)
    with pytest.raises(EnsembleKDError, match="names in model and data, or in neither, got data without names"):
        recommend_for(model, [0], plain)
    nameless = EnsembleKD(factory, 2).eval()
    with pytest.raises(EnsembleKDError, match="got a model without names"):
        recommend_for(nameless, ["u1"], DATA)
    assert recommend_for(nameless, [3], plain, k=2).lists() == {
        3: nameless.recommend(plain.inputs("all", 12)[3:4], 2).lists()[0]
    }


@pytest.mark.parametrize(
    ("histories", "options", "words"),
    [
        ([[]], {}, "a history of one item or more, got none of user 0"),
        ("item-1", {}, "histories, a list of names per user, got 'item-1'"),
        (["item-1"], {}, "a list of names per user, got 'item-1' of user 0"),
        ([["item-1"]], {"k": 0}, "k, a whole number >= 1"),
        ([["item-1"]], {"k": 99}, "k of 30 items"),
        ([["item-1"]], {"unknown": "keep"}, "unknown 'error' or 'drop'"),
        ([["item-1"]], {"candidates": ["x"]}, "1 unknown: 'x'"),
        ([["item-1"]], {"aggregate": "max"}, "aggregate 'logits'"),
    ],
)
def test_what_cannot_be_answered(model: EnsembleKD, histories: Any, options: Any, words: str) -> None:
    with pytest.raises(EnsembleKDError, match=words):
        recommend(model, histories, **options)


def test_fewer_items_than_k(model: EnsembleKD) -> None:
    assert len(recommend(model, [ITEMS[:28]], k=5)) == 2


@pytest.mark.parametrize("together", [7, 1024])
def test_a_file_of_all_users(model: EnsembleKD, tmp_path: Path, monkeypatch: Any, together: int, capsys: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(answers, "TOGETHER", together)
    path = recommend_all(model, DATA, tmp_path / "new" / "r.parquet", k=4)
    assert "recommend_all: 100%" in capsys.readouterr().err
    table = parquet.read_table(path)
    assert table.column_names == ["user_id", "item_id", "rank", "score"]
    assert parquet.ParquetFile(path).num_row_groups == -(-40 // together)
    found = NamedRecommendations(**table.to_pydict())
    expected = recommend(model, HISTORIES, k=4)
    assert found.lists() == expected.lists()
    assert found.rank == expected.rank
    assert found.score == pytest.approx(expected.score, rel=1e-4)
    assert [p.name for p in path.parent.iterdir()] == ["r.parquet"]


def test_a_failure_leaves_the_file_as_it_was(model: EnsembleKD, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "r.parquet"
    path.write_bytes(b"old")
    monkeypatch.setattr(answers, "TOGETHER", 7)
    asked = []

    def fails(*arguments: Any, **options: Any) -> Any:
        asked.append(1)
        if len(asked) == 3:
            raise RuntimeError("no more")
        return EnsembleKD.recommend(model, *arguments, **options)

    monkeypatch.setattr(model, "recommend", fails, raising=False)
    with pytest.raises(RuntimeError, match="no more"):
        recommend_all(model, DATA, path, progress=False)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]


def test_all_users_on_disk(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [DATA.items[a:b].tolist() for a, b in zip(DATA.offsets[:-1], DATA.offsets[1:], strict=True)]
    write_sequences(tmp_path / "data", rows, num_items=DATA.num_items)
    mapped = MappedSequences(tmp_path / "data", block=20)
    model = EnsembleKD(factory, 2).eval()
    table = parquet.read_table(recommend_all(model, mapped, tmp_path / "r.parquet", k=3, progress=False))
    assert NamedRecommendations(**table.to_pydict()).lists() == {
        u: model.recommend(torch.tensor([row]), 3).lists()[0] for u, row in enumerate(rows)
    }
    with pytest.raises(EnsembleKDError, match="Use recommend_all for data on disk"):
        recommend_for(model, [1], mapped)  # type: ignore[arg-type]


def test_tables_of_each_library_and_ids_of_any_type(tmp_path: Path) -> None:
    pa, pl, pd = (pytest.importorskip(name) for name in ("pyarrow", "polars", "pandas"))
    names: Any
    for names in (list(range(100, 130)), [uuid.UUID(int=i) for i in range(30)]):
        model = EnsembleKD(factory, 2, vocabulary=Vocabulary(names)).eval()
        found = recommend(model, {names[3]: names[:4], names[0]: names[5:6]}, k=2)
        assert isinstance(found.to_pandas(), pd.DataFrame)
        assert found.to_pandas()["item_id"].tolist() == found.item_id
        assert found.to_arrow().column("rank").type == pa.int32()
        shown = found.to_arrow().column("item_id").to_pylist()
        assert shown == [str(name) if isinstance(name, uuid.UUID) else name for name in found.item_id]
        if isinstance(names[0], int):
            assert found.to_polars().equals(pl.DataFrame(found.columns()))
    assert len(repr(recommend(model, {1: names[:4], 2: names[:9]}, k=9)).splitlines()) == 12


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_from_a_table_to_a_file_and_on_tomorrow(kind: str, tmp_path: Path) -> None:
    """Train on everything, save, load, recommend; then new users and items, grow, and go on."""
    pytest.importorskip("safetensors")
    library, parquet = pytest.importorskip(kind), pytest.importorskip("pyarrow.parquet")
    data = SequenceData.from_interactions(library.DataFrame(TABLE), holdout="none")
    model = EnsembleKD(lambda: factory(data.num_items), 2)
    fit(model, data, epochs=1, progress=False)
    loaded = load(save(model, tmp_path / "m.safetensors"), lambda: factory(data.num_items))
    table = parquet.read_table(recommend_all(loaded, data, tmp_path / "r.parquet", progress=False)).to_pydict()
    assert NamedRecommendations(**table).lists() == recommend(model, HISTORIES).lists()
    tomorrow = library.DataFrame(
        {"user_id": ["u1", "u99", "u99"], "item_id": ["brand-new", ITEMS[0], "brand-new"], "timestamp": [1, 2, 3]}
    )
    both = library.concat([library.DataFrame(TABLE), tomorrow])
    later = SequenceData.from_interactions(both, vocabulary=loaded.vocabulary, holdout="none")
    grown = grow(loaded, later)
    fit(grown, later.newest(7), epochs=1, progress=False)
    assert "brand-new" in {item for item in recommend(grown, [[ITEMS[0]]], k=30).item_id}
    assert (
        recommend_for(grown, ["u99"], later, k=3).lists()
        == recommend(grown, {"u99": [ITEMS[0], "brand-new"]}, k=3).lists()
    )
