"""``calibrate``: weights and temperatures of members that make the ensemble's probabilities fit held-out targets.

With z_i the logits of member i and a_i = weight_i / temperature_i / n, the ensemble gives softmax(Σ_i a_i z_i). The
mean of -log of the targets' probabilities is convex in the a_i, so a few Newton steps find its minimum over a_i >= 0.
Source: Hinton, "Training products of experts by minimizing contrastive divergence", 2002 (the product); Guo et al.,
"On calibration of modern neural networks", ICML 2017 (one temperature, and the ECE).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ensemble_kd.data import SequenceData
from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.evaluation.ranking import LONGEST, TILE_BYTES, Exclude, evaluate
from ensemble_kd.internal import instance, tensor, whole

_METRIC = "NDCG@10"
_BINS = 15  # of the expected calibration error
_STEPS, _GAIN = 30, 1e-9  # Newton steps at most; a step that gains less is the last
_SMALLEST = 1e-4  # the smallest 1 / temperature of a member by itself


class Quality(NamedTuple):
    """How good an ensemble's probabilities are."""

    ndcg: float  # NDCG@10 over all users of the split
    log_loss: float  # mean of -log of the target's probability, in nats
    calibration_error: float  # ECE: |confidence - accuracy| of the first choice, a mean over 15 bins of confidence


class Calibration(NamedTuple):
    """The result of ``calibrate``."""

    weights: Tensor  # (n,) with a mean of 1
    temperatures: Tensor  # (n,)
    before: Quality  # with weights and temperatures of 1
    after: Quality

    def __str__(self) -> str:
        lines = [
            f"weights       {'  '.join(f'{x:.3f}' for x in self.weights.tolist())}",
            f"temperatures  {'  '.join(f'{x:.3f}' for x in self.temperatures.tolist())}",
            f"{'':<14}{'uniform':>9}{'now':>9}",
        ]
        for name, old, new in zip((_METRIC, "log loss", "ECE"), self.before, self.after, strict=True):
            lines.append(f"{name:<14}{old:>9.4f}{new:>9.4f}")
        return "\n".join(lines)


@torch.no_grad()
def calibrate(
    model: EnsembleKD,
    data: SequenceData,
    split: Literal["valid", "test"] = "valid",
    *,
    users: int = 4096,
    exclude: Exclude = "history",
) -> Calibration:
    """Fit a weight and a temperature per member on held-out targets, and set them in the model with ``weigh``.

    Afterwards ``model(ids)[:, 1:].softmax(1)`` is calibrated, and scores, recommendations, vectors and exports count
    the members by weight / temperature: one that knows little has a high temperature. On the split neither the log loss
    nor NDCG@10 is worse than with uniform weights: if the best weights lower NDCG@10, only a common temperature is
    fitted, which changes no order.

    Args:
        model: trained, with all its members in this process.
        data: of as many items.
        split: whose targets are fitted; evaluate on another one.
        users: fit on so many users, spread evenly; fewer take less time.
        exclude: items that NDCG@10 does not rank, see ``evaluate``. Probabilities are over all items.

    Returns:
        Weights, temperatures, and the quality before and after.

    Raises:
        EnsembleKDError: members in other processes, or what ``evaluate`` refuses.

    Examples:
        >>> from ensemble_kd.data import synthetic
        >>> from ensemble_kd.encoders import GRU4Rec, SASRec
        >>> data = synthetic(num_users=40, num_items=100)
        >>> model = EnsembleKD([lambda: SASRec(100, d_model=4, max_len=9), lambda: GRU4Rec(100, d_model=4, max_len=9)])
        >>> found = calibrate(model, data)
        >>> found.after.log_loss <= found.before.log_loss, torch.equal(found.weights, model.weights)
        (True, True)
    """
    instance("calibrate", "model", model, EnsembleKD, "Pass a trained ensemble.")
    instance("calibrate", "data", data, SequenceData, "Pass sequences in memory.")
    model.place.require_whole("calibrate")
    users = whole("calibrate", "users", users, least=1)
    n = len(model)
    model.weigh(torch.ones(n))
    ndcg = evaluate(model, data, split, exclude=exclude).rows["ensemble"][_METRIC]
    problem = _Problem(model, data, split, users)
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    before = Quality(ndcg, *problem.quality(uniform))
    own = torch.cat([_minimum(problem.of_member(i), torch.ones(1, dtype=torch.float64)) for i in range(n)])
    own = own.clamp(min=_SMALLEST)  # 1 / temperature of each member by itself
    best = _minimum(problem.of_all, uniform)
    if not float(best.sum()) > 0:  # members that know less than nothing: the best of their mixtures is uniform scores
        best = best.new_full((n,), _SMALLEST)
    weights, temperatures = _shares(best, own)
    model.weigh(weights, temperatures)
    ndcg = evaluate(model, data, split, exclude=exclude).rows["ensemble"][_METRIC]
    if ndcg < before.ndcg:
        scale = _minimum(problem.along(uniform), torch.ones(1, dtype=torch.float64))
        ndcg, best = before.ndcg, scale * uniform
        model.weigh(torch.ones(n), 1 / scale.expand(n).clamp(min=_SMALLEST))
    after = Quality(ndcg, *problem.quality(best))
    return Calibration(model.weights.clone(), model.temperatures.clone(), before, after)


