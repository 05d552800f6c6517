"""Correctness on a device, against float64: the fused loss and its gradients, ranks, masks, both backends."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import baseline, recipes
from benchmarks.common import Row, kept, sig
from ensemble_kd import EnsembleKD, MaskedItem
from ensemble_kd import functional as ekd
from ensemble_kd.data import synthetic
from ensemble_kd.losses import item_losses
from ensemble_kd.metrics import ranks
from ensemble_kd.objectives import mask_positions
from ensemble_kd.stacking import Backend

KD_WEIGHT, TEMPERATURE = 0.1, 0.3
BFLOAT16_BOUND = 2e-2  # of the largest gradient: bfloat16 keeps 8 bits


def row(check: str, error: float, bound: float) -> Row:
    return {"check": check, "error": sig(error), "bound": sig(bound), "ok": error <= bound}


def relative(found: Tensor, exact: Tensor) -> float:
    """The largest deviation, over the largest value."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def fused_loss(quick: bool, device: str, compiled: bool) -> list[Row]:
    """Loss and gradients by tiles; in float32 they may deviate twice as far as the plain formulas in float32 do."""
    t, d, v = (20, 8, 300) if quick else (870, 64, 12101)
    rng = torch.Generator().manual_seed(0)
    values = [torch.randn(3, t, d, generator=rng), torch.randn(3, v, d, generator=rng) * 0.3, torch.randn(3, v)]
    targets = torch.randint(0, v, (t,), generator=rng).to(device)

    def leaves(dtype: torch.dtype) -> list[Tensor]:
        return [x.to(device, dtype).requires_grad_() for x in values]

    def plain(dtype: torch.dtype) -> list[Tensor]:
        hidden, weight, bias = tensors = leaves(dtype)
        logits = torch.baddbmm(bias[:, None], hidden, weight.mT)
        kd = ekd.knowledge_distillation(logits, temperature=TEMPERATURE)
        total = ekd.item_cross_entropy(logits, targets).sum() + KD_WEIGHT * kd
        return [total.detach(), *torch.autograd.grad(total, tensors)]

    def tiled(product: torch.dtype, with_compiler: bool) -> list[Tensor]:
        tensors = leaves(torch.float32)
        hidden, weight, bias = tensors
        total = item_losses(
            hidden,
            weight,
            bias,
            targets,
            kd_weight=KD_WEIGHT,
            temperature=TEMPERATURE,
            product_dtype=product,
            compiled=with_compiler,
        ).total
        return [total.detach(), *torch.autograd.grad(total, tensors)]

    exact, usual = plain(torch.float64), plain(torch.float32)
    pairs = list(zip(usual, exact, strict=True))
    rows: list[Row] = []

    def compare(what: str, product: torch.dtype, with_compiler: bool) -> list[Row]:
        found = tiled(product, with_compiler)
        bounds = [2 * relative(u, e) + 1e-6 if product == torch.float32 else BFLOAT16_BOUND for u, e in pairs]
        parts = ("total", "d hidden", "d weight", "d bias")
        errors = [relative(f, e) for f, e in zip(found, exact, strict=True)]
        return [row(f"{what}, {name}", *values) for name, *values in zip(parts, errors, bounds, strict=True)]

    for product in (torch.float32, torch.bfloat16):
        for with_compiler in (False, True) if compiled else (False,):
            what = f"fused loss, {str(product).removeprefix('torch.')}{', compiled' if with_compiler else ''}"
            rows += kept(what, functools.partial(compare, what, product, with_compiler))
    return rows


def rank_counts(quick: bool, device: str) -> Row:
    """Ranks with ties and excluded items, against a loop over users on the host."""
    b, v = (16, 40) if quick else (64, 12101)
    rng = torch.Generator().manual_seed(1)
    scores = torch.randint(0, v // 3, (b, v + 1), generator=rng).double()
    target = torch.randint(1, v + 1, (b,), generator=rng)
    exclude = torch.randint(0, v + 1, (b, 12), generator=rng)
    wrong, found = 0, ranks(scores.float().to(device), target.to(device), exclude.to(device)).cpu()
    for u in range(b):
        rivals = set(range(1, v + 1)) - set(exclude[u].tolist()) - {int(target[u])}
        ahead = scores[u, sorted(rivals)] >= scores[u, target[u]]
        wrong += int(found[u]) != int(ahead.sum())
    return row("ranks that are wrong", wrong, 0)


def mask_counts(quick: bool, device: str) -> Row:
    """Masks: exactly ceil(ratio T) different real positions in each row."""
    b, length = (8, 10) if quick else (256, 15)
    rng = torch.Generator(device).manual_seed(2)
    real = torch.arange(1, length + 1) > torch.arange(b)[:, None] % length
    positions, valid = mask_positions(real.long().to(device), views=8, mask_ratio=0.15, generator=rng)
    positions, valid, wrong = positions.cpu(), valid.cpu(), 0
    for m in range(8):
        for u in range(b):
            drawn = positions[m, u][valid[m, u]].tolist()
            wanted = -(-15 * int(real[u].sum()) // 100)
            wrong += len(set(drawn)) != wanted or len(drawn) != wanted or not bool(real[u, drawn].all())
    return row("masks that are wrong", wrong, 0)


def backend(name: Backend, device: str) -> list[Row]:
    """Total and gradients of a whole loss under a backend, against separate modules in float64."""
    data, weights = synthetic(60, 120), baseline.Weights(1.0, 0.3, 0.2, 0.9)
    item_ids = data.train_windows(recipes.WINDOW)[:12].to(device)
    model = EnsembleKD(
        lambda: recipes.encoder(data.num_items, 16, dropout=0.0),
        3,
        objective=MaskedItem(mask_ratio=0.3, views=2),
        losses=weights.losses(),
        item_attributes=data.item_attributes,
        backend=name,
    ).to(device)
    total = model.loss(item_ids, generator=torch.Generator(device).manual_seed(3)).total
    total.backward()
    members = [member.double() for member in baseline.members_of(model)]
    again = torch.Generator(device).manual_seed(3)
    draw = model.objective.draw(item_ids, mask_token=model.mask_token, generator=again)
    assert model.attribute_table is not None
    exact = baseline.loss(members, draw, model.attribute_table, weights)
    exact.backward()
    found = row(f"{name}, total", relative(total.detach(), exact.detach()), 1e-5)
    each = [dict(member.encoder.named_parameters()) for member in members]
    largest = 0.0
    for path, parameter in model.encoder.named_parameters():
        grad, wanted = parameter.grad, [own[path].grad for own in each]
        assert grad is not None
        largest = max(largest, relative(grad, torch.stack([g for g in wanted if g is not None])))
    return [found, row(f"{name}, gradients", largest, 1e-3)]


def run(quick: bool, device: str = "cpu", compiled: bool = True) -> list[Row]:
    """Rows: error, its bound, whether it is within."""
    both: tuple[Backend, ...] = ("loop", "vmap")
    return [
        *kept("fused loss", lambda: fused_loss(quick, device, compiled)),
        *kept("ranks", lambda: rank_counts(quick, device)),
        *kept("masks", lambda: mask_counts(quick, device)),
        *(found for name in both for found in kept(name, functools.partial(backend, name, device))),
    ]
