"""Serving against loops over users and items in float64, in other words than the code's."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble_kd import EnsembleKD, EnsembleKDError
from ensemble_kd import serving as served
from ensemble_kd.encoders import BERT4Rec, Caser, GRU4Rec, SASRec
from ensemble_kd.internal import turns

quick = settings(deadline=None, max_examples=60)
V = 14
IDS = torch.tensor([[0, 0, 3, 4, 5], [1, 2, 3, 9, 9], [0, 7, 8, 9, 10]])


@st.composite
def heads(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """States (n, b, d), weights (n, v, d), biases (n, v)."""
    n, b, v, d = (draw(st.integers(1, high)) for high in (3, 4, 9, 3))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    states, weight, bias = (
        torch.randn(n, *shape, generator=rng, dtype=torch.float64) for shape in ((b, d), (v, d), (v,))
    )
    return states, weight, bias


def logit(head: tuple[Tensor, Tensor, Tensor], n: int, b: int, item: int) -> float:
    states, weight, bias = head
    return sum(float(h * w) for h, w in zip(states[n, b], weight[n, item - 1], strict=True)) + float(bias[n, item - 1])


def score(head: tuple[Tensor, Tensor, Tensor], b: int, item: int, among: list[int], how: str) -> float:
    """One item's score by the definitions."""
    members = range(len(head[0]))
    if how == "logits":
        return sum(logit(head, n, b, item) for n in members) / len(members)
    if how == "probabilities":
        mass = [sum(math.exp(logit(head, n, b, other)) for other in among) for n in members]
        return sum(math.exp(logit(head, n, b, item)) / mass[n] for n in members) / len(members)
    better = [sum(logit(head, n, b, other) > logit(head, n, b, item) for other in among) for n in members]
    return -sum(better) / len(members)


@quick
@given(heads(), st.sampled_from(["logits", "probabilities", "ranks"]), st.data())
def test_the_best_items_are_those_of_the_definition(head: Any, how: Any, data: st.DataObject) -> None:
    (_, b, _), v = head[0].shape, head[1].shape[1]
    form = data.draw(st.sampled_from(["all", "one list", "a list each"]))
    pick = st.lists(st.integers(1, v), min_size=1, max_size=v, unique=True)
    shared = data.draw(pick)
    lists = {"all": [list(range(1, v + 1))] * b, "one list": [shared] * b}.get(form) or [
        data.draw(pick) for _ in range(b)
    ]
    width = max(map(len, lists))
    padded = torch.tensor([items + [0] * (width - len(items)) for items in lists])
    candidates = {"all": None, "one list": torch.tensor(shared)}.get(form, padded)
    seen = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, v), min_size=2, max_size=2), min_size=b, max_size=b))
    )
    exclude = data.draw(st.booleans())
    k = data.draw(st.integers(1, width))
    got = served.top_items(*head, k=k, seen=seen if exclude else None, candidates=candidates, aggregate=how)
    for user, among in enumerate(lists):
        allowed = [item for item in among if not (exclude and item in seen[user].tolist())]
        want = sorted((score(head, user, item, among, how) for item in allowed), reverse=True)[:k]
        items, scores = got.items[user].tolist(), got.scores[user].tolist()
        assert items[len(want) :] == [0] * (k - len(want))
        assert scores[len(want) :] == [-math.inf] * (k - len(want))
        assert scores[: len(want)] == pytest.approx(want, abs=1e-9)
        assert len({*items[: len(want)]}) == len(want)
        for item, value in zip(items[: len(want)], scores, strict=False):
            assert item in allowed
            assert value == pytest.approx(score(head, user, item, among, how), abs=1e-9)