def _shares(factors: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights with a mean of 1, and temperatures in the ratio of the members' own, with the given factors."""
    n = len(factors)
    products = factors / own
    total = products.sum()
    return n * products / total, 1 / (own * total)


_Function = Callable[[Tensor], tuple[float, Tensor, Tensor]]  # factors -> value, gradient, Hessian


def held_out_states(
    model: EnsembleKD, data: SequenceData, split: Literal["valid", "test"], users: int
) -> tuple[Tensor, Tensor]:
    """Return the members' states (n, r, d) before held-out targets of so many users, and the targets' classes (r,).

    The users are spread evenly over all that have a target.

    Examples:
        >>> from ensemble_kd.data import synthetic
        >>> from ensemble_kd.encoders import SASRec
        >>> data = synthetic(num_users=20, num_items=100)
        >>> model = EnsembleKD(lambda: SASRec(100, d_model=4, max_len=10), n=2)
        >>> states, classes = held_out_states(model, data, "test", 5)
        >>> states.shape, classes.shape
        (torch.Size([2, 5, 4]), torch.Size([5]))
    """
    room = LONGEST if model.max_len is None else max(1, model.max_len - model.objective.query_columns)
    inputs, target = data.inputs(split, min(room, data.max_history)), data.target(split)
    chosen = torch.linspace(0, len(inputs) - 1, min(users, len(inputs))).round().long()
    device = model.device
    with torch.no_grad():
        parts = [model.query_states(ids.to(device), training=False) for ids in inputs[chosen].split(256)]
    return torch.cat(parts, dim=1), target[chosen].to(device) - 1


class _Problem:
    """The log loss of held-out targets as a function of the members' factors."""

    def __init__(self, model: EnsembleKD, data: SequenceData, split: Literal["valid", "test"], users: int) -> None:
        self.states, self.classes = held_out_states(model, data, split, users)
        self.weight, self.bias = model.classifier_weights()

    def logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the members' logits (n, r, v) of some users, and their classes (r,)."""
        n, total, _ = self.states.shape
        row = 4 * n * self.weight.shape[1]
        rows = max(1, 4 * TILE_BYTES.get(self.states.device.type, TILE_BYTES["cuda"]) // row)
        for start in range(0, total, rows):
            states, classes = self.states[:, start : start + rows], self.classes[start : start + rows]
            yield torch.baddbmm(self.bias[:, None], states, self.weight.mT), classes

    def of_all(self, factors: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the log loss, its gradient (n,) and its Hessian (n, n) at the members' factors (n,)."""
        return self._moments(factors, lambda z: z)

    def of_member(self, i: int) -> _Function:
        """Return the log loss of a member by itself, as a function of 1 / its temperature."""
        return lambda factors: self._moments(factors, lambda z: z[i : i + 1])

    def along(self, direction: Tensor) -> _Function:
        """Return the log loss as a function of a common factor of all."""
        return lambda factors: self._moments(
            factors, lambda z: torch.einsum("n, n r v -> r v", direction.to(z), z)[None]
        )

    def _moments(self, factors: Tensor, select: Callable[[Tensor], Tensor]) -> tuple[float, Tensor, Tensor]:
        n, count = len(factors), len(self.classes)
        value, gradient = 0.0, torch.zeros(n, dtype=torch.float64)
        hessian = torch.zeros(n, n, dtype=torch.float64)
        for every, classes in self.logits():
            z = select(every)
            joint = torch.einsum("n, n r v -> r v", factors.to(z), z)
            top = joint.log_softmax(dim=1)
            p, row = top.exp(), torch.arange(len(classes), device=z.device)
            value -= float(top[row, classes].cpu().double().sum())
            mean = torch.einsum("r v, n r v -> n r", p, z)
            gradient += (mean - z[:, row, classes]).cpu().double().sum(dim=1)
            centred = z - mean[:, :, None]
            hessian += torch.einsum("n r v, m r v -> n m", centred * p, centred).cpu().double()
        return value / count, gradient / count, hessian / count

    def quality(self, factors: Tensor) -> tuple[float, float]:
        """Return the log loss and the expected calibration error."""
        losses, confidence, right = [], [], []
        for z, classes in self.logits():
            log_p = torch.einsum("n, n r v -> r v", factors.to(z), z).log_softmax(dim=1)
            losses.append(-log_p.gather(1, classes[:, None])[:, 0])
            best = log_p.max(dim=1)
            confidence.append(best.values.exp())
            right.append(best.indices == classes)
        return float(torch.cat(losses).cpu().double().mean()), calibration_error(
            torch.cat(confidence), torch.cat(right)
        )


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Return the ECE: |mean confidence - accuracy|, a mean over bins of equal width that weighs predictions alike.

    Args:
        confidence: (b,) probabilities of the first choices.
        right: (b,) 1 if the first choice is the target, else 0.

    Raises:
        EnsembleKDError: tensors that are not such lists.

    Examples:
        >>> calibration_error(torch.tensor([0.75, 0.75, 0.75, 0.75]), torch.tensor([1.0, 1.0, 1.0, 0.0]))
        0.0
        >>> calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
        0.5
    """
    sizes: dict[str, int] = {}
    tensor("calibration_error", "confidence", confidence, "b", "floating", sizes)
    tensor("calibration_error", "right", right, "b", sizes=sizes)
    if right.is_complex() or float(confidence.detach().min()) < 0 or float(confidence.detach().max()) > 1 + 1e-6:
        fix = "Pass probabilities, and 1 or 0 for each."
        raise EnsembleKDError("calibration_error", "confidence in [0, 1] and real numbers", "others", fix)
    confidence, right = confidence.cpu().double(), right.cpu().double()
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, confidence - right)
    return float(gaps.abs().sum() / len(bins))


def _minimum(problem: _Function, start: Tensor) -> Tensor:
    """Return the minimum of a convex function over factors >= 0, by Newton steps that never raise it."""
    factors = start
    value, gradient, hessian = problem(factors)
    for _ in range(_STEPS):
        step, length = _newton_step(factors, gradient, hessian), 1.0
        while length > 1e-4:
            trial = (factors + length * step).clamp(min=0)
            found = problem(trial)
            if found[0] < value:
                break
            length /= 4
        else:
            break
        gained = value - found[0]
        factors, (value, gradient, hessian) = trial, found
        if gained < _GAIN:
            break
    return factors


def _newton_step(factors: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """Return the step to the minimum of the quadratic model over factors + step >= 0, by coordinate descent."""
    step = torch.zeros_like(factors)
    curvature = hessian.diagonal().clamp(min=1e-12)
    for _ in range(200):
        for i in range(len(step)):
            slope = gradient[i] + hessian[i] @ step
            step[i] = torch.maximum(step[i] - slope / curvature[i], -factors[i])
    return step
