"""The pictures show the numbers that they are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ensemble_kd import EnsembleKD, EnsembleKDError, fit, plots
from ensemble_kd.data import synthetic
from ensemble_kd.encoders import SASRec
from ensemble_kd.evaluation import evaluate

pytest.importorskip("matplotlib")

DATA = synthetic(num_users=40, num_items=100)


def ensemble(n: int = 2) -> EnsembleKD:
    return EnsembleKD(lambda: SASRec(100, d_model=4, max_len=8, init_std=0.5), n=n)


def test_curves_and_minutes_of_a_run(tmp_path: Path) -> None:
    result = fit(ensemble(), DATA, epochs=2, progress=False)
    picture = plots.curves(result, "MRR")
    (axes,) = picture.figure.axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    for scorer in ("member 0", "member 1", "ensemble"):
        assert list(lines[scorer]) == [entry["valid"][scorer]["MRR"] for entry in result.history]
    assert axes.lines[-1].get_xdata()[0] == result.best_epoch + 1
    picture.save(tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert picture._repr_png_().startswith(b"\x89PNG")

    (axes,) = plots.minutes({"a": result, "b": result}).figure.axes
    first, second = (entry["train_s"] / 60 for entry in result.history)
    assert list(axes.lines[0].get_xdata()) == pytest.approx([first, first + second])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    with pytest.raises(EnsembleKDError, match=r"curves: expected metric 'HR@5', .* got 'ndcg'"):
        plots.curves(result, "ndcg")


def test_members_have_their_metrics() -> None:
    test = evaluate(ensemble(3), DATA, "test")
    (axes,) = plots.members(test, "HR@10").figure.axes
    assert [bar.get_width() for bar in axes.patches] == [row["HR@10"] for row in test.rows.values()]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(test.rows)


def test_overlap_is_one_with_itself_and_jaccards_with_others() -> None:
    model = ensemble()
    (axes,) = plots.overlap(model, DATA, k=5, users=10).figure.axes
    one, other, _, last = (float(text.get_text()) for text in axes.texts)
    assert one == last == 1
    ids = DATA.inputs("test", 8)[:10]
    lists = [model.member(i).recommend(ids, 5).items for i in range(2)]
    same = (lists[0][:, :, None] == lists[1][:, None, :]).sum((1, 2))  # of 5 and 5, so 10 - same in either
    assert other == pytest.approx((same / (10 - same)).mean().item(), abs=0.006)


def test_recommendations_side_by_side() -> None:
    model, ids = ensemble(), torch.tensor([[3, 1, 4]])
    (axes,) = plots.recommendations(model, ids, k=4, item_names=[f"item {i}" for i in range(1, 101)]).figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert texts[0::5] == ["ensemble", "member 0", "member 1"]
    assert texts[1:5] == [f"item {i}" for i in model.recommend(ids, 4).items[0].tolist()]
    assert texts[6:10] == [f"item {i}" for i in model.member(0).recommend(ids, 4).items[0].tolist()]
    with pytest.raises(EnsembleKDError, match="of one user"):
        plots.recommendations(model, ids.expand(2, -1))


def test_notebooks_show_tables() -> None:
    model = ensemble()
    page = model._repr_html_()
    assert f"<td>{sum(p.numel() for p in model.parameters()):,}</td>" in page
    assert "<td>NextItem(views=1" in page
    test = evaluate(model, DATA, "test")
    page = test._repr_html_()
    assert page.count("<tr>") == 4
    for row in test.rows.values():
        assert f"{row['NDCG@10']:.4f}" in page
    best = max(row["NDCG@10"] for row in test.rows.values())
    assert f"<b>{best:.4f}</b>" in page


def test_calibration_counts_the_right_first_choices() -> None:
    model = ensemble()
    (axes,) = plots.calibration(model, DATA, "valid", users=10, bins=1).figure.axes
    diagonal, *lines = axes.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    chosen = torch.linspace(0, 39, 10).round().long()
    ids, targets = DATA.inputs("valid", 8)[chosen], DATA.target("valid")[chosen]
    members = [model.member(i).eval() for i in range(2)]
    for line, scorer in zip(lines, [*members, model.eval()], strict=True):
        p = scorer(ids)[:, 1:].softmax(1)
        assert line.get_xdata()[0] == pytest.approx(p.max(1).values.mean().item(), abs=1e-6)
        assert line.get_ydata()[0] == pytest.approx((p.argmax(1) + 1 == targets).float().mean().item())
    label = axes.get_legend().get_texts()[-1].get_text()
    one = abs(lines[-1].get_xdata()[0] - lines[-1].get_ydata()[0])
    assert float(label.removeprefix("ensemble, ECE ")) >= round(one, 3) - 1e-3  # the mean over bins is no smaller


def test_calibration_of_scores_that_are_certain() -> None:
    model = ensemble()
    with torch.no_grad():  # one item has nearly all of the probability
        model.item_classifier.bias[:, 6] = 50.0
    picture = plots.calibration(model, DATA, users=5, bins=1)
    *_, own = picture.figure.axes[0].lines
    assert own.get_xdata()[0] == pytest.approx(1.0)
    assert own.get_ydata()[0] == (DATA.target("test")[torch.linspace(0, 39, 5).round().long()] == 7).float().mean()
    assert model.training  # as before
