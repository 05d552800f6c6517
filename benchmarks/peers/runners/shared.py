"""The parts that every runner shares: the text file, the clock of training, the epoch that validation picks, requests.

It needs NumPy and torch alone, any version, so that it runs in the environment of each library.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

K = 10
BLOCK = 512  # users at a time
MARKS = 6  # validations within a budget, besides those at the end of an epoch
REQUESTS = 30
ASKED = 64  # of them, whose recommendations are compared with the vectors
QUIET = {  # a Lightning trainer's, on one core and without its own files
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
}
SOME = 2048  # users who pick the epoch and who are served, evenly spaced


class Vectors(NamedTuple):
    """Scores of all items as a product: ``queries @ items.T + bias``. Row 0 of the items is padding."""

    queries: Tensor  # (users, d)
    items: Tensor  # (items + 1, d)
    bias: Tensor  # (items + 1,); -inf for an item that the model cannot score


def read_sequences(path: str | Path) -> list[list[int]]:
    """Return the items of each user, oldest first, from lines ``user item item ...``.

    Raises:
        ValueError: a user with fewer than three items, so that training, validation and test cannot each have one.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    sequences = [[int(word) for word in line.split()[1:]] for line in lines if line.strip()]
    short = next((i for i, items in enumerate(sequences) if len(items) < 3), None)
    if short is not None:
        raise ValueError(f"{path}: line {short + 1} has fewer than three items")
    return sequences


def split_of(sequences: Sequence[Sequence[int]], split: str) -> tuple[list[Sequence[int]], list[int]]:
    """Return each user's history and target: the last item is the test's, the one before it the validation's."""
    held = {"valid": 2, "test": 1}[split]
    return [items[:-held] for items in sequences], [items[-held] for items in sequences]


def some(users: int) -> list[int]:
    """Return at most ``SOME`` users, evenly spaced: the validation and the speed of serving of every library."""
    chosen: list[int] = np.linspace(0, users - 1, min(SOME, users)).round().astype(int).tolist()
    return chosen


def ndcg(vectors: Vectors, histories: Sequence[Sequence[int]], targets: Sequence[int], k: int = K) -> float:
    """Return NDCG@k over all items but each user's history; a tie counts against the target.

    It picks the epoch. The figures that are reported come from ``benchmarks.peers.ranking``.
    """
    total, queries, items, bias = 0.0, *vectors
    for start in range(0, len(targets), BLOCK):
        target = torch.tensor(targets[start : start + BLOCK])[:, None]
        scores = queries[start : start + BLOCK].float() @ items.float().T + bias.float()
        mark = scores.gather(1, target)
        for row, seen in zip(scores, histories[start : start + BLOCK], strict=True):
            row[torch.as_tensor(seen)] = -torch.inf
        scores[:, 0] = -torch.inf
        scores.scatter_(1, target, mark)  # the target competes, even if the user had it before
        rank = (~(scores < mark)).sum(1) - 1
        total += float(torch.where(rank < k, 1 / torch.log2(rank + 2.0), 0.0).sum())
    return total / len(targets)


class Over(Exception):
    """The minutes are used up."""


