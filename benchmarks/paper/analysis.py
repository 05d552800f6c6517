"""How members differ, what the ensemble gains by it, and whether one run is better than another."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ensemble_kd import EnsembleKD
from ensemble_kd.data import SequenceData
from ensemble_kd.metrics import disagreement
from ensemble_kd.serving import Aggregate, aggregate_scores

K = 10
Numbers = np.ndarray[Any, np.dtype[np.float64]]


def ndcg(ranks: np.ndarray[Any, Any], k: int = K) -> Numbers:
    """NDCG@k of each user, whose one relevant item has this rank from 0.

    Examples:
        >>> ndcg(np.array([0, 2, 10]))
        array([1. , 0.5, 0. ])
    """
    ranks = ranks.astype(np.float64)
    return np.where(ranks < k, 1 / np.log2(ranks + 2), 0.0)


class Test(NamedTuple):
    """A paired comparison by user."""

    difference: float
    low: float  # of the 95 % interval
    high: float
    p: float  # two-sided
    wins: int  # seeds in which the first is better
    seeds: int


def paired_bootstrap(first: Numbers, second: Numbers, *, resamples: int = 10_000, seed: int = 0) -> Test:
    """Test if ``first`` beats ``second``, both (seeds, users): users are drawn anew, with their mean over seeds.

    p is twice the smaller share of resamples on either side of 0, with one added, so that it is never 0.

    Examples:
        >>> test = paired_bootstrap(np.ones((2, 50)), np.zeros((2, 50)), resamples=99)
        >>> test.difference, test.p, test.wins
        (1.0, 0.02, 2)
    """
    per_seed = (first - second).mean(axis=1)
    by_user = (first - second).mean(axis=0)
    # Most users hit in neither run; how many of those a resample draws is all that matters of them.
    differing = by_user[by_user != 0]
    # NumPy promises the same numbers in each of its versions from RandomState alone; default_rng's changed in 2.5.
    rng, users, means = np.random.RandomState(seed), len(by_user), np.empty(resamples)
    drawn = rng.binomial(users, len(differing) / users, size=resamples)
    for i, count in enumerate(drawn):
        means[i] = differing[rng.randint(0, len(differing), count)].sum() / users if count else 0.0
    below, above = int((means <= 0).sum()), int((means >= 0).sum())
    p = min(1.0, 2 * (1 + min(below, above)) / (1 + resamples))
    low, high = np.quantile(means, [0.025, 0.975])
    return Test(float(by_user.mean()), float(low), float(high), p, int((per_seed > 0).sum()), len(per_seed))


def ambiguity(logits: Tensor, target: Tensor) -> dict[str, float]:
    """The gain of averaging logits, in nats: members' mean cross-entropy = ensemble's + mean KL(ensemble ‖ member).

    It is exact, whatever the target: the second term measures how much members differ, and nothing else.

    Args:
        logits: (n, b, v).
        target: (b,) columns.

    Examples:
        >>> logits = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> {name: round(value, 4) for name, value in ambiguity(logits, torch.tensor([0])).items()}
        {'members_ce': 0.8133, 'ensemble_ce': 0.6931, 'ambiguity': 0.1201}
    """
    log_p, pooled = logits.log_softmax(-1), logits.mean(0).log_softmax(-1)
    kl = (pooled.exp() * (pooled - log_p)).sum(-1)
    return {
        "members_ce": float(-log_p.gather(-1, target.expand(len(logits), -1)[..., None]).mean()),
        "ensemble_ce": float(F.nll_loss(pooled, target)),
        "ambiguity": float(kl.mean()),
    }


AGGREGATES: tuple[Aggregate, ...] = ("logits", "probabilities", "ranks")


@torch.no_grad()
def diagnose(model: EnsembleKD, data: SequenceData, *, users: int = 2048, rows: int = 256) -> dict[str, float]:
    """Overlap, ambiguity and aggregators on test targets of evenly spaced users, history excluded where items rank."""
    chosen = torch.linspace(0, data.num_users - 1, min(users, data.num_users)).round().long()
    history, target = data.inputs("test", data.max_history), data.target("test")
    sums: dict[str, float] = {}
    model.eval()
    for part in chosen.split(rows):
        width = int((history[part] != 0).sum(1).max())
        seen, wanted = history[part][:, -width:], target[part]
        logits = model.member_scores(seen[:, -(model.max_len or width) :])[..., 1:]
        found = ambiguity(logits, wanted - 1)
        hidden = torch.zeros(len(part), logits.shape[-1] + 1, dtype=torch.bool).scatter_(1, seen, True)
        hidden = hidden.scatter_(1, wanted[:, None], False)[:, 1:]
        shown = logits.masked_fill(hidden, -torch.inf)
        found["jaccard@10"] = float(1 - disagreement(shown.topk(K).indices).mean())
        for how in AGGREGATES:
            score = aggregate_scores(logits, how).masked_fill(hidden, -torch.inf)
            rank = (score >= score.gather(1, wanted[:, None] - 1)).sum(1) - 1
            found[f"NDCG@10 of mean {how}"] = float(ndcg(rank.numpy()).mean())
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value * len(part) / len(chosen)
    return {name: round(value, 5) for name, value in sums.items()}
