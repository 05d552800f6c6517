"""Small requests of 1, 2, 4 and 8 threads on one model, at batch 1 and with one torch thread each, as of a web server.

A request is one user's newest items and wants ten. Rounds are short and each has all numbers of threads, so that the
load of others falls on all alike.
"""

from __future__ import annotations

import operator
import statistics
import threading
import time

import torch
from torch import Tensor

from benchmarks.common import Row, beauty, sig
from ensemble_kd import EnsembleKD
from ensemble_kd.encoders import SASRec

K, LENGTH = 10, 50
THREADS, ROUNDS, REQUESTS = (1, 2, 4, 8), 15, 200


def threaded(model: EnsembleKD, single: tuple[Tensor, ...], count: int) -> float:
    """Requests a second of so many threads, which share the requests out."""
    barrier = threading.Barrier(count + 1)

    def work(first: int) -> None:
        barrier.wait()
        for ids in single[first::count]:
            model.recommend(ids, K)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return len(single) / (time.perf_counter() - started)


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows: requests a second of so many threads, and as times of one thread's: medians over rounds."""
    data, d, requests = beauty(quick), 8 if quick else 64, 20 if quick else REQUESTS
    model = EnsembleKD(lambda: SASRec(data.num_items, d_model=d, max_len=LENGTH), 3).to(device).eval()
    inputs = data.inputs("test", LENGTH)
    users = inputs[torch.linspace(0, len(inputs) - 1, requests).long()].to(device)
    single = tuple(ids[:, ids[0] != 0] for ids in users.split(1))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        threaded(model, single[:10], 2)  # both sets of weightless members are made
        rounds = [[threaded(model, single, count) for count in THREADS] for _ in range(1 if quick else ROUNDS)]
    finally:
        torch.set_num_threads(before)
    found = dict(zip(THREADS, zip(*rounds, strict=True), strict=True))
    return [
        {
            "d": d,
            "v": data.num_items,
            "threads": count,
            "requests_per_s": sig(statistics.median(own)),
            "times_one_thread": sig(statistics.median(map(operator.truediv, own, found[THREADS[0]])), 3),
        }
        for count, own in found.items()
    ]
