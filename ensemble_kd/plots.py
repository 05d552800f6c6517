"""Pictures of a run and of its members. Each function returns a ``Picture``: shown in notebooks, saved with ``save``.

They need matplotlib, the extra ``plots``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor

from ensemble_kd.data import SequenceData
from ensemble_kd.ensemble import EnsembleKD, check_model_and_data
from ensemble_kd.errors import EnsembleKDError, import_extra
from ensemble_kd.evaluation import Evaluation, calibration_error, held_out_states
from ensemble_kd.internal import choice, instance, shown, whole
from ensemble_kd.training import FitResult

ENSEMBLE, MEMBER, SHARED = "#3f51b5", "#9fa8da", "#e8eaf6"  # indigo, lighter indigo, the background of a shared item
_DPI = 150


@dataclass(frozen=True, eq=False)
class Picture:
    """A drawing, as matplotlib's ``Figure``.

    Args:
        figure: the ``matplotlib.figure.Figure``, to change or to add to.
    """

    figure: Any

    def save(self, path: str | PathLike[str]) -> None:
        """Write the drawing to a file; its name decides the format (.png, .svg, .pdf)."""
        self.figure.savefig(path, dpi=_DPI)

    def _repr_png_(self) -> bytes:
        """Return the drawing for a notebook."""
        data = io.BytesIO()
        self.figure.savefig(data, format="png", dpi=_DPI)
        return data.getvalue()


def curves(result: FitResult, metric: str = "NDCG@10") -> Picture:
    """Draw validation after each epoch: a thin line per member, a thick one for the ensemble, a dot at the best epoch.

    Args:
        result: of ``fit``.
        metric: a metric of ``evaluate``.

    Raises:
        EnsembleKDError: no such metric, or matplotlib is not installed.

    Examples:
        >>> rows = {"member 0": {"NDCG@10": 0.1}, "ensemble": {"NDCG@10": 0.2}}
        >>> entry = {"kind": "epoch", "epoch": 0, "step": 9, "train_s": 1.0, "valid_s": 1.0, "train": {}, "valid": rows}
        >>> picture = curves(FitResult(0, rows, [entry]))
        >>> [line.get_label() for line in picture.figure.axes[0].lines][:2]
        ['member 0', 'ensemble']
    """
    instance("curves", "result", result, FitResult, "Pass what fit returned.")
    picture, axes = _axes("curves")
    epochs = [entry["epoch"] + 1 for entry in result.history]
    for scorer in result.best:
        line = [_value("curves", entry["valid"][scorer], metric) for entry in result.history]
        axes.plot(epochs, line, label=scorer, **_style(scorer))
    best = result.best_epoch
    axes.plot(best + 1, result.history[best]["valid"]["ensemble"][metric], "o", color=ENSEMBLE)
    axes.set(xlabel="epoch", ylabel=f"validation {metric}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return picture


def minutes(results: FitResult | Mapping[str, FitResult], metric: str = "NDCG@10") -> Picture:
    """Draw the ensemble's validation over minutes of training, of one run or of several by name.

    Args:
        results: of ``fit``, such as ``{"one network": a, "three": b}``.
        metric: a metric of ``evaluate``.

    Raises:
        EnsembleKDError: no such metric, or matplotlib is not installed.

    Examples:
        >>> rows = {"ensemble": {"NDCG@10": 0.2}}
        >>> entry = {"kind": "epoch", "epoch": 0, "step": 9, "train_s": 90, "valid_s": 1.0, "train": {}, "valid": rows}
        >>> picture = minutes({"three": FitResult(0, rows, [entry])})
        >>> [float(x) for x in picture.figure.axes[0].lines[0].get_xdata()]
        [1.5]
    """
    named = {"ensemble": results} if isinstance(results, FitResult) else results
    if not (isinstance(named, Mapping) and named and all(isinstance(one, FitResult) for one in named.values())):
        fix = "Pass what fit returned, or a dict of such results by name."
        raise EnsembleKDError("minutes", "results of fit", shown(results), fix)
    picture, axes = _axes("minutes")
    for name, result in named.items():
        spent, line = 0.0, []
        for entry in result.history:
            spent += entry["train_s"] / 60
            line.append((spent, _value("minutes", entry["valid"]["ensemble"], metric)))
        axes.plot(*zip(*line, strict=True), marker=".", label=name)
    axes.set(xlabel="minutes of training", ylabel=f"validation {metric}", xlim=(0, None))
    axes.legend(frameon=False)
    return picture


def members(evaluation: Evaluation, metric: str = "NDCG@10") -> Picture:
    """Draw a bar per scorer: each member, and the ensemble.

    Args:
        evaluation: of ``evaluate``.
        metric: one of its metrics.

    Raises:
        EnsembleKDError: no such metric, or matplotlib is not installed.

    Examples:
        >>> rows = {"member 0": {"MRR": 0.1}, "ensemble": {"MRR": 0.2}}
        >>> [float(bar.get_width()) for bar in members(Evaluation("test", rows, {}), "MRR").figure.axes[0].patches]
        [0.1, 0.2]
    """
    instance("members", "evaluation", evaluation, Evaluation, "Pass what evaluate returned.")
    values = {scorer: _value("members", row, metric) for scorer, row in evaluation.rows.items()}
    picture, axes = _axes("members", height=0.8 + 0.35 * len(values))
    bars = axes.barh(list(values), list(values.values()), color=[_style(scorer)["color"] for scorer in values])
    axes.bar_label(bars, fmt="%.4f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel=metric)
    return picture


def overlap(model: EnsembleKD, data: SequenceData, k: int = 10, users: int = 1000) -> Picture:
    """Draw how alike the members' recommendations are: the mean Jaccard overlap of the k best items, pair by pair.

    Members with an overlap of 1 recommend the same items; their ensemble gains nothing.

    Args:
        model: an ensemble.
        data: users as in its training.
        k: items of each list.
        users: the first so many users are asked.

    Raises:
        EnsembleKDError: a number out of range, or matplotlib is not installed.

    Examples:
        >>> from ensemble_kd.data import synthetic
        >>> from ensemble_kd.encoders import SASRec
        >>> data = synthetic(num_users=20, num_items=100)
        >>> picture = overlap(EnsembleKD(lambda: SASRec(100, d_model=4, max_len=10), n=2), data)
        >>> len(picture.figure.axes[0].texts)  # a number per pair
        4
    """
    check_model_and_data("overlap", model, data)
    instance("overlap", "data", data, SequenceData, "Pass sequences in memory.")
    k, users = whole("overlap", "k", k, least=1), whole("overlap", "users", users, least=1)
    ids = data.inputs("test", model.max_len or data.max_history)[:users].to(model.device)
    lists = [[set(row) for row in model.member(i).recommend(ids, k).lists()] for i in range(len(model))]
    shares = [[_jaccard(one, other) for other in lists] for one in lists]
    picture, axes = _axes("overlap", width=1.5 + 0.9 * len(lists), height=1 + 0.8 * len(lists))
    axes.imshow(shares, vmin=0, vmax=1, cmap="Purples")
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            axes.text(j, i, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.6 else "black")
    names = [f"member {i}" for i in range(len(lists))]
    axes.set(xticks=range(len(lists)), yticks=range(len(lists)), title=f"overlap of the top {k}")
    axes.set_xticklabels(names)
    axes.set_yticklabels(names)
    return picture


def calibration(
    model: EnsembleKD,
    data: SequenceData,
    split: Literal["valid", "test"] = "test",
    *,
    users: int = 4096,
    bins: int = 10,
) -> Picture:
    """Draw how often the first choice is right over how sure the scores are of it, for each member and the ensemble.

    On the dashed diagonal a probability of 0.2 is right in 20 % of cases. Below it the scores are too sure. The label
    of the thick line has the ECE of ``calibration_error``. ``evaluation.calibrate`` mends what this shows: draw it
    before and after.

    Args:
        model: an ensemble, with all its members in this process.
        data: users as in its training.
        split: whose targets count.
        users: so many, spread evenly; fewer take less time.
        bins: points of a line; each is a mean over equally many users.

    Raises:
        EnsembleKDError: a number out of range, or matplotlib is not installed.

    Examples:
        >>> from ensemble_kd.data import synthetic
        >>> from ensemble_kd.encoders import SASRec
        >>> data = synthetic(num_users=20, num_items=100)
        >>> picture = calibration(EnsembleKD(lambda: SASRec(100, d_model=4, max_len=10), n=2), data, bins=4)
        >>> [len(line.get_xdata()) for line in picture.figure.axes[0].lines]  # the diagonal, two members, the ensemble
        [2, 4, 4, 4]
    """
    check_model_and_data("calibration", model, data)
    instance("calibration", "data", data, SequenceData, "Pass sequences in memory.")
    model.place.require_whole("calibration")
    users, bins = whole("calibration", "users", users, least=1), whole("calibration", "bins", bins, least=1)
    choice("calibration", "split", split, ("valid", "test"))
    picture, axes = _axes("calibration", width=5.0, height=4.5)
    points = _confidence(model, *held_out_states(model, data, split, users))
    most = max(float(confidence.max()) for confidence, _ in points.values())
    axes.plot([0, most], [0, most], "--", color="gray", linewidth=1)
    for scorer, (confidence, right) in points.items():
        parts = confidence.argsort().tensor_split(min(bins, len(confidence)))
        line = [(float(confidence[part].mean()), float(right[part].mean())) for part in parts]
        label = f"ensemble, ECE {calibration_error(confidence, right):.3f}" if scorer == "ensemble" else scorer
        axes.plot(*zip(*line, strict=True), marker=".", label=label, **_style(scorer))
    axes.set(xlabel="probability of the first choice", ylabel="share of first choices that are right")
    axes.legend(frameon=False)
    return picture


@torch.no_grad()
def _confidence(model: EnsembleKD, states: Tensor, classes: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the probability (b,) of each scorer's first choice, and 1 where it is the target, by scorer."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    weight, bias = model.classifier_weights()
    for part, wanted in zip(states.split(256, dim=1), classes.split(256), strict=True):
        members = torch.baddbmm(bias[:, None], part, weight.mT)
        mean = (model.factors.to(members.dtype)[:, None, None] * members).mean(dim=0)
        for scorer, each in {**{f"member {i}": one for i, one in enumerate(members)}, "ensemble": mean}.items():
            best = each.float().softmax(dim=1).max(dim=1)
            found.setdefault(scorer, []).append((best.values.cpu(), (best.indices == wanted).cpu().double()))
    return {
        scorer: (torch.cat([confidence for confidence, _ in parts]), torch.cat([right for _, right in parts]))
        for scorer, parts in found.items()
    }


def recommendations(
    model: EnsembleKD, item_ids: Tensor, k: int = 10, item_names: Sequence[str] | None = None
) -> Picture:
    """Draw where one user's recommendations come from: the ensemble's list beside each member's.

    An item of the ensemble's list has a coloured background in the members' lists, too.

    Args:
        model: an ensemble.
        item_ids: (1, l) int64, one user's sequence.
        k: items of each list.
        item_names: ``item_names[i - 1]`` is shown for item i; None: the ids are shown.

    Raises:
        EnsembleKDError: more than one user, or matplotlib is not installed.

    Examples:
        >>> import torch
        >>> from ensemble_kd.encoders import SASRec
        >>> model = EnsembleKD(lambda: SASRec(100, d_model=4, max_len=10), n=2)
        >>> picture = recommendations(model, torch.tensor([[4, 8, 15]]), k=3)
        >>> len(picture.figure.axes[0].texts)  # 3 lists of 3, with their heads
        12
    """
    instance("recommendations", "model", model, EnsembleKD, "Pass a trained ensemble.")
    instance("recommendations", "item_ids", item_ids, Tensor, "Pass item_ids[i : i + 1] for user i.")
    k = whole("recommendations", "k", k, least=1)
    if item_names is not None:
        fix = "Pass a list, item_names[i - 1] for item i."
        instance("recommendations", "item_names", item_names, (list, tuple), fix)
    if item_names is not None and len(item_names) != model.num_items:
        fix = "Pass one name for each item."
        raise EnsembleKDError("recommendations", f"{model.num_items} item_names", len(item_names), fix)
    if item_ids.ndim != 2 or len(item_ids) != 1:
        fix = "Pass item_ids[i : i + 1] for user i."
        raise EnsembleKDError("recommendations", "item_ids (1, l) of one user", tuple(item_ids.shape), fix)
    own = model.recommend(item_ids, k).items[0].tolist()
    lists = {"ensemble": own}
    lists |= {f"member {i}": model.member(i).recommend(item_ids, k).items[0].tolist() for i in range(len(model))}
    picture, axes = _axes("recommendations", width=1.6 * len(lists), height=0.6 + 0.3 * k)
    axes.set(xlim=(-0.5, len(lists) - 0.5), ylim=(k + 0.5, -0.6))
    axes.axis("off")
    for column, (name, items) in enumerate(lists.items()):
        axes.text(column, 0, name, ha="center", va="center", weight="bold")
        for place, item in enumerate(items, start=1):
            box = {"facecolor": SHARED if item in own else "none", "edgecolor": "none", "pad": 3}
            name = item_names[item - 1] if item_names is not None and item else str(item)
            axes.text(column, place, name[:24], ha="center", va="center", bbox=box)
    return picture


def _jaccard(one: list[set[int]], other: list[set[int]]) -> float:
    return sum(len(a & b) / max(1, len(a | b)) for a, b in zip(one, other, strict=True)) / len(one)


def _axes(where: str, width: float = 6.0, height: float = 4.0) -> tuple[Picture, Any]:
    """Return a picture with one pair of axes; without pyplot, so that no global state of matplotlib is touched."""
    figure = import_extra("matplotlib.figure", extra="plots", where=where).Figure((width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return Picture(figure), axes


def _style(scorer: str) -> dict[str, Any]:
    return {"color": ENSEMBLE, "linewidth": 2.5} if scorer == "ensemble" else {"color": MEMBER, "linewidth": 1.0}


def _value(where: str, row: Mapping[str, float], metric: str) -> float:
    choice(where, "metric", metric, tuple(row))
    return row[metric]