class Watch:
    """The clock of a training: CPU and wall-clock seconds without validation, the curve, and the best state.

    Args:
        minutes: of CPU, for training alone; None: no limit.
        validate: returns the validation's NDCG@10 of the model as it is.
        keep: called if that is the best so far.
    """

    def __init__(self, minutes: float | None, validate: Callable[[], float], keep: Callable[[], None]) -> None:
        self.limit = None if minutes is None else 60 * minutes
        self.validate, self.keep = validate, keep
        self.curve: list[dict[str, float]] = []
        self.steps = self.epochs = 0
        self.epoch_cpu_s: list[float] = []  # of whole epochs
        self._cpu = self._wall = 0.0  # until the last pause
        self._from = (time.process_time(), time.perf_counter())
        self._epoch_from = 0.0

    def cpu_s(self) -> float:
        return self._cpu + time.process_time() - self._from[0]

    def wall_s(self) -> float:
        return self._wall + time.perf_counter() - self._from[1]

    def pause(self) -> None:
        self._cpu, self._wall = self.cpu_s(), self.wall_s()
        self.resume()

    def resume(self) -> None:
        self._from = (time.process_time(), time.perf_counter())

    def step(self, *, ends_epoch: bool = False) -> None:
        """Note a step that is done: validate at an epoch's end, at every sixth of the budget, and at its end.

        Raises:
            Over: the budget is used up.
        """
        self.steps += 1
        used = self.cpu_s()
        last = self.curve[-1]["cpu_s"] if self.curve else 0.0
        over = self.limit is not None and used >= self.limit
        if ends_epoch:
            self.epoch()
        elif over or (self.limit is not None and used - last >= self.limit / MARKS):
            self.look()
        if over:
            raise Over

    def epoch(self) -> None:
        """Note that an epoch is done, and validate."""
        used = self.cpu_s()
        self.epochs += 1
        self.epoch_cpu_s.append(round(used - self._epoch_from, 2))
        self._epoch_from = used
        self.look()

    def look(self, value: float | None = None) -> None:
        """Add a point to the curve; ``value`` if it is known already."""
        self.pause()
        found = self.validate() if value is None else value
        best = max((point["ndcg"] for point in self.curve), default=-1.0)
        point = {"cpu_s": round(self._cpu, 2), "wall_s": round(self._wall, 2), "ndcg": round(found, 5)}
        self.curve.append({**point, "epochs": self.epochs, "steps": self.steps})
        print(self.curve[-1], flush=True)
        if found > best:
            self.keep()
        self.resume()

    def account(self, batches: int) -> dict[str, Any]:
        """Return what is kept of the training, with the batches of an epoch."""
        best = max(self.curve, key=lambda point: point["ndcg"])
        return {
            "curve": self.curve,
            "best": best,
            "epochs": self.epochs,
            "epoch_cpu_s": self.epoch_cpu_s,
            "batches": batches,
            "seconds_of_training": {"cpu": round(self._cpu, 1), "wall": round(self._wall, 1)},
        }


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict whose tensors are copies."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def requests(answer: Callable[[list[int]], object], users: int, rows: int = BLOCK) -> dict[str, float]:
    """Return CPU and wall-clock milliseconds of one request, the median, and users a CPU second for many.

    Args:
        answer: recommends ``K`` items to each of these users.
        users: of the data; ``some`` of them ask.
        rows: users at a time where many ask.
    """
    many = some(users)
    chosen = many[:: max(1, len(many) // (REQUESTS + 3))][: REQUESTS + 3]
    cpu, wall = [], []
    for user in chosen:
        started = time.process_time(), time.perf_counter()
        answer([user])
        cpu.append(1e3 * (time.process_time() - started[0]))
        wall.append(1e3 * (time.perf_counter() - started[1]))
    started = time.process_time(), time.perf_counter()
    for first in range(0, len(many), rows):
        answer(many[first : first + rows])
    return {
        "request_cpu_ms": round(statistics.median(cpu[3:]), 3),
        "request_wall_ms": round(statistics.median(wall[3:]), 3),
        "users_per_cpu_s": round(len(many) / (time.process_time() - started[0]), 1),
    }


def agreement(
    vectors: Vectors, histories: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], k: int = K
) -> float:
    """Return how much the library's own recommendations overlap with the best items by its vectors: 1, but for ties.

    It shows that the scores that are ranked are those that the library serves.

    Args:
        vectors: of the users who were answered, in their order.
        histories: of the same users; their items are not recommended.
        answers: what the library recommends to each.
        k: length of the lists.
    """
    total = 0.0
    for row, (seen, answer) in enumerate(zip(histories, answers, strict=True)):
        scores = vectors.queries[row].float() @ vectors.items.float().T + vectors.bias.float()
        scores[torch.as_tensor(seen)] = -torch.inf
        scores[0] = -torch.inf
        total += len(set(scores.topk(k).indices.tolist()) & set(answer)) / k
    return round(total / len(histories), 4)


def peak_mib() -> float:
    """Return the highest resident memory of this process so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def write(folder: Path, vectors: Vectors, account: dict[str, Any]) -> None:
    """Write the vectors of the test and the account, for the evaluator."""
    for name, value in vectors._asdict().items():
        np.save(folder / f"{name}.npy", value.float().numpy())
    (folder / "account.json").write_text(json.dumps(account), encoding="utf-8")


def main(run: Callable[[dict[str, Any]], None]) -> None:
    """Run the job that the command line names: a JSON file, see ``benchmarks.peers.jobs``."""
    torch.set_num_threads(1)
    run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
