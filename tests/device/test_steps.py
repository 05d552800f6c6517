"""A training step on a device: the CPU's values, and nothing that the host has to wait for."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor

import ensemble_kd.ensemble.model
from ensemble_kd import KD, EnsembleKD, NextItem
from ensemble_kd.encoders import SASRec
from tests.device import cases, simulated
from tests.device.log import Wait

pytestmark = pytest.mark.device

CASES = [
    (encoder, objective, classifier, backend)
    for encoder in cases.ENCODERS
    for objective in cases.OBJECTIVES
    for classifier in ("linear", "tied")
    for backend in ("loop", "vmap")
    if not (encoder == "GRU4Rec" and backend == "vmap")  # nn.GRU has no batching rule
    if cases.trains(encoder, objective)
]


def largest_error(found: Tensor, exact: Tensor) -> float:
    found, exact = (x.detach() for x in (found.cpu(), exact))
    found, exact = (x.coalesce().to_dense() if x.is_sparse else x for x in (found, exact))
    return float((found - exact).abs().max() / exact.abs().max().clamp(min=1e-12))


@pytest.mark.parametrize(("encoder", "objective", "classifier", "backend"), CASES)
def test_a_step_waits_for_nothing_and_computes_what_the_cpu_does(
    encoder: str, objective: str, classifier: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ensemble_kd.ensemble.model, "GROUP_FEATURES", 0)  # groups, however little they save
    host = cases.build(encoder, cases.OBJECTIVES[objective], classifier=classifier)
    ids = cases.batch()
    # With the lengths that fit knows, and without.
    options = {"by_length": True, "lengths": (ids != 0).sum(1).tolist()} if classifier == "tied" else {}
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 6e-2)):
        with simulated.device() as log:
            there = cases.build(encoder, cases.OBJECTIVES[objective], classifier=classifier, backend=backend)
            there.load_state_dict(host.state_dict())
            there, there_ids = there.to(simulated.NAME), ids.to(simulated.NAME)
            there.objective = recorded = cases.Recorded(there.objective)
            optimizer = cases.optimizer(there)
            there.encoder.backend_for(there_ids)  # the first call compares the backends
            log.clear()
            losses, grads = cases.step(there, there_ids, optimizer, dtype, **options)
            assert log.waits == []
            assert recorded.kept is not None
            assert (recorded.kept.valid is None) == bool(options)
            total, replay = losses.total.cpu(), recorded.on_host()
        here = copy.deepcopy(host)
        here.objective = replay
        expected, exact = cases.step(here, ids, cases.optimizer(here), dtype)
        assert largest_error(total, expected.total) < bound
        assert grads.keys() == exact.keys()
        for name, grad in grads.items():
            assert largest_error(grad, exact[name]) < bound, name


@pytest.mark.parametrize("worth", [0, None, 1 << 40])
def test_known_lengths_change_no_loss(worth: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether groups are formed, or join because they save too little."""
    if worth is not None:
        monkeypatch.setattr(ensemble_kd.ensemble.model, "GROUP_FEATURES", worth)
    host, ids = cases.build("SASRec", cases.OBJECTIVES["next"]), cases.batch(20)
    ids[1::3, :-3] = 0  # short ones between long ones
    lengths = (ids != 0).sum(1).tolist()
    expected = host.loss(ids).terms
    with simulated.device():
        there = cases.build("SASRec", cases.OBJECTIVES["next"], backend="loop")
        there.load_state_dict(host.state_dict())
        found = there.to(simulated.NAME).loss(ids.to(simulated.NAME), by_length=True, lengths=lengths).terms
        for name, value in expected.items():
            torch.testing.assert_close(found[name].cpu(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("negatives", [None, 64])
def test_logits_are_computed_of_real_targets_alone(negatives: int | None) -> None:
    """Lengths as on Beauty: windows of up to 51, most of which are short."""
    v, b, length = 900, 64, 51
    lengths = [min(length, 3 + i * i // 160) for i in range(b)]
    ids = torch.randint(1, v + 1, (b, length), generator=torch.Generator().manual_seed(0))
    ids.masked_fill_(torch.arange(length) < length - torch.tensor(lengths)[:, None], 0)
    computed = {}
    with simulated.device() as log:
        model = EnsembleKD(
            lambda: SASRec(v, d_model=8, max_len=50, num_layers=1),
            n=2,
            objective=NextItem(negatives=negatives),
            losses=KD(temperature=1.0),
        ).to(simulated.NAME)
        there = ids.to(simulated.NAME)
        for known in (lengths, None):
            log.clear()
            model.loss(there, validate=False, lengths=known)
            columns = v if negatives is None else max(columns for _, columns in log.products)
            computed[known is not None] = sum(r * c * k for (r, c), k in log.products.items() if c == columns)
    counted = 2 * (sum(lengths) - b) * v
    if negatives is None:
        assert computed[True] <= 1.1 * counted
        assert computed[False] > 3 * counted
    else:
        assert computed[True] <= 2 * (sum(lengths) - b) * v  # repeated targets leave room for more negatives


@pytest.mark.parametrize("encoder", ["BERT4Rec", "SASRec", "Caser"])
def test_vmap_serves_in_training_and_auto_takes_what_it_measures(encoder: str) -> None:
    with simulated.device() as log:
        objective = cases.OBJECTIVES["masked" if encoder == "BERT4Rec" else "next"]
        model = cases.build(encoder, objective, dropout=0.1, backend="auto").to(simulated.NAME)
        ids = cases.batch().to(simulated.NAME)
        assert model.encoder.vmap_obstacle(ids) is None
        optimizer = cases.optimizer(model)
        cases.step(model, ids, optimizer, torch.float32)
        (why,) = model.backend.values()
        assert re.fullmatch(
            r"vmap \(vmap agrees with the loop, and took \S+ ms to its \S+ ms\)|"
            r"loop \(the loop took \S+ ms to vmap's \S+ ms\)",
            why,
        )
        log.clear()
        cases.step(model, ids, optimizer, torch.float32)
        assert log.waits == []


def test_the_device_refuses_tensors_of_two_devices() -> None:
    with simulated.device(), pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=simulated.NAME) + torch.ones(3)


def test_the_device_refuses_the_hosts_generator() -> None:
    with simulated.device(), pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=simulated.NAME, generator=torch.Generator())


def test_the_device_counts_what_the_host_waits_for() -> None:
    with simulated.device() as log:
        x = torch.arange(3.0).to(simulated.NAME)
        assert log.waits.pop() == Wait("copy that blocks", "_to_copy (3,)", "?")
        bool(x.sum() > 0)
        x[x > 1]
        x.nonzero()
        x.cpu()
        x[torch.tensor([0])]
    kinds = ["read by the host", "size by values", "size by values", "read by the host", "copy that blocks"]
    assert [wait.kind for wait in log.waits] == kinds


def test_the_device_refuses_attention_under_vmap_as_cuda_does() -> None:
    with simulated.device():
        attend = torch.nn.functional.scaled_dot_product_attention
        q, mask = torch.ones(2, 1, 1, 4, 8, device=simulated.NAME), torch.zeros(1, 1, 1, 4, device=simulated.NAME)
        with pytest.raises(RuntimeError, match="attn_bias"):
            torch.vmap(lambda x: attend(x, x, x, attn_mask=mask))(q)


def test_no_accelerator_is_left_behind() -> None:
    with simulated.device():
        assert torch.accelerator.device_count() == 1
    assert torch.accelerator.device_count() == 0
