"""Many threads that score with one model, and what they get against the answers of one thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from ensemble_kd import EnsembleKD, MaskedItem
from ensemble_kd.encoders import BERT4Rec, GRU4Rec, SASRec
from tests.faults.outcome import Outcome

V, L, REQUESTS = 30, 6, 8
SWITCH_S = 1e-4  # of Python's interpreter, in place of 5e-3: threads then meet far more often


def models() -> dict[str, EnsembleKD]:
    """With buffers, without, and with an objective that appends a mask."""
    return {
        "SASRec": EnsembleKD(lambda: SASRec(V, d_model=4, num_layers=1, max_len=L, dropout=0.3), 2),
        "BERT4Rec": EnsembleKD(
            lambda: BERT4Rec(V, d_model=4, num_layers=1, max_len=L), 2, objective=MaskedItem(), classifier="tied"
        ),
        "GRU4Rec": EnsembleKD(lambda: GRU4Rec(V, d_model=4, max_len=L), 2),
    }


def run(calls: int, seed: int, count: int = 8) -> Outcome:
    """Let ``count`` threads make ``calls`` calls each, half of them in evaluation mode, half in training mode."""
    outcome = Outcome("threads")
    outcome.counts.update({"threads": count, "calls": 0, "errors": 0, "differences": 0})
    generator, before = torch.Generator().manual_seed(seed), sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        known = models()
        for name, model in known.items():
            for training in (False, True):
                _race(name, model.train(training), -(-calls // (2 * len(known))), count, generator, outcome)
    finally:
        sys.setswitchinterval(before)
    return outcome


def _race(name: str, model: EnsembleKD, calls: int, count: int, generator: torch.Generator, outcome: Outcome) -> None:
    requests = torch.randint(1, V + 1, (REQUESTS, 1, L), generator=generator)
    asked: list[Callable[[torch.Tensor], Any]] = [
        lambda ids: model.recommend(ids, 5),
        model.query_vectors,
        lambda ids: model.uncertainty(ids, k=3),
    ]
    if not model.training:
        asked += [model, model.member_scores]
    with torch.no_grad():
        expected = [[_flat(function(ids)) for ids in requests] for function in asked]
    lock, barrier = threading.Lock(), threading.Barrier(count)

    def work(first: int) -> None:
        barrier.wait()
        for i in range(first, first + calls):
            which, row = i % len(asked), (i // len(asked)) % REQUESTS
            try:
                with torch.no_grad():
                    same = torch.equal(_flat(asked[which](requests[row])), expected[which][row])
            except Exception as error:
                with lock:
                    outcome.fault(
                        "errors", f"{name}, training={model.training}: {type(error).__name__}: {error!s:.200}"
                    )
            else:
                if not same:
                    with lock:
                        outcome.fault("differences", f"{name}, training={model.training}, function {which}, row {row}")

    mode = model.training
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcome.counts["calls"] += calls * count
    if model.training != mode or any(module.training != mode for module in model.modules()):
        outcome.fault("differences", f"{name}: the mode of the model has changed")


def _flat(found: Any) -> torch.Tensor:
    parts = found if isinstance(found, tuple) else (found,)
    return torch.cat([part.double().flatten() for part in parts])