@quick
@given(heads(), st.integers(1, 4))
def test_uncertainty_is_that_of_the_definition(head: Any, k: int) -> None:
    (n, b, _), v = head[0].shape, head[1].shape[1]
    k = min(k, v)
    got = served.uncertainty(*head, k=k)

    def entropy(p: list[float]) -> float:
        return -sum(x * math.log(x) for x in p)

    for user in range(b):
        p = []
        for member in range(n):
            mass = [math.exp(logit(head, member, user, item)) for item in range(1, v + 1)]
            p.append([x / sum(mass) for x in mass])
        mean = [sum(x) / n for x in zip(*p, strict=True)]
        best = [set(sorted(range(v), key=lambda j, q=q: -q[j])[:k]) for q in p]  # type: ignore[misc]
        apart = [1 - len(x & y) / len(x | y) for x, y in itertools.combinations(best, 2)]
        assert float(got.entropy[user]) == pytest.approx(entropy(mean), abs=1e-9)
        information = entropy(mean) - sum(map(entropy, p)) / n
        assert float(got.mutual_information[user]) == pytest.approx(max(information, 0), abs=1e-9)
        assert float(got.disagreement[user]) == pytest.approx(sum(apart) / len(apart) if apart else 0, abs=1e-6)


def model_of(kind: str, classifier: str = "linear", **options: Any) -> EnsembleKD:
    encoder = {"sasrec": SASRec, "bert4rec": BERT4Rec}[kind]
    return EnsembleKD(lambda: encoder(V, d_model=8, max_len=6, dropout=0.5), n=3, classifier=classifier, **options)


@pytest.mark.parametrize("classifier", ["linear", "tied"])
@pytest.mark.parametrize("kind", ["sasrec", "bert4rec"])
def test_one_inner_product_serves_the_ensemble(kind: str, classifier: str) -> None:
    model = model_of(kind, classifier).double()
    with torch.no_grad():
        model.item_classifier.bias.normal_()
    found = model.query_vectors(IDS) @ model.item_vectors().T
    assert found.shape == (3, V)
    assert model.training  # and yet no dropout: queries are asked in evaluation mode
    torch.testing.assert_close(found, model.eval()(IDS)[:, 1:], rtol=0, atol=1e-12)
    best = found.topk(5)
    items, scores = model.recommend(IDS, k=5, exclude_seen=False)
    assert torch.equal(items, best.indices + 1)
    torch.testing.assert_close(scores, best.values, rtol=0, atol=1e-12)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("sasrec")
    whole = model.recommend(IDS, k=4), model.uncertainty(IDS)
    each = torch.tensor([[11, 0], [12, 13], [14, 1]])
    whole = (*whole, model.recommend(IDS, k=2, candidates=each))
    monkeypatch.setattr(served, "BLOCK_BYTES", 1)  # a user at a time
    blocks = model.recommend(IDS, k=4), model.uncertainty(IDS), model.recommend(IDS, k=2, candidates=each)
    for one, other in zip(whole, blocks, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("columns", "rows"),
    [(1000, 3145), (12_101, 259), (200_000, 32), (10**6, 16), (10**8, 1)],
    ids=["cache", "still", "32 rows", "memory", "a row"],
)
def test_a_block_fits_the_cache_or_has_some_rows(columns: int, rows: int) -> None:
    """Twelve MiB of float32 scores, or 32 rows, but 64 MiB at most and a row at least."""
    blocks = [block.stop - block.start for block in served._blocks(torch.empty(1, 9000, 4), columns)]
    assert set(blocks[:-1]) == {rows}
    assert sum(blocks) == 9000
    assert blocks[-1] <= rows


