"""What each process of the distributed tests does: the cases, held against one process on the whole batch."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ensemble_kd import AP, CCL, ICL, KD, EnsembleKD, EnsembleKDError, MaskedItem, NextItem, fit
from ensemble_kd.data import synthetic
from ensemble_kd.data_parallel import SpreadLoss
from ensemble_kd.distributed import Ranks
from ensemble_kd.encoders import BERT4Rec, SASRec
from ensemble_kd.evaluation import evaluate

V, N = 19, 4
DATA = synthetic(num_users=23, num_items=80, num_clusters=8, max_len=12)
LOSSES: dict[str, Any] = {
    "items": 0,
    "ap": AP(),
    "icl": ICL(temperature=0.5),
    "ccl": CCL(temperature=0.5, pool="mean"),
    "reference code": ICL(variant="reference_code", pool="last"),
    "kd": KD(temperature=0.7, scale_by_temperature_squared=True),
    "all": 0.7 * AP() + 0.3 * (ICL() + CCL()) + 0.9 * KD(),
}
OBJECTIVES: dict[str, Any] = {
    "next": NextItem(views=2),
    "masked": MaskedItem(mask_ratio=1.0, views=2),
    "sampled": NextItem(views=2, negatives=V),  # all of them, so that nothing is left to chance
}
CASES = [
    *(("next", losses) for losses in LOSSES),
    *(("masked", losses) for losses in LOSSES),
    *(("sampled", losses) for losses in ("items", "kd", "all")),
]


class Attributes:
    num_attributes = 5
    table = torch.tensor([[i % 5, (i // 5 + 3) % 5 if i % 3 else -1] for i in range(V + 2)])


def build(objective: str, losses: str, **options: Any) -> EnsembleKD:
    encoder = BERT4Rec if objective == "masked" else SASRec
    model = EnsembleKD(
        lambda: encoder(V, d_model=4, num_layers=1, num_heads=1, max_len=7, dropout=0.0).double(),
        n=N,
        objective=OBJECTIVES[objective],
        losses=LOSSES[losses],
        item_attributes=Attributes(),
        classifier="tied" if objective == "sampled" else "linear",
        seed=3,
        **options,
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # far from uniform, so that every term has something to say
    return model


def batch(rows: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, V + 1, (rows, 6), generator=generator)
    for row in range(rows):
        ids[row, : row * 2 % 5] = 0  # lengths from 2 to 6: processes have different numbers of targets
    return ids


def worst(found: Tensor | None, expected: Tensor | None) -> float:
    """The largest error, relative where the expected is large."""
    if found is None or expected is None:
        return 0.0 if found is expected else 1.0
    found, expected = (g.to_dense() if g.is_sparse else g for g in (found, expected))
    return float(((found - expected).abs() / expected.abs().clamp(min=1.0)).max())


def gradients(objective: str, losses: str) -> float:
    """Of a loss and its terms, against those of one process."""
    whole = build(objective, losses)
    expected = whole.loss(batch())
    expected.total.backward()
    model = build(objective, losses)
    model.ranks = Ranks.world()
    loss = SpreadLoss(model)
    step = loss(model.ranks.own(batch()))
    step.total.backward()
    loss.finish()
    assert step.terms.keys() == expected.terms.keys()
    errors = [worst(value, expected.terms[name]) for name, value in step.terms.items()]
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    return max([*errors, *(worst(p.grad, q.grad) for p, q in pairs)])


def trained(negatives: int | None, ranks: bool, **options: Any) -> tuple[EnsembleKD, Any]:
    model = EnsembleKD(
        lambda: SASRec(80, d_model=4, num_layers=1, max_len=6, dropout=0.0).double(),
        n=2,
        objective=NextItem(negatives=negatives),
        item_attributes=DATA.item_attributes,
    )
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 6, "lr": 1e-2, "progress": False, "window_step": 3}
    if ranks:
        return model, fit(model, DATA, **settings, **options)
    joined, Ranks.world = Ranks.world, Ranks  # type: ignore[method-assign, assignment]
    try:
        return model, fit(model, DATA, **settings, **options)
    finally:
        Ranks.world = joined  # type: ignore[method-assign]


def fitting(negatives: int | None, folder: Path) -> float:
    """``fit`` over processes, against ``fit`` in one: weights, what it reports, what it writes."""
    alone, expected = trained(negatives, False)
    entries: list[Any] = []
    own = folder / f"fit {negatives}"
    model, result = trained(negatives, True, output_dir=own, log_every=2, callback=entries.append)
    assert model.ranks.size == 1
    pairs = [(p.detach(), q.detach()) for p, q in zip(model.parameters(), alone.parameters(), strict=True)]
    errors = [worst(p, q) for p, q in pairs]
    assert (result.best_epoch, result.best) == (expected.best_epoch, expected.best)
    for ours, theirs in zip(result.history, expected.history, strict=True):
        assert ours["valid"] == theirs["valid"]
        errors += [abs(value - theirs["train"][name]) for name, value in ours["train"].items()]
    dist.barrier()
    assert len((own / "log.jsonl").read_text().splitlines()) == len(entries)  # one process writes, all are called
    return max(errors)


def evaluating() -> float:
    model = EnsembleKD(lambda: SASRec(80, d_model=4, num_layers=1, max_len=6), n=3)
    expected = evaluate(model, DATA, "test", batch_size=4)
    model.ranks = Ranks.world()
    found = evaluate(model, DATA, "test", batch_size=4)
    assert found.rows == expected.rows
    return max(worst(found.ranks[name], ranks) for name, ranks in expected.ranks.items())


def refusing() -> float:
    """Every process raises, and none waits for the others."""
    texts: list[str] = []
    model = build("next", "icl")
    model.ranks = Ranks.world()
    for run in (
        lambda: model.loss(batch()[:, -2 - model.ranks.rank % 2 :]),
        lambda: fit(EnsembleKD(lambda: SASRec(80, d_model=4, max_len=6)), DATA, batch_size=1, progress=False),
    ):
        try:
            run()
        except EnsembleKDError as error:
            texts.append(str(error))
    assert "tensors of one shape but for their rows" in texts[0]
    assert f"batch_size >= {model.ranks.size}" in texts[1]
    return 0.0


def cases(folder: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    for objective, losses in CASES:
        yield f"data, {objective}, {losses}", lambda o=objective, x=losses: gradients(o, x)  # type: ignore[misc]
    for negatives in (None, 80):
        yield f"fit, negatives={negatives}", lambda k=negatives: fitting(k, folder)  # type: ignore[misc]
    yield "evaluate", evaluating
    yield "refusals", refusing


def main(rank: int, world: int, folder: Path) -> None:
    """Run all cases and write the errors down."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found = {name: run() for name, run in cases(folder)}
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
