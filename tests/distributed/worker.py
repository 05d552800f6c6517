"""One process of the distributed tests: its cases, compared with one process on the whole batch."""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ensemble_kd import (
    AP,
    CCL,
    ICL,
    KD,
    EnsembleKD,
    EnsembleKDError,
    MaskedItem,
    NextItem,
    fit,
)
from ensemble_kd.data import MappedSequences, synthetic, write_sequences
from ensemble_kd.distillation import distill
from ensemble_kd.distributed import Place, SpreadLoss, gathered, shard
from ensemble_kd.distributed import whole as whole_of
from ensemble_kd.encoders import BERT4Rec, SASRec
from ensemble_kd.evaluation import evaluate
from ensemble_kd.export import save
from ensemble_kd.internal import files
from ensemble_kd.training import WarmupStableAverage, clip_members_

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
    "tied": NextItem(),  # whose look-ups' sparse gradients end in a dense one
    "masked": MaskedItem(mask_ratio=1.0, views=2),
    "sampled": NextItem(views=2, negatives=V),  # all of them, so that nothing is left to chance
}
MESHES = {2: {"data": (2, 1), "member": (1, 2)}, 4: {"data": (4, 1), "member": (1, 4), "both": (2, 2)}}
CASES = [
    *(("next", losses) for losses in LOSSES),
    *(("masked", losses) for losses in LOSSES),
    ("tied", "all"),
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
        classifier="tied" if objective in ("tied", "sampled") else "linear",
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
    found, expected = ((g.to_dense() if g.is_sparse else g).detach() for g in (found, expected))
    return float(((found - expected).abs() / expected.abs().clamp(min=1.0)).max())


def gradients(mesh: DeviceMesh, objective: str, losses: str) -> float:
    """Of a loss and its terms, against those of one process."""
    whole = build(objective, losses)
    expected = whole.loss(batch())
    expected.total.backward()
    model = build(objective, losses, mesh=mesh)
    own = list(model.place.own_members(N))
    assert (len(model), len(model.item_classifier.bias)) == (N, len(own))
    loss = SpreadLoss(model, model.place, tables=model.sparse_tables(), constant=["attribute_table"])
    step = loss(model.place.own(batch()))
    step.total.backward()
    loss.finish()
    assert step.terms.keys() == expected.terms.keys()
    errors = [worst(value, expected.terms[name]) for name, value in step.terms.items()]
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    return max([*errors, *(worst(p.grad, q.grad if q.grad is None else q.grad.to_dense()[own]) for p, q in pairs)])


def sharded_gradients(objective: str, losses: str) -> float:
    """Of a model in shards, those that no dimension divides among them."""
    whole = build(objective, losses)
    expected = whole.loss(batch())
    expected.total.backward()
    model = shard(build(objective, losses))
    loss = SpreadLoss(model, model.place, tables=model.sparse_tables(), constant=["attribute_table"])
    step = loss(model.place.own(batch()))
    step.total.backward()
    loss.finish()
    errors = [worst(value, expected.terms[name]) for name, value in step.terms.items()]
    names = dict(whole.named_parameters())
    for name, p in model.named_parameters():
        q = names[name].grad
        assert q is not None
        assert p.numel() == names[name].numel()
        names[name].grad = q.to_dense()
        errors.append(worst(whole_of(p.grad), names[name].grad))
    held = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[attr-defined]
    assert held < 1.5 * sum(q.numel() for q in names.values()) / model.place.size
    norms = clip_members_(list(model.parameters()), 1e-3)
    errors.append(worst(norms, clip_members_(list(whole.parameters()), 1e-3)))
    errors += [worst(whole_of(p.grad), names[name].grad) for name, p in model.named_parameters()]
    return max(errors)


def late(epoch: float, _: int) -> float:
    """A transfer schedule: the terms of a step change during a run."""
    return min(1.0, max(0.0, 2 * epoch - 1))


def trained(
    negatives: int | None,
    ranks: bool,
    mesh: DeviceMesh | None = None,
    before: Callable[[EnsembleKD], EnsembleKD] = lambda model: model,
    **options: Any,
) -> tuple[EnsembleKD, Any]:
    model = EnsembleKD(
        lambda: SASRec(80, d_model=4, num_layers=1, max_len=6, dropout=0.0).double(),
        n=N,
        objective=NextItem(negatives=negatives),
        item_attributes=DATA.item_attributes,
        mesh=mesh,
    )
    model = before(model)
    settings: dict[str, Any] = {
        "transfer": late,
        "schedule": WarmupStableAverage(),
        "epochs": 2,
        "batch_size": 6,
        "lr": 1e-2,
        "progress": False,
        "window_step": 3,
    }
    settings |= options
    if ranks:
        return model, fit(model, DATA, **{"precision": "float32", **settings})
    joined, Place.world = Place.world, Place  # type: ignore[method-assign, assignment]
    try:
        return model, fit(model, DATA, **{"precision": "float32", **settings})
    finally:
        Place.world = joined  # type: ignore[method-assign]


def fitting(negatives: int | None, folder: Path) -> float:
    """``fit`` over processes, against ``fit`` in one: weights, what it reports, what it writes."""
    alone, expected = trained(negatives, False)
    entries: list[Any] = []
    own = folder / f"fit {negatives}"
    model, result = trained(negatives, True, output_dir=own, log_every=2, callback=entries.append)
    assert model.place.size == 1
    pairs = [(p.detach(), q.detach()) for p, q in zip(model.parameters(), alone.parameters(), strict=True)]
    errors = [worst(p, q) for p, q in pairs]
    assert (result.best_epoch, result.best) == (expected.best_epoch, expected.best)
    for ours, theirs in zip(result.history, expected.history, strict=True):
        assert ours["valid"] == theirs["valid"]
        errors += [abs(value - theirs["train"][name]) for name, value in ours["train"].items()]
    dist.barrier()
    assert len((own / "log.jsonl").read_text().splitlines()) == len(entries)  # one process writes, all are called
    return max(errors)


def streaming(folder: Path) -> float:
    """``fit`` from sequences on disk, of which each process reads its own: all end in the same weights, and learn."""
    rank, own = dist.get_rank(), folder / "stream"
    if rank == 0:
        write_sequences(own, (part.tolist() for part in DATA.items.tensor_split(DATA.offsets[1:-1])), num_items=80)
    dist.barrier()
    data, model = MappedSequences(own, block=30), EnsembleKD(lambda: SASRec(80, d_model=4, num_layers=1, max_len=6))
    result = fit(model, data, precision="float32", epochs=3, batch_size=12, lr=1e-2, progress=False)
    first, *_, last = (entry["train"]["nip"] for entry in result.history)
    assert last < first
    assert result.best == evaluate(model, DATA, "valid", precision="float32").rows
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    return max(worst(flat, other) for other in others)


def fitting_on(mesh: DeviceMesh, folder: Path) -> float:
    """``fit`` over a mesh: weights and files against those of one process; and resumed, against itself."""
    alone, expected = trained(None, False, output_dir=folder / "alone" if dist.get_rank() == 0 else None)
    model, result = trained(None, True, mesh, output_dir=folder / "mesh")
    own = list(model.place.own_members(N))
    errors = [worst(p.detach(), q.detach()[own]) for p, q in zip(model.parameters(), alone.parameters(), strict=True)]
    assert (result.best_epoch, result.best) == (expected.best_epoch, expected.best)
    trained(None, True, mesh, output_dir=folder / "resumed", epochs=1)
    again, _ = trained(None, True, mesh, output_dir=folder / "resumed", resume=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    dist.barrier()
    kept, whole = (files.load(folder / name / "best.pt")["model"] for name in ("mesh", "alone"))
    return max([*errors, *(worst(kept[name], value) for name, value in whole.items())])


def fitting_in_shards(folder: Path) -> float:
    """``fit`` of a model in shards: weights and files against those of one process; and resumed, against itself."""
    alone, expected = trained(None, False, output_dir=folder / "alone" if dist.get_rank() == 0 else None)
    model, result = trained(None, True, output_dir=folder / "shards", before=shard)
    assert (result.best_epoch, result.best) == (expected.best_epoch, expected.best)
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    errors = [worst(whole_of(p).detach(), q.detach()) for p, q in pairs]
    trained(None, True, output_dir=folder / "resumed", epochs=1, before=shard)
    again, _ = trained(None, True, output_dir=folder / "resumed", resume=True, before=shard)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(whole_of(p), whole_of(q)) for p, q in pairs)
    dist.barrier()
    kept, best = (files.load(folder / name / "best.pt")["model"] for name in ("shards", "alone"))
    errors += [worst(kept[name], value) for name, value in best.items()]
    ids = DATA.inputs("test", 6)[:5]
    with gathered(model):
        errors.append(worst(model.recommend(ids, k=5).scores, alone.recommend(ids, k=5).scores))
    return max(errors)


def answering(mesh: DeviceMesh) -> float:
    """Evaluation and every kind of answer, against one process."""
    small: dict[str, Any] = {"item_attributes": DATA.item_attributes}
    alone = EnsembleKD(lambda: SASRec(80, d_model=4, num_layers=1, max_len=6).double(), N, **small)
    model = EnsembleKD.from_members([alone.encoder.member(i) for i in range(N)], **small, mesh=mesh)
    for p in (*alone.parameters(), *model.parameters()):
        p.data.mul_(9)
    expected, found = (evaluate(m, DATA, "test", batch_size=4, precision="float32") for m in (alone, model))
    assert found.rows == expected.rows
    errors = [worst(found.ranks[name], ranks) for name, ranks in expected.ranks.items()]
    ids = DATA.inputs("test", 6)[:5]
    calls: list[Callable[[EnsembleKD], Any]] = [
        lambda m: m.eval()(ids)[:, 1:],
        lambda m: m.member_scores(ids)[..., 1:],
        lambda m: m.query_vectors(ids),
        lambda m: m.item_vectors(),
        lambda m: torch.stack(m.uncertainty(ids)),
        *(partial(recommended, ids=ids, aggregate=how) for how in ("logits", "probabilities", "ranks")),
    ]
    errors += [worst(call(model), call(alone)) for call in calls]
    own = model.place.own_members(N)
    errors.append(worst(model.member(own[0]).member_scores(ids)[..., 1:], alone.member_scores(ids)[own[:1], :, 1:]))
    return max(errors)


def recommended(model: EnsembleKD, ids: Tensor, aggregate: Any) -> Tensor:
    return model.recommend(ids, k=5, aggregate=aggregate).scores


def refusing() -> float:
    """Every process raises, and none waits for the others."""
    texts: list[str] = []
    model = build("next", "icl")
    model.place = Place.world()
    members = init_device_mesh("cpu", (model.place.size,), mesh_dim_names=("member",))
    unnamed = init_device_mesh("cpu", (model.place.size,))
    encoder = partial(SASRec, 80, d_model=4, max_len=6)
    for run in (
        lambda: model.loss(batch()[:, -2 - model.place.rank % 2 :]),
        lambda: fit(EnsembleKD(encoder), DATA, batch_size=1, progress=False),
        lambda: EnsembleKD(encoder, 3, mesh=members),
        lambda: EnsembleKD(encoder, N, mesh=members).member(
            (model.place.rank + 1) % model.place.size * N // model.place.size
        ),
        lambda: EnsembleKD(encoder, mesh=unnamed),
        lambda: distill(EnsembleKD(encoder, N, mesh=members), encoder, DATA),
        lambda: shard(EnsembleKD(encoder, N, mesh=members)),
        lambda: shard(EnsembleKD(encoder)).recommend(torch.tensor([[1, 2]])),
        lambda: save(shard(EnsembleKD(encoder)), "nowhere"),
    ):
        try:
            run()
        except EnsembleKDError as error:
            texts.append(str(error))
    assert "tensors of one shape but for their rows" in texts[0]
    assert f"batch_size >= {model.place.size}" in texts[1]
    assert f"n in multiples of {model.place.size}, got 3" in texts[2]
    assert "held here" in texts[3]
    assert "dimensions named 'data', 'member' or both" in texts[4]
    assert "a model with all its members here" in texts[5]
    assert texts[6].startswith("shard: expected a model with all its members here")
    assert "gathered(model)" in texts[7]
    assert texts[8].startswith("save: expected a model with all its weights here")
    return 0.0


def cases(world: int, folder: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    for name, (data, member) in MESHES[world].items():
        mesh = (
            init_device_mesh("cpu", (data, member), mesh_dim_names=("data", "member"))
            if dist.is_initialized()
            else None
        )
        for objective, losses in CASES:
            yield f"{name}, {objective}, {losses}", partial(gradients, mesh, objective, losses)  # type: ignore[arg-type]
        yield f"{name}, answers", partial(answering, mesh)  # type: ignore[arg-type]
        if member == 2:
            yield f"{name}, fit", partial(fitting_on, mesh, folder / name)  # type: ignore[arg-type]
    for negatives in (None, 80) if world == 2 else (80,):
        yield f"fit, negatives={negatives}", partial(fitting, negatives, folder)
    for objective, losses in (("next", "all"), ("masked", "all"), ("tied", "all"), ("sampled", "all")):
        yield f"shards, {objective}, {losses}", partial(sharded_gradients, objective, losses)
    if world == 2:
        yield "shards, fit", partial(fitting_in_shards, folder / "shards")
    yield "stream", partial(streaming, folder)
    yield "refusals", refusing


def one(rank: int, world: int, folder: Path) -> None:
    """Run all cases and write the errors down."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    found = {name: run() for name, run in cases(world, folder)}
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    """Start 2 processes, then 4, which all have what this one has imported."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for world in MESHES:
        own = folder / str(world)
        own.mkdir()
        processes = [fork.Process(target=one, args=(rank, world, own)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"{world} processes: {[process.exitcode for process in processes]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