def test_candidates_narrow_the_recommendations() -> None:
    model = model_of("sasrec")
    items, _ = model.recommend(IDS, k=3, candidates=torch.tensor([4, 11, 12, 13]))
    assert set(items.flatten().tolist()) <= {4, 11, 12, 13}
    assert 4 not in items[0].tolist()  # seen
    each = torch.tensor([[11, 0], [12, 13], [14, 1]])
    items, scores = model.recommend(IDS, k=2, candidates=each)
    assert [sorted(row) for row in items.tolist()] == [[0, 11], [12, 13], [1, 14]]
    assert scores[0, 1] == -math.inf
    # Logits do not depend on what else there is to choose from.
    every = model.eval()(IDS)
    torch.testing.assert_close(scores[1:], every[1:].gather(1, items[1:]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"aggregate": "votes"}, "aggregate 'logits', 'probabilities' or 'ranks', got 'votes'. Choose one of these."),
        ({"k": 15}, "k of 14 items, a whole number in 1..14, got 15. Pass such a number."),
        (
            {"candidates": torch.tensor([1, 2])},
            "k of 2 candidates, a whole number in 1..2, got 10. Pass such a number.",
        ),
        (
            {"candidates": torch.ones(2, 12, dtype=torch.long)},
            "candidates int64 (c,) or (3, c), got torch.int64 (2, 12). Pass one list of item ids for all, or one each.",
        ),
        (
            {"candidates": torch.tensor([0, 3])},
            "candidates in 1..14 (num_items), got 0..3. Pass item ids.",
        ),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(EnsembleKDError) as error:
        model_of("sasrec").recommend(IDS, **options)
    assert str(error.value) == f"recommend: expected {text}"


@pytest.mark.parametrize("candidates", ["17", [[1, 2], [3]], [1.5, 2.0], [True, False], [], 3, [2**70], {1: 2}])
def test_candidates_of_other_kinds(candidates: Any) -> None:
    with pytest.raises(EnsembleKDError, match=r"recommend: expected candidates int64 \(c,\) or \(3, c\), got"):
        model_of("sasrec").recommend(IDS, k=1, candidates=candidates)


@quick
@given(heads(), st.sampled_from(["logits", "probabilities", "ranks"]), st.booleans(), st.data())
def test_repeated_candidates_count_once(head: Any, how: Any, own: bool, data: st.DataObject) -> None:
    """As a list, and as many kinds of array, with as many repeats as one likes."""
    (_, b, _), v = head[0].shape, head[1].shape[1]
    lists = data.draw(st.lists(st.lists(st.integers(1, v), min_size=4, max_size=4), min_size=b, max_size=b))
    once = [list(dict.fromkeys(row)) for row in lists]
    if not own:
        lists, once = [lists[0]] * b, [once[0]] * b
    kinds = (list, torch.tensor, lambda x: np.array(x, dtype=np.int32))
    given_as = data.draw(st.sampled_from(kinds))(lists if own else lists[0])
    k = min(map(len, once))
    got = served.top_items(*head, k=k, candidates=given_as, aggregate=how)
    for user, among in enumerate(once):
        assert len(set(got.items[user].tolist())) == k
        single = served.top_items(
            head[0][:, user : user + 1], *head[1:], k=k, candidates=torch.tensor(among), aggregate=how
        )
        torch.testing.assert_close(single.scores[0], got.scores[user])


def test_seven_seven_nine() -> None:
    items, _ = model_of("sasrec").recommend(IDS[:2], k=2, candidates=[7, 7, 9], exclude_seen=False)
    assert [sorted(row) for row in items.tolist()] == [[7, 9], [7, 9]]
    with pytest.raises(EnsembleKDError, match=r"k of 2 candidates, a whole number in 1\.\.2, got 3"):
        model_of("sasrec").recommend(IDS, k=3, candidates=[7, 7, 9])


def test_lists_leave_the_missing_items_out() -> None:
    names = tuple("abcdefghijklmn")
    found = model_of("sasrec").recommend(IDS[:1], k=3, candidates=[3, 4, 6])
    assert found.items[0].tolist() == [6, 0, 0]
    assert found.lists() == [[6]]
    assert found.lists(names) == [["f"]]


@pytest.mark.parametrize("aggregate", ["logits", "probabilities", "ranks"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(aggregate: Any, value: float) -> None:
    model = model_of("sasrec")
    with torch.no_grad():
        model.item_classifier.bias[1, 6] = value
    model.recommend(IDS, k=1, candidates=[1, 2], exclude_seen=False, aggregate=aggregate)  # item 7 is not asked for
    calls = [lambda: model.uncertainty(IDS), lambda: model.item_vectors()]
    if not (aggregate == "ranks" and value == math.inf):  # an infinite score has a rank
        calls.append(lambda: model.recommend(IDS, k=1, exclude_seen=False, aggregate=aggregate))
    for call in calls:
        with pytest.raises(EnsembleKDError, match=r"expected finite scores, got NaN or infinite ones in .*diverged"):
            call()
    with torch.no_grad():
        model.encoder.get_parameter("norm.weight")[0] = value
    with pytest.raises(EnsembleKDError, match=r"query_vectors: expected finite scores, got .* in 3 of 3 rows"):
        model.query_vectors(IDS)
    with pytest.raises(EnsembleKDError, match="in 1 of 2 rows"):
        served._finite("here", torch.tensor([[1.0, 2.0], [3.0, value]]))


def test_some_sequences_are_encoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, sizes = torch.arange(1, 41).view(10, 4), []

    def encode(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return rows[None].double()

    monkeypatch.setattr(served, "ENCODER_BYTES", 3 * 4 * 4 * (16 * 4 + 4 * 4))  # three sequences
    assert torch.equal(served.encoded(encode, ids, n=1, d=4, longest=None), ids[None].double())
    assert sizes == [3, 3, 3, 1]
    sizes.clear()
    served.encoded(encode, ids, n=1, d=4, longest=2)  # the encoder reads half of each: more sequences fit
    assert sizes[0] > 3


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_no_column_of_padding_is_encoded(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, shapes = torch.tensor([[0, 0, 0, 1], [1, 2, 3, 4], [0, 0, 0, 5], [0, 0, 6, 7], [0, 1, 2, 8]]), []

    def encode(some: Tensor) -> Tensor:
        shapes.append(tuple(some.shape))
        return some[None, :, -1:].double()

    monkeypatch.setattr(served, "_TOGETHER", rows)
    found = served.encoded(encode, ids, n=1, d=1, longest=None)
    assert found.squeeze().tolist() == [1, 4, 5, 7, 8]  # in their order
    expected = {1: [1, 1, 2, 3, 4], 2: [1, 3, 4], 3: [2, 4], 7: [4]}
    assert [columns for _, columns in shapes] == expected[rows]
    assert all(r <= rows for r, _ in shapes)


@pytest.mark.parametrize("encoder", [SASRec, BERT4Rec, GRU4Rec, Caser])
def test_answers_do_not_depend_on_how_far_a_sequence_is_padded(encoder: type) -> None:
    model = EnsembleKD(lambda: encoder(V, d_model=8, max_len=9, dropout=0.5), n=2).double()
    wide = torch.cat([torch.zeros(len(IDS), 3, dtype=torch.int64), IDS], dim=1)
    found = model.query_vectors(IDS)
    for other in (model.query_vectors(wide), torch.cat([model.query_vectors(row[None]) for row in IDS])):
        torch.testing.assert_close(other, found, rtol=0, atol=1e-12)


def test_ids_of_other_kinds_are_refused_with_the_way_out() -> None:
    for ids, got in ((IDS.numpy(), "ndarray"), (IDS.tolist(), "list")):
        with pytest.raises(EnsembleKDError, match=rf"got {got}\. Convert them: torch\.as_tensor\(item_ids\)"):
            model_of("sasrec").recommend(ids)
    with pytest.raises(EnsembleKDError, match=r"got torch\.int32\. Convert them: item_ids\.long\(\)"):
        model_of("sasrec").recommend(IDS.int())


@pytest.mark.parametrize("kind", ["sasrec", "bert4rec"])
def test_encoding_in_blocks_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind).double()
    whole = model.recommend(IDS, k=4), model.uncertainty(IDS), (model.query_vectors(IDS),)
    monkeypatch.setattr(served, "ENCODER_BYTES", 1)  # a user at a time
    blocks = model.recommend(IDS, k=4), model.uncertainty(IDS), (model.query_vectors(IDS),)
    for one, other in zip(itertools.chain(*whole), itertools.chain(*blocks), strict=True):
        torch.testing.assert_close(one, other)
    assert model.training


@pytest.mark.parametrize("training", [True, False])
def test_many_threads_get_the_answers_of_one(training: bool) -> None:
    """And a model in training mode stays in it, without dropout in any answer."""
    model = model_of("sasrec").train(training)
    users = [IDS[i % 3 : i % 3 + 1, i % 2 :] for i in range(60)]
    alone = [model.recommend(ids, k=4) for ids in users]
    modes: set[bool] = set()
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            for found, (items, scores) in zip(
                pool.map(lambda ids: model.recommend(ids, k=4), users), alone, strict=True
            ):
                modes.add(model.training)
                assert torch.equal(found.items, items)
                assert torch.equal(found.scores, scores)
    finally:
        sys.setswitchinterval(switching)
    assert modes == {training}


MANY = 100_000 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 10_000
PEAK = """
import re, torch
from pathlib import Path
from ensemble_kd import EnsembleKD
from ensemble_kd.encoders import SASRec
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
model = EnsembleKD(lambda: SASRec(2000, ENCODER), n=3)
ids = torch.randint(1, 2001, (USERS, 200))
model.recommend(ids[:2])
before = peak()
model.recommend(ids)
print(peak() - before)
"""


def test_states_of_all_positions_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest states are a view of those of all positions, 100 times as large."""
    monkeypatch.setattr(served, "ENCODER_BYTES", 1)  # a sequence at a time
    kept: list[weakref.ref[Any]] = []

    def newest(ids: Tensor) -> Tensor:
        assert sum(each() is not None for each in kept) <= 1
        every = torch.randn(2, len(ids), 100, 4)
        kept.append(weakref.ref(every.untyped_storage()))
        view: Tensor = every[:, :, -1]
        view.whole = every.untyped_storage()  # type: ignore[attr-defined]
        return view

    found = served.encoded(newest, torch.ones(6, 100, dtype=torch.int64), n=2, d=4, longest=None)
    assert found.shape == (2, 6, 4)
    assert len(kept) == 6
    assert all(each() is None for each in kept[:-1])


def test_small_requests_take_turns_and_large_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, at_once, most = EnsembleKD(lambda: SASRec(V, d_model=4, max_len=5), 2), 0, []
    newest = model._newest

    def slow(*args: Any, **options: Any) -> Any:
        nonlocal at_once
        at_once += 1
        time.sleep(0.02)
        most.append(at_once)
        at_once -= 1
        return newest(*args, **options)

    monkeypatch.setattr(model, "_newest", slow)
    for rows, together in ((1, False), (turns.LARGEST + 1, True)):
        most.clear()
        ids = torch.ones(rows, 2, dtype=torch.int64)
        threads = [threading.Thread(target=model.recommend, args=(ids, 2)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(most) == 4
        assert (max(most) > 1) is together


@pytest.mark.parametrize(("ask", "by"), [("recommend", "addmm"), ("uncertainty", "baddbmm")])
def test_the_next_request_is_encoded_beside_the_product_with_all_items(
    monkeypatch: pytest.MonkeyPatch, ask: str, by: str
) -> None:
    model, ids = EnsembleKD(lambda: SASRec(V, d_model=4, max_len=5), 2), torch.tensor([[1, 2]])
    asked = partial(getattr(model, ask), k=2)
    alone, product, newest = asked(ids), getattr(torch, by), model._newest
    in_product, encoded, waited = threading.Event(), threading.Event(), []

    def slow(*args: Any) -> torch.Tensor:
        in_product.set()
        waited.append(encoded.wait(20))
        return product(*args)

    def second(*args: Any, **options: Any) -> torch.Tensor:
        if in_product.is_set():
            encoded.set()
        return newest(*args, **options)

    monkeypatch.setattr(served, "_ASIDE", 0)
    monkeypatch.setattr(torch, by, slow)
    monkeypatch.setattr(model, "_newest", second)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(asked(ids))) for _ in range(2)]
    threads[0].start()
    assert in_product.wait(20)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert waited == [True, True]
    for each in found:
        assert all(torch.equal(*pair) for pair in zip(each, alone, strict=True))


def test_a_small_product_is_not_worth_two_changes_of_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, product, has_turn = EnsembleKD(lambda: SASRec(V, d_model=4, max_len=5), 2), torch.addmm, []

    def watched(*args: Any) -> torch.Tensor:
        has_turn.append(turns._turn.locked())
        return product(*args)

    monkeypatch.setattr(torch, "addmm", watched)
    for least in (2 * V * 4 + 1, 2 * V * 4):
        monkeypatch.setattr(served, "_ASIDE", least)
        model.recommend(torch.tensor([[1, 2]]), 2)
    assert has_turn == [True, False]
    assert not turns._turn.locked()


def test_who_stepped_aside_has_the_turn_again_also_after_an_error() -> None:
    class Model:
        @turns.in_turn
        def outer(self, item_ids: list[int]) -> list[bool]:
            seen = self.inner(item_ids)
            with pytest.raises(ValueError, match="within"), turns.aside():
                raise ValueError("within")
            return [*seen, turns._turn.locked()]

        @turns.in_turn
        def inner(self, item_ids: list[int]) -> list[bool]:
            before = turns._turn.locked()
            with turns.aside(), turns.aside():
                meanwhile = turns._turn.locked()
            return [before, meanwhile, turns._turn.locked()]

        @turns.in_turn
        def failing(self, item_ids: list[int]) -> None:
            raise ValueError("raised")

    model = Model()
    assert model.outer([1]) == [True, False, True, True]
    assert not turns._turn.locked()
    with pytest.raises(ValueError, match="raised"):
        model.failing([1])
    assert not turns._turn.locked()
    with turns.aside():  # in no turn there is nothing to let go of
        assert not turns._turn.locked()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_fork_in_the_middle_of_a_request_is_not_stuck() -> None:
    code = """
import os, threading, torch
from ensemble_kd import EnsembleKD
from ensemble_kd.encoders import SASRec
from ensemble_kd.internal import turns
torch.set_num_threads(1)
model, ids = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=4), 2), torch.tensor([[1, 2]])
taken, over = threading.Event(), threading.Event()
def hold():
    with turns.taken():
        taken.set()
        over.wait()
threading.Thread(target=hold).start()
taken.wait()
child = os.fork()
if not child:
    model.recommend(ids, 2)
    os._exit(0)
status = os.waitpid(child, 0)[1]
over.set()
print(status)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout == "0\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
@pytest.mark.parametrize(
    ("users", "encoder", "most"),
    [
        (1500, "d_model=64, max_len=200", 512),  # 1.6 GiB when all were encoded at once
        (MANY, "d_model=8, num_layers=1, max_len=200", 1024),
    ],
)
def test_memory_of_recommendations_does_not_grow_with_users(users: int, encoder: str, most: float) -> None:
    """In MiB beyond the model and its first call, of a process of its own."""
    code = PEAK.replace("USERS", str(users)).replace("ENCODER", encoder)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < most


def test_what_is_no_item_is_passed_over_among_the_seen() -> None:
    head = torch.ones(2, 1, 3), torch.randn(2, V, 3), torch.zeros(2, V)
    whole = served.top_items(*head, k=V)
    assert torch.equal(served.top_items(*head, k=V, seen=torch.tensor([[0, V + 1, V + 2]])).items, whole.items)
    found = served.top_items(*head, k=V, seen=torch.tensor([[V + 1, 0, V, 1, V]])).lists()
    assert set(found[0]) == set(range(2, V))
