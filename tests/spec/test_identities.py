"""The specification as identities: values and gradients that every right implementation has.

Each identity is a function whose first argument is the implementation, so that ``test_mutants`` can feed it wrong ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ensemble_kd import functional as F
from ensemble_kd.ensemble import EnsembleKD, Step
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import (
    AP,
    CCL,
    ICL,
    KD,
    ItemLosses,
    Loss,
    distillation_losses,
    item_losses,
)
from ensemble_kd.metrics import ranks
from ensemble_kd.objectives import Draw, MaskedItem, NextItem
from tests.spec import reference
from tests.spec.strategies import (
    Classified,
    Encoded,
    Lesson,
    Masking,
    Predictions,
    Ranking,
    Tagged,
    classified,
    encoded,
    lessons,
    maskings,
    permutation,
    predictions,
    rankings,
    representations,
    seeds,
    sequences,
    tagged,
    temperatures,
    tensors,
    weights,
)

Function = Callable[..., Any]


class Identity(NamedTuple):
    """A check, the implementation that must pass it, and the strategies of its other arguments."""

    check: Callable[..., None]
    of: Function
    inputs: dict[str, Any]

    def hold(self, implementation: Function, profile: settings | None = None) -> None:
        """Raise AssertionError unless the identity holds for the implementation."""

        def holds(**case: Any) -> None:
            self.check(implementation, **case)

        holds.__name__ = self.check.__name__  # one entry each in the database of failing examples
        tested = given(**self.inputs)(holds)
        (profile(tested) if profile else tested)()


IDENTITIES: dict[str, Identity] = {}


def identity(of: Function, **inputs: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Enter a check into the specification of ``of``."""

    def enter(check: Callable[..., None]) -> Callable[..., None]:
        IDENTITIES[check.__name__] = Identity(check, of, inputs)
        return check

    return enter


def close(got: Tensor, want: Tensor, tolerance: float = 1e-8) -> None:
    """Equal shapes and values up to rounding; NaN is close to nothing."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert torch.allclose(got, want, rtol=tolerance, atol=tolerance), f"{got}, not {want}"


def value_and_gradients(f: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
    """``f`` and the gradients of its sum; 0 where nothing depends on an input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = f(*leaves)
    if not value.requires_grad:
        return value, *(torch.zeros_like(x) for x in inputs)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves, materialize_grads=True)


def gradients(f: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the sum of ``f``."""
    return value_and_gradients(f, *inputs)[1:]


def agree(f: Function, g: Function, *inputs: Tensor) -> None:
    """Equal values and gradients."""
    for got, want in zip(value_and_gradients(f, *inputs), value_and_gradients(g, *inputs), strict=True):
        close(got, want)


def derives_itself(f: Function, *inputs: Tensor) -> None:
    """The gradient is that of finite differences."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True, raise_exception=False)


def finite(f: Function, *inputs: Tensor) -> None:
    """No NaN and no infinity, in value and gradients."""
    for x in value_and_gradients(f, *inputs):
        assert x.isfinite().all(), x


def leaves_no_trace(f: Function, *inputs: Tensor | None) -> None:
    """Neither inputs nor the global RNG change."""
    before = [None if x is None else x.clone() for x in inputs]
    state = torch.get_rng_state()
    f(*inputs)
    assert torch.equal(state, torch.get_rng_state()), "the global RNG has moved"
    for x, old in zip(inputs, before, strict=True):
        assert x is None or (old is not None and torch.equal(x, old)), "an input has changed"


def extreme(logits: Tensor) -> Tensor:
    """float32 logits of +-1e4 with the signs of the given ones."""
    return 1e4 * logits.sign().float()


# Item cross-entropy, Eq. 6.


@identity(F.item_cross_entropy, case=predictions())
def ce_is_minus_log_probability(ce: Function, case: Predictions) -> None:
    agree(lambda p: ce(p, case.targets), lambda p: reference.mip(p, case.targets), case.logits)


@identity(F.item_cross_entropy, case=predictions(), shift=tensors("n t"))
def ce_ignores_row_shifts(ce: Function, case: Predictions, shift: Tensor) -> None:
    close(ce(case.logits + shift[:1, :1, None], case.targets), ce(case.logits, case.targets))
    (grad,) = gradients(lambda p: ce(p, case.targets), case.logits)
    close(grad.sum(dim=-1), torch.zeros_like(grad[..., 0]))


@identity(F.item_cross_entropy, case=predictions())
def ce_of_equal_scores_is_log_v(ce: Function, case: Predictions) -> None:
    p = torch.zeros_like(case.logits)
    close(ce(p, case.targets), p.new_full((len(p),), math.log(p.shape[2])))


@identity(F.item_cross_entropy, case=predictions())
def ce_is_a_mean_over_targets(ce: Function, case: Predictions) -> None:
    close(ce(case.logits.repeat(1, 3, 1), case.targets.repeat(3)), ce(case.logits, case.targets))


@identity(F.item_cross_entropy, case=predictions(), seed=seeds)
def ce_commutes_with_permutations(ce: Function, case: Predictions, seed: int) -> None:
    n, t, v = (permutation(size, seed + i) for i, size in enumerate(case.logits.shape))
    plain, (grad,) = ce(case.logits, case.targets), gradients(lambda p: ce(p, case.targets), case.logits)
    renamed = v.argsort()[case.targets[t]]
    close(ce(case.logits[n][:, t][..., v], renamed), plain[n])
    close(gradients(lambda p: ce(p, renamed), case.logits[n][:, t][..., v])[0], grad[n][:, t][..., v])


@identity(F.item_cross_entropy, case=predictions())
def ce_derives_itself(ce: Function, case: Predictions) -> None:
    derives_itself(lambda p: ce(p, case.targets), case.logits)


@identity(F.item_cross_entropy, case=predictions())
def ce_survives_extreme_logits(ce: Function, case: Predictions) -> None:
    finite(lambda p: ce(p, case.targets), extreme(case.logits))


@identity(F.item_cross_entropy, case=predictions())
def ce_leaves_no_trace(ce: Function, case: Predictions) -> None:
    leaves_no_trace(ce, case.logits, case.targets)


# The divergence of one pair, Eqs. 16-17.

PAIR = {"pair": tensors("t v, t v"), "tau": temperatures}


@identity(F.kl_divergence, **PAIR)
def kl_is_the_definition(kl: Function, pair: tuple[Tensor, Tensor], tau: float) -> None:
    agree(lambda p, q: kl(p, q, temperature=tau), lambda p, q: reference.kl(p, q, tau), *pair)


@identity(F.kl_divergence, **PAIR)
def kl_of_equal_distributions_is_zero(kl: Function, pair: tuple[Tensor, Tensor], tau: float) -> None:
    p, shift = pair[0], pair[1][:, :1]
    close(kl(p, p + shift, temperature=tau), p.new_zeros(()))


@identity(F.kl_divergence, **PAIR)
def kl_is_never_negative(kl: Function, pair: tuple[Tensor, Tensor], tau: float) -> None:
    assert kl(*pair, temperature=tau) >= -1e-12


@identity(F.kl_divergence, **PAIR)
def kl_ignores_row_shifts(kl: Function, pair: tuple[Tensor, Tensor], tau: float) -> None:
    p, q = pair
    shifted = kl(p + q[:, :1], q - p[:, :1], temperature=tau)
    close(shifted, kl(p, q, temperature=tau))
    (grad,) = gradients(lambda q: kl(p, q, temperature=tau), q)
    close(grad.sum(dim=-1), torch.zeros_like(grad[..., 0]))


@identity(F.kl_divergence, **PAIR)
def kl_temperature_only_divides_logits(kl: Function, pair: tuple[Tensor, Tensor], tau: float) -> None:
    p, q = pair
    close(kl(3 * p, 3 * q, temperature=3 * tau), kl(p, q, temperature=tau))


@identity(F.kl_divergence, **PAIR)
def kl_is_a_mean_over_targets(kl: Function, pair: tuple[Tensor, Tensor], tau: float) -> None:
    close(kl(*(x.repeat(3, 1) for x in pair), temperature=tau), kl(*pair, temperature=tau))


@identity(F.kl_divergence, **PAIR)
def kl_leaves_the_teacher_alone(kl: Function, pair: tuple[Tensor, Tensor], tau: float) -> None:
    grad, _ = gradients(lambda p, q: kl(p, q, temperature=tau), *pair)
    assert (grad == 0).all()


@identity(F.kl_divergence, **PAIR)
def kl_derives_itself(kl: Function, pair: tuple[Tensor, Tensor], tau: float) -> None:
    derives_itself(lambda q: kl(pair[0], q, temperature=max(tau, 0.3)), pair[1])


@identity(F.kl_divergence, **PAIR)
def kl_survives_extreme_logits(kl: Function, pair: tuple[Tensor, Tensor], tau: float) -> None:
    finite(lambda p, q: kl(p, q, temperature=tau), *map(extreme, pair))


# Distillation between all members, Eq. 18.


@identity(F.knowledge_distillation, p=tensors("n t v"), tau=temperatures)
def kd_is_the_double_loop(kd: Function, p: Tensor, tau: float) -> None:
    agree(lambda p: kd(p, temperature=tau), lambda p: reference.kd(p, tau), p)


@identity(F.knowledge_distillation, p=tensors("n t v", n=st.integers(2, 4)), tau=temperatures)
def kd_gradient_is_n_z_minus_s(kd: Function, p: Tensor, tau: float) -> None:
    close(gradients(lambda p: kd(p, temperature=tau), p)[0], reference.kd_gradient(p, tau))


@identity(F.knowledge_distillation, p=tensors("n t v"), shift=tensors("n"), tau=temperatures)
def kd_ignores_row_shifts(kd: Function, p: Tensor, shift: Tensor, tau: float) -> None:
    shifts = shift[0] * torch.arange(p.shape[0] * p.shape[1]).reshape(*p.shape[:2], 1)  # its own for every row
    close(kd(p + shifts, temperature=tau), kd(p, temperature=tau))
    (grad,) = gradients(lambda p: kd(p, temperature=tau), p)
    close(grad.sum(dim=-1), torch.zeros_like(grad[..., 0]))


@identity(F.knowledge_distillation, p=tensors("n t v"), tau=temperatures, seed=seeds)
def kd_commutes_with_permutations(kd: Function, p: Tensor, tau: float, seed: int) -> None:
    n, t, v = (permutation(size, seed + i) for i, size in enumerate(p.shape))
    permuted = p[n][:, t][..., v]
    close(kd(permuted, temperature=tau), kd(p, temperature=tau))
    (grad,), (want,) = (gradients(lambda p: kd(p, temperature=tau), x) for x in (permuted, p))
    close(grad, want[n][:, t][..., v])


@identity(F.knowledge_distillation, p=tensors("n t v", n=st.just(1)), tau=temperatures)
def kd_is_zero_for_one_member(kd: Function, p: Tensor, tau: float) -> None:
    assert kd(p, temperature=tau) == 0
    assert (gradients(lambda p: kd(p, temperature=tau), p)[0] == 0).all()


@identity(F.knowledge_distillation, p=tensors("n t v", n=st.just(1)), tau=temperatures)
def kd_is_zero_for_identical_members(kd: Function, p: Tensor, tau: float) -> None:
    same = p.repeat(3, 1, 1)
    close(kd(same, temperature=tau), p.new_zeros(()), 1e-12)
    close(gradients(lambda p: kd(p, temperature=tau), same)[0], torch.zeros_like(same), 1e-12)


@identity(F.knowledge_distillation, p=tensors("n t v"), tau=temperatures)
def kd_is_never_negative(kd: Function, p: Tensor, tau: float) -> None:
    assert kd(p, temperature=tau) >= -1e-12


@identity(F.knowledge_distillation, p=tensors("n t v"), tau=temperatures)
def kd_is_a_mean_over_targets(kd: Function, p: Tensor, tau: float) -> None:
    close(kd(p.repeat(1, 3, 1), temperature=tau), kd(p, temperature=tau))


@identity(F.knowledge_distillation, p=tensors("n t v", n=st.integers(2, 4)))
def kd_at_high_temperature_is_squared_distance(kd: Function, p: Tensor) -> None:
    # KL(p/tau || q/tau) -> Var_v(p - q) / (2 tau^2), the variance over equally likely items.
    tau = 1e4
    centred = p - p.mean(dim=-1, keepdim=True)
    limit = sum((x - y).square().mean(dim=-1).mean() for x in centred for y in centred)
    close(kd(p, temperature=tau) * tau**2, torch.as_tensor(limit) / 2, 3e-3)


@identity(F.knowledge_distillation, p=tensors("n t v"), tau=temperatures)
def kd_takes_tau_squared_when_asked(kd: Function, p: Tensor, tau: float) -> None:
    scaled = partial(kd, temperature=tau, scale_by_temperature_squared=True)
    agree(scaled, lambda p: reference.kd(p, tau) * tau**2, p)


@identity(F.knowledge_distillation, p=tensors("n t v"), tau=temperatures)
def kd_survives_extreme_logits(kd: Function, p: Tensor, tau: float) -> None:
    finite(partial(kd, temperature=tau), extreme(p))


@identity(F.knowledge_distillation, p=tensors("n t v"), tau=temperatures)
def kd_leaves_no_trace(kd: Function, p: Tensor, tau: float) -> None:
    leaves_no_trace(partial(kd, temperature=tau), p)


# Contrastive learning, Eqs. 12-15.

CONTRAST = {"case": representations(), "tau": temperatures}
Representations = tuple[Tensor, Tensor]


@identity(F.contrast, **CONTRAST, variant=st.sampled_from(["paper", "reference_code"]))
def contrast_is_the_definition(contrast: Function, case: Representations, tau: float, variant: str) -> None:
    def got(a: Tensor, p: Tensor) -> Tensor:
        return torch.stack([*contrast(a, p, temperature=tau, variant=variant)])

    def want(a: Tensor, p: Tensor) -> Tensor:
        return torch.stack(reference.contrast(a, p, tau, code=variant == "reference_code"))

    mix = torch.tensor([1.0, 0.7], dtype=torch.float64)  # else the two gradients could hide each other's errors
    agree(lambda a, p: got(a, p) * mix, lambda a, p: want(a, p) * mix, *case)


@identity(F.contrast, **CONTRAST, seed=seeds)
def contrast_commutes_with_permutations(contrast: Function, case: Representations, tau: float, seed: int) -> None:
    anchors, views = case
    n, b, e = (permutation(size, seed + i) for i, size in enumerate(anchors.shape))
    m = permutation(views.shape[1], seed)
    moved = contrast(anchors[n][:, b][..., e], views[n][:, m][:, :, b][..., e], temperature=tau)
    for got, want in zip(moved, contrast(*case, temperature=tau), strict=True):
        close(got, want)


@identity(F.contrast, case=representations(n=st.just(1)), tau=temperatures)
def ccl_between_twins_is_icl(contrast: Function, case: Representations, tau: float) -> None:
    # Two equal members: ICL has the pairs (1, 1), (2, 2) and CCL the pairs (1, 2), (2, 1), all of them alike.
    icl, _ = contrast(*case, temperature=tau)
    twins = contrast(*(x.repeat(2, *[1] * (x.ndim - 1)) for x in case), temperature=tau)
    close(twins[0], 2 * icl)
    close(twins[1], 2 * icl)


@identity(F.contrast, case=representations(n=st.just(1)), tau=temperatures)
def ccl_is_zero_for_one_member(contrast: Function, case: Representations, tau: float) -> None:
    assert contrast(*case, temperature=tau)[1] == 0
    for grad in gradients(lambda a, p: contrast(a, p, temperature=tau)[1], *case):
        assert (grad == 0).all()


@identity(F.contrast, **CONTRAST, scale=st.floats(0.01, 100))
def contrast_ignores_scale(contrast: Function, case: Representations, tau: float, scale: float) -> None:
    anchors, views = case
    factors = torch.linspace(1, scale, anchors.shape[1], dtype=torch.float64)[:, None]  # its own for every sequence
    for i, want in enumerate(contrast(anchors, views, temperature=tau)):
        close(contrast(anchors * factors, views * factors.flip(0), temperature=tau)[i], want)
    grad, _ = gradients(lambda a, p: torch.stack([*contrast(a, p, temperature=tau)]), anchors, views)
    close((grad * anchors).sum(dim=-1), torch.zeros_like(grad[..., 0]))  # no pull along the vector itself


@identity(F.contrast, case=representations())
def contrast_at_high_temperature_counts_negatives(contrast: Function, case: Representations) -> None:
    n, m, b, _ = case[1].shape
    icl, ccl = contrast(*case, temperature=1e7)
    one = icl.new_tensor(m * math.log(b - 1))
    close(icl, n * one, 1e-4)
    close(ccl, n * (n - 1) * one, 1e-4)


@identity(F.contrast, **CONTRAST)
def contrast_adds_up_over_views(contrast: Function, case: Representations, tau: float) -> None:
    anchors, views = case
    one_by_one = [contrast(anchors, views[:, i : i + 1], temperature=tau) for i in range(views.shape[1])]
    for got, *parts in zip(contrast(anchors, views, temperature=tau), *one_by_one, strict=True):
        close(got, torch.stack(parts).sum())


@identity(F.contrast, **CONTRAST)
def contrast_takes_negatives_from_anchors_only(contrast: Function, case: Representations, tau: float) -> None:
    # User 0's own views leave alone what the other users lose.
    anchors, views = case
    (grad,) = gradients(lambda p: torch.stack([*contrast(anchors, p, temperature=tau)]), views)
    moved = views.clone()
    moved[:, :, 0] = -views[:, :, 0]
    (after,) = gradients(lambda p: torch.stack([*contrast(anchors, p, temperature=tau)]), moved)
    close(after[:, :, 1:], grad[:, :, 1:])


@identity(F.contrast, **CONTRAST)
def contrast_derives_itself(contrast: Function, case: Representations, tau: float) -> None:
    derives_itself(lambda a, p: tuple(contrast(a, p, temperature=max(tau, 0.3))), *(x + 0.5 * x.sign() for x in case))


@identity(F.contrast, **CONTRAST)
def contrast_survives_zero_and_huge_vectors(contrast: Function, case: Representations, tau: float) -> None:
    anchors, views = (extreme(x) for x in case)
    anchors[:, 0] = 0
    finite(lambda a, p: torch.stack([*contrast(a, p, temperature=tau)]), anchors, views)


@identity(F.contrast, **CONTRAST)
def contrast_leaves_no_trace(contrast: Function, case: Representations, tau: float) -> None:
    leaves_no_trace(partial(contrast, temperature=tau), *case)


# H(s), one vector a sequence.

POOLS = st.sampled_from(["flatten", "mean", "last"])


@identity(F.pool_sequence, case=encoded(), kind=POOLS)
def pool_is_the_definition(pool: Function, case: Encoded, kind: str) -> None:
    hidden, real = case
    agree(lambda h: pool(h, real, pool=kind), lambda h: reference.pooled(h, real, kind), hidden)


@identity(F.pool_sequence, case=encoded(), kind=POOLS)
def pool_ignores_what_stands_at_padding(pool: Function, case: Encoded, kind: str) -> None:
    hidden, real = case
    other = hidden.where(real[..., None], 7.0 - hidden)
    close(pool(other, real, pool=kind), pool(hidden, real, pool=kind))
    (grad,) = gradients(lambda h: pool(h, real, pool=kind).square(), hidden)
    assert (grad[:, ~real] == 0).all()


@identity(F.pool_sequence, case=encoded(), kind=POOLS, columns=st.integers(1, 3), tau=temperatures)
def pool_ignores_columns_of_padding(pool: Function, case: Encoded, kind: str, columns: int, tau: float) -> None:
    hidden, real = case
    n, b, _, d = hidden.shape
    longer = torch.cat([hidden.new_full((n, b, columns, d), 3.0), hidden], dim=2)
    wider = torch.cat([real.new_zeros(b, columns), real], dim=1)

    def loss(h: Tensor, r: Tensor) -> Tensor:
        vectors = pool(h, r, pool=kind)
        return torch.stack([*F.contrast(vectors, vectors[:, None].flip(2), temperature=tau)])

    close(loss(longer, wider), loss(hidden, real))
    close(gradients(lambda h: loss(h, wider), longer)[0][:, :, columns:], gradients(lambda h: loss(h, real), hidden)[0])


@identity(F.pool_sequence, case=encoded(), kind=POOLS)
def pool_leaves_no_trace(pool: Function, case: Encoded, kind: str) -> None:
    leaves_no_trace(partial(pool, pool=kind), *case)


# Attribute prediction, Eqs. 9-11.


@identity(F.attribute_cross_entropy, case=tagged())
def ap_is_the_definition(ap: Function, case: Tagged) -> None:
    agree(
        lambda p: ap(p, case.attributes, case.real), lambda p: reference.ap(p, case.attributes, case.real), case.logits
    )


@identity(F.attribute_cross_entropy, case=tagged())
def ap_of_zero_logits_is_log_2(ap: Function, case: Tagged) -> None:
    zeros = torch.zeros_like(case.logits)
    close(ap(zeros, case.attributes, case.real), zeros.new_full((len(zeros),), math.log(2)))


@identity(F.attribute_cross_entropy, case=tagged(), columns=st.integers(1, 3))
def ap_ignores_padding(ap: Function, case: Tagged, columns: int) -> None:
    p, attributes, real = case
    longer = torch.cat([p.new_full((len(p), columns, p.shape[2]), 2.0), p], dim=1)
    more = torch.cat([attributes.new_zeros(columns, attributes.shape[1]), attributes])
    wider = torch.cat([real.new_zeros(columns), real])
    close(ap(longer, more, wider), ap(p, attributes, real))
    (grad,) = gradients(lambda p: ap(p, more, wider), longer)
    assert (grad[:, ~wider] == 0).all()
    close(grad[:, columns:], gradients(lambda p: ap(p, attributes, real), p)[0])


@identity(F.attribute_cross_entropy, case=tagged())
def ap_ignores_fillers(ap: Function, case: Tagged) -> None:
    p, attributes, real = case
    attributes = attributes.amax(dim=1, keepdim=True).clamp(min=0)  # one attribute each, no filler
    filler = torch.full_like(attributes, -1)
    filled = torch.cat([filler, attributes, filler], dim=1)
    agree(lambda p: ap(p, filled, real), lambda p: ap(p, attributes, real), p)


@identity(F.attribute_cross_entropy, case=tagged(), seed=seeds)
def ap_commutes_with_permutations(ap: Function, case: Tagged, seed: int) -> None:
    p, attributes, real = case
    n, t = (permutation(size, seed + i) for i, size in enumerate(p.shape[:2]))
    close(ap(p[n][:, t], attributes[t], real[t]), ap(p, attributes, real)[n])


@identity(F.attribute_cross_entropy, case=tagged())
def ap_derives_itself(ap: Function, case: Tagged) -> None:
    derives_itself(lambda p: ap(p, case.attributes, case.real), case.logits)


@identity(F.attribute_cross_entropy, case=tagged())
def ap_survives_extreme_logits(ap: Function, case: Tagged) -> None:
    finite(lambda p: ap(p, case.attributes, case.real), extreme(case.logits))


@identity(F.attribute_cross_entropy, case=tagged())
def ap_leaves_no_trace(ap: Function, case: Tagged) -> None:
    leaves_no_trace(ap, *case)


# Losses without logits: what both of them owe to their one walk over tiles.

WRONG: dict[str, Callable[[Any], dict[str, Any]]] = {
    "target -1": lambda case: {"targets": case.targets.index_fill(0, torch.tensor(0), -1)},
    "target v": lambda case: {"targets": case.targets.index_fill(0, torch.tensor(0), case.weight.shape[1])},
    "targets of another type": lambda case: {"targets": case.targets.int()},
    "a target too many": lambda case: {"targets": torch.cat([case.targets, case.targets[:1]])},
    "no targets": lambda case: {"hidden": case.hidden[:, :0], "targets": case.targets[:0], "valid": None},
    "valid of another type": lambda case: {"valid": torch.ones(len(case.targets))},
    "hidden of whole numbers": lambda case: {"hidden": case.hidden.long()},
    "temperature 0": lambda case: {"temperature": 0},
    "temperature -1": lambda case: {"temperature": -1.0},
    "temperature nan": lambda case: {"temperature": math.nan},
    "temperature inf": lambda case: {"temperature": math.inf},
    "tile_rows 0": lambda case: {"tile_rows": 0},
    "tile_rows -2": lambda case: {"tile_rows": -2},
}


def refuses_bad_input(loss: Function, case: Any, **options: Any) -> None:
    """Each wrong argument ends in the library's own error."""
    for wrong, change in WRONG.items():
        try:
            loss(**(case._asdict() | options | change(case)))
        except EnsembleKDError:
            continue
        except Exception as error:
            raise AssertionError(f"{wrong}: a raw {error!r}") from error
        raise AssertionError(f"{wrong}: accepted")


def gives_gradients_twice(total: Function, *inputs: Tensor) -> None:
    """A second backward repeats the first, and both scale with what comes from above."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = total(*leaves)
    once, scaled, again = (
        torch.autograd.grad(factor * value, leaves, retain_graph=True, materialize_grads=True)
        for factor in (1.0, -3.0, 1.0)
    )
    for x, y, z in zip(once, scaled, again, strict=True):
        close(y, -3 * x)
        close(z, x)


def never_mistakes_a_second_derivative(total: Function, definition: Function, *inputs: Tensor) -> None:
    """It is refused or right, not silently 0."""

    def second(f: Function) -> Tensor:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        (first,) = torch.autograd.grad(f(*leaves), leaves[:1], create_graph=True)
        assert first.requires_grad, "the first derivative is a constant"
        return torch.autograd.grad(first.square().sum(), leaves[0])[0]

    try:
        got = second(total)
    except EnsembleKDError:
        return
    close(got, second(definition))


# Cross-entropy and distillation in one pass.

eager = partial(item_losses, compiled=False)
FUSED = {"case": classified(), "tau": st.sampled_from([0.3, 1.0, 2.5])}


def fused_total(fused: Function, case: Classified, **options: Any) -> Function:
    """The differentiable total as a function of hidden, weight and bias (0 where there is none)."""

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        losses: ItemLosses = fused(
            hidden, weight, None if case.bias is None else bias, case.targets, valid=case.valid, **options
        )
        return losses.total

    return total


def differentiable(case: Classified) -> tuple[Tensor, Tensor, Tensor]:
    return case.hidden, case.weight, case.hidden.new_zeros(()) if case.bias is None else case.bias


def fused_definition(case: Classified, tau: float, lam: float, mu: float) -> Function:
    kept = torch.ones(len(case.targets), dtype=torch.bool) if case.valid is None else case.valid

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        p = reference.logits(hidden[:, kept], weight, None if case.bias is None else bias)
        return lam * reference.mip(p, case.targets[kept]).sum() + mu * reference.kd(p, tau)

    return total


@identity(eager, **FUSED, lam=weights, mu=weights)
def fused_is_the_definition(fused: Function, case: Classified, tau: float, lam: float, mu: float) -> None:
    total = fused_total(fused, case, ce_weight=lam, kd_weight=mu, temperature=tau)
    agree(total, fused_definition(case, tau, lam, mu), *differentiable(case))


@identity(eager, **FUSED, squared=st.booleans())
def fused_is_unfused(fused: Function, case: Classified, tau: float, squared: bool) -> None:
    hidden, weight, bias, targets, valid = case
    options: dict[str, Any] = {"temperature": tau, "scale_by_temperature_squared": squared}
    losses: ItemLosses = fused(*case[:4], valid=valid, compute_kd=True, **options)
    kept = slice(None) if valid is None else valid
    logits = hidden[:, kept] @ weight.mT + (0 if bias is None else bias[:, None])
    close(losses.cross_entropy, F.item_cross_entropy(logits, targets[kept]))
    close(losses.kd, F.knowledge_distillation(logits, **options))
    close(losses.total, losses.cross_entropy.sum())


@identity(eager, **FUSED, rows=st.integers(1, 7))
def fused_tiles_of_any_size_agree(fused: Function, case: Classified, tau: float, rows: int) -> None:
    options: dict[str, Any] = {"kd_weight": 0.5, "temperature": tau}
    tiled, whole = (fused_total(fused, case, tile_rows=size, **options) for size in (rows, None))
    agree(tiled, whole, *differentiable(case))


@identity(eager, **FUSED, lam=weights, mu=weights)
def fused_total_is_linear(fused: Function, case: Classified, tau: float, lam: float, mu: float) -> None:
    both = fused_total(fused, case, ce_weight=lam, kd_weight=mu, temperature=tau)
    ce = fused_total(fused, case, temperature=tau)
    kd = fused_total(fused, case, ce_weight=0.0, kd_weight=1.0, temperature=tau)
    agree(both, lambda *x: lam * ce(*x) + mu * kd(*x), *differentiable(case))


@identity(eager, **FUSED)
def fused_skips_invalid_targets(fused: Function, case: Classified, tau: float) -> None:
    spoilt = case.hidden.clone()
    kept = torch.ones(len(case.targets), dtype=torch.bool) if case.valid is None else case.valid
    spoilt[:, ~kept] = torch.nan
    options: dict[str, Any] = {"kd_weight": 0.5, "temperature": tau}
    short = case._replace(hidden=case.hidden[:, kept], targets=case.targets[kept], valid=None)
    got = gradients(fused_total(fused, case, **options), *differentiable(case._replace(hidden=spoilt)))
    want = gradients(fused_total(fused, short, **options), *differentiable(short))
    close(got[0][:, kept], want[0])
    assert (got[0][:, ~kept] == 0).all()
    close(got[1], want[1])
    close(got[2], want[2])


@identity(eager, **FUSED)
def fused_derives_itself(fused: Function, case: Classified, tau: float) -> None:
    derives_itself(
        fused_total(fused, case), *differentiable(case)
    )  # KD cuts teachers off: no finite difference sees that


@identity(eager, **FUSED)
def fused_survives_extreme_logits(fused: Function, case: Classified, tau: float) -> None:
    hidden, weight, bias = (x.sign().float() for x in differentiable(case))
    total = fused_total(fused, case, kd_weight=0.5, temperature=tau)
    finite(total, 100 * hidden, 100 * weight, bias)


@identity(eager, **FUSED)
def fused_leaves_no_trace(fused: Function, case: Classified, tau: float) -> None:
    leaves_no_trace(lambda h, w, c, y, ok: fused(h, w, c, y, valid=ok, kd_weight=0.5, temperature=tau), *case)


@identity(eager, **FUSED)
def fused_refuses_bad_input(fused: Function, case: Classified, tau: float) -> None:
    refuses_bad_input(fused, case, kd_weight=0.5, temperature=tau)


@identity(eager, **FUSED)
def fused_gives_gradients_twice(fused: Function, case: Classified, tau: float) -> None:
    gives_gradients_twice(fused_total(fused, case, kd_weight=0.5, temperature=tau), *differentiable(case))


@identity(eager, **FUSED)
def fused_never_mistakes_a_second_derivative(fused: Function, case: Classified, tau: float) -> None:
    total = fused_total(fused, case, kd_weight=0.5, temperature=tau)
    never_mistakes_a_second_derivative(total, fused_definition(case, tau, 1.0, 0.5), *differentiable(case))


# Students of a fixed teacher, likewise.

taught_eagerly = partial(distillation_losses, compiled=False)
TAUGHT = {"case": lessons(), "tau": st.sampled_from([0.3, 1.0, 2.5])}


def taught_total(taught: Function, case: Lesson, **options: Any) -> Function:
    """The differentiable total as a function of the students' hidden states, weights and biases."""

    def total(*students: Tensor) -> Tensor:
        losses: ItemLosses = taught(*students, *case[3:7], valid=case.valid, **options)
        return losses.total

    return total


def taught_definition(case: Lesson, tau: float, lam: float, mu: float) -> Function:
    kept = torch.ones(len(case.targets), dtype=torch.bool) if case.valid is None else case.valid
    teacher = reference.logits(case.queries[None, kept], case.keys[None], case.key_bias[None])

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        p = reference.logits(hidden[:, kept], weight, bias)
        pairs = [reference.kd(torch.cat([student[None], teacher]), tau) for student in p]
        return lam * reference.mip(p, case.targets[kept]).sum() + mu * torch.stack(pairs).sum()

    return total


@identity(taught_eagerly, **TAUGHT, lam=weights, mu=weights, squared=st.booleans())
def taught_is_kd_with_one_that_does_not_learn(
    taught: Function, case: Lesson, tau: float, lam: float, mu: float, squared: bool
) -> None:
    options = {"ce_weight": lam, "kd_weight": mu, "temperature": tau, "scale_by_temperature_squared": squared}
    want = taught_definition(case, tau, lam, mu * (tau**2 if squared else 1.0))
    agree(taught_total(taught, case, **options), want, *case[:3])


@identity(taught_eagerly, **TAUGHT)
def taught_reports_what_it_adds_up(taught: Function, case: Lesson, tau: float) -> None:
    losses: ItemLosses = taught(*case[:7], valid=case.valid, ce_weight=0.7, kd_weight=0.4, temperature=tau)
    kept = slice(None) if case.valid is None else case.valid
    logits = case.hidden[:, kept] @ case.weight.mT + case.bias[:, None]
    close(losses.cross_entropy, F.item_cross_entropy(logits, case.targets[kept]))
    close(losses.total, 0.7 * losses.cross_entropy.sum() + 0.4 * losses.kd)


@identity(taught_eagerly, **TAUGHT, rows=st.integers(1, 7))
def taught_tiles_of_any_size_agree(taught: Function, case: Lesson, tau: float, rows: int) -> None:
    tiled, whole = (taught_total(taught, case, tile_rows=size, temperature=tau) for size in (rows, None))
    agree(tiled, whole, *case[:3])


@identity(taught_eagerly, **TAUGHT)
def taught_students_do_not_meet(taught: Function, case: Lesson, tau: float) -> None:
    def one_by_one(*students: Tensor) -> Tensor:
        alone = (taught_total(taught, case, temperature=tau)(*(x[i : i + 1] for x in students)) for i in range(n))
        return torch.stack(list(alone)).sum()

    n = len(case.hidden)
    agree(taught_total(taught, case, temperature=tau), one_by_one, *case[:3])


@identity(taught_eagerly, **TAUGHT)
def taught_by_itself_it_learns_nothing(taught: Function, case: Lesson, tau: float) -> None:
    own = case._replace(queries=case.hidden[0], keys=case.weight[0], key_bias=case.bias[0])
    first = tuple(x[:1] for x in case[:3])
    total = taught_total(taught, own, ce_weight=0.0, temperature=tau)
    for value in value_and_gradients(total, *first):
        close(value, torch.zeros_like(value))


@identity(taught_eagerly, **TAUGHT)
def taught_skips_invalid_targets(taught: Function, case: Lesson, tau: float) -> None:
    kept = torch.ones(len(case.targets), dtype=torch.bool) if case.valid is None else case.valid
    hidden, queries = case.hidden.clone(), case.queries.clone()
    hidden[:, ~kept], queries[~kept] = torch.nan, torch.nan
    spoilt = case._replace(hidden=hidden, queries=queries)
    short = case._replace(
        hidden=case.hidden[:, kept], queries=case.queries[kept], targets=case.targets[kept], valid=None
    )
    got = value_and_gradients(taught_total(taught, spoilt, temperature=tau), *spoilt[:3])
    want = value_and_gradients(taught_total(taught, short, temperature=tau), *short[:3])
    close(got[1][:, kept], want[1])
    assert (got[1][:, ~kept] == 0).all()
    for i in (0, 2, 3):
        close(got[i], want[i])


@identity(taught_eagerly, **TAUGHT)
def taught_survives_extreme_logits(taught: Function, case: Lesson, tau: float) -> None:
    single = case._replace(**{name: x.sign().float() for name, x in case._asdict().items() if x is not None})
    single = single._replace(
        targets=case.targets, valid=case.valid, queries=100 * single.queries, keys=-100 * single.keys
    )
    hidden, weight, bias = single[:3]
    finite(taught_total(taught, single, temperature=tau), 100 * hidden, 100 * weight, bias)


@identity(taught_eagerly, **TAUGHT)
def taught_leaves_no_trace(taught: Function, case: Lesson, tau: float) -> None:
    leaves_no_trace(lambda *parts: taught(*parts[:7], valid=parts[7], temperature=tau), *case)


@identity(taught_eagerly, **TAUGHT)
def taught_refuses_bad_input(taught: Function, case: Lesson, tau: float) -> None:
    refuses_bad_input(taught, case, temperature=tau)


@identity(taught_eagerly, **TAUGHT)
def taught_gives_gradients_twice(taught: Function, case: Lesson, tau: float) -> None:
    gives_gradients_twice(taught_total(taught, case, temperature=tau), *case[:3])


@identity(taught_eagerly, **TAUGHT)
def taught_never_mistakes_a_second_derivative(taught: Function, case: Lesson, tau: float) -> None:
    total = taught_total(taught, case, temperature=tau)
    never_mistakes_a_second_derivative(total, taught_definition(case, tau, 1.0, 1.0), *case[:3])


# Weights of losses.


def weigh(loss: Loss) -> list[tuple[float, Loss]]:
    """The terms with their weights."""
    return list(loss.weighted())


TERMS = [AP(), ICL(), ICL(temperature=1.0), CCL(pool="mean"), KD(), KD(temperature=2.0)]
sums = st.lists(st.tuples(weights, st.sampled_from(TERMS)), min_size=1, max_size=4).map(
    lambda terms: sum((w * term for w, term in terms), start=0 * terms[0][1])
)


@identity(weigh, first=sums, second=sums, a=weights, b=weights)
def weights_are_linear(weigh: Function, first: Loss, second: Loss, a: float, b: float) -> None:
    def apply(loss: Loss) -> float:
        return math.fsum(w * (2 + TERMS.index(term)) for w, term in weigh(loss))

    assert math.isclose(
        apply(a * first + b * second), a * apply(first) + b * apply(second), rel_tol=1e-9, abs_tol=1e-300
    )


# Ranks over the whole item set.


def _excluded(case: Ranking, user: int) -> set[int]:
    return set() if case.exclude is None else set(case.exclude[user].tolist())


@identity(ranks, case=rankings())
def rank_is_a_count_of_rivals(ranks: Function, case: Ranking) -> None:
    got = ranks(*case)
    for n, member in enumerate(case.scores.tolist()):
        for b, row in enumerate(member):
            assert got[n, b] == reference.rank(row, int(case.target[b]), _excluded(case, b))


@identity(ranks, case=rankings())
def rank_of_a_constant_scorer_is_last(ranks: Function, case: Ranking) -> None:
    flat = torch.zeros_like(case.scores)
    assert (ranks(flat, case.target) == flat.shape[-1] - 2).all()


@identity(ranks, case=rankings())
def rank_of_the_best_is_zero(ranks: Function, case: Ranking) -> None:
    at = case.target.expand(case.scores.shape[:2])[..., None]
    assert (ranks(case.scores.scatter(2, at, 100.0), case.target, case.exclude) == 0).all()


@identity(ranks, case=rankings())
def rank_never_counts_padding(ranks: Function, case: Ranking) -> None:
    high, low = case.scores.clone(), case.scores.clone()
    high[..., 0], low[..., 0] = 100.0, -100.0
    assert torch.equal(ranks(high, case.target, case.exclude), ranks(low, case.target, case.exclude))


@identity(ranks, case=rankings())
def rank_ignores_an_excluded_target(ranks: Function, case: Ranking) -> None:
    own = case.target[:, None]
    exclude = own if case.exclude is None else torch.cat([case.exclude, own], dim=1)
    assert torch.equal(ranks(case.scores, case.target, exclude), ranks(*case))


@identity(ranks, case=rankings())
def rank_leaves_no_trace(ranks: Function, case: Ranking) -> None:
    leaves_no_trace(ranks, *case)


# Masks, Eq. 3, and next items.

MASK = 99


def masked_item(item_ids: Tensor, mask_ratio: float, views: int, newest: float | None, seed: int) -> Draw:
    """A draw of MaskedItem under a seed."""
    objective = MaskedItem(mask_ratio=mask_ratio, views=views, newest=newest)
    return objective.draw(item_ids, mask_token=MASK, generator=torch.Generator().manual_seed(seed))


NEWEST = st.sampled_from([None, 0.0, 0.5, 1.0])


@identity(masked_item, case=maskings(), newest=NEWEST)
def mask_count_is_the_ceiling(masked_item: Function, case: Masking, newest: float | None) -> None:
    masked = masked_item(case.item_ids, case.mask_ratio, case.views, newest, case.seed).inputs == MASK
    for b, real in enumerate((case.item_ids != 0).sum(dim=1).tolist()):
        assert (masked[:, b].sum(dim=1) == reference.mask_count(case.mask_ratio, real)).all()


@identity(masked_item, case=maskings(), newest=NEWEST)
def mask_never_falls_on_padding(masked_item: Function, case: Masking, newest: float | None) -> None:
    inputs = masked_item(case.item_ids, case.mask_ratio, case.views, newest, case.seed).inputs
    assert inputs.shape == (case.views, *case.item_ids.shape)
    assert (inputs[:, case.item_ids == 0] == 0).all()


@identity(masked_item, case=maskings(), newest=NEWEST)
def mask_targets_are_what_it_hides(masked_item: Function, case: Masking, newest: float | None) -> None:
    draw = masked_item(case.item_ids, case.mask_ratio, case.views, newest, case.seed)
    keep = slice(None) if draw.valid is None else draw.valid
    at = draw.positions[keep]
    hidden = torch.zeros(draw.inputs.numel(), dtype=torch.bool)
    hidden[at] = True
    original = case.item_ids.expand(case.views, -1, -1).flatten()
    assert len(at) == hidden.sum(), "a position is drawn twice"
    assert torch.equal(draw.inputs.flatten(), original.masked_fill(hidden, MASK))
    assert torch.equal(draw.targets[keep], original[at])
    assert torch.equal(draw.anchor, case.item_ids)


@identity(masked_item, case=maskings(), newest=NEWEST)
def mask_repeats_from_a_generator(masked_item: Function, case: Masking, newest: float | None) -> None:
    arguments = (case.item_ids, case.mask_ratio, case.views, newest, case.seed)
    leaves_no_trace(lambda ids: masked_item(ids, *arguments[1:]), case.item_ids)
    assert torch.equal(masked_item(*arguments).inputs, masked_item(*arguments).inputs)


@identity(masked_item, seed=seeds)
def mask_differs_between_views_and_sequences(masked_item: Function, seed: int) -> None:
    inputs = masked_item(torch.ones(8, 20, dtype=torch.int64), 0.5, 2, None, seed).inputs
    assert not torch.equal(inputs[0], inputs[1])  # equal by chance once in 10^42
    assert not torch.equal(inputs[0, :4], inputs[0, 4:])


@identity(masked_item, seed=seeds)
def mask_falls_on_every_position_alike(masked_item: Function, seed: int) -> None:
    b, length, ratio = 2000, 5, 0.4
    share = (
        (masked_item(torch.ones(b, length, dtype=torch.int64), ratio, 1, None, seed).inputs == MASK)
        .double()
        .mean((0, 1))
    )
    assert ((share - ratio).abs() < 6 * math.sqrt(ratio * (1 - ratio) / b)).all()


@identity(masked_item, seed=seeds, newest=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def mask_hides_the_newest_as_often_as_asked(masked_item: Function, seed: int, newest: float) -> None:
    b = 2000
    inputs = masked_item(torch.ones(b, 5, dtype=torch.int64), 0.4, 1, newest, seed).inputs
    share = float((inputs[..., -1] == MASK).double().mean())
    assert abs(share - newest) <= 6 * math.sqrt(newest * (1 - newest) / b)


def next_item(item_ids: Tensor, views: int) -> Draw:
    """A draw of NextItem."""
    return NextItem(views=views).draw(item_ids, mask_token=MASK)


@identity(next_item, case=maskings())
def next_item_targets_follow_their_inputs(next_item: Function, case: Masking) -> None:
    if case.item_ids.shape[1] < 2:
        return
    draw = next_item(case.item_ids, case.views)
    keep = slice(None) if draw.valid is None else draw.valid
    got = list(zip(draw.positions[keep].tolist(), draw.targets[keep].tolist(), strict=True))
    want, at = [], 0
    for row in case.item_ids.tolist() * case.views:
        for item, following in pairwise(row):
            want += [(at, following)] if item else []
            at += 1
    assert sorted(got) == want
    assert torch.equal(draw.inputs, case.item_ids[:, :-1].expand(case.views, -1, -1))


# One training step, Eq. 19, on an encoder that knows neither positions nor padding.


class Running(nn.Module):
    """h_t = tanh(e_t + half the mean of the e_s before it)."""

    def __init__(self) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(ITEMS + 2, 3, dtype=torch.float64)

    def forward(self, item_ids: Tensor) -> Tensor:
        real = (item_ids != 0)[..., None].double()
        e, count = self.item_embedding(item_ids) * real, real.cumsum(dim=1).clamp(min=1)
        return torch.tanh(e + e.cumsum(dim=1) / (2 * count))


class Last(Running):
    """One vector per sequence, (b, d): the newest state."""

    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids)[:, -1]


class Attributes(NamedTuple):
    num_attributes: int
    table: Tensor


ITEMS = 9
TABLE = torch.tensor(
    [[-1, -1], [0, -1], [1, -1], [0, 1], [2, -1], [-1, -1], [2, 0], [1, 2], [0, -1], [1, -1], [-1, -1]]
)
ALL = AP() + 0.5 * (ICL() + CCL(temperature=1.0, pool="mean")) + 2.0 * KD(temperature=0.5)
OBJECTIVES: list[MaskedItem | NextItem] = [
    NextItem(),
    NextItem(views=2),
    NextItem(views=2, mask_ratio=0.4),
    MaskedItem(mask_ratio=0.3, views=1, newest=None),
    MaskedItem(mask_ratio=0.6, views=3, newest=0.5),
]


@cache
def small_model(
    n: int,
    objective: MaskedItem | NextItem,
    encoder: type[Running] = Running,
    classifier: Literal["linear", "tied"] = "linear",
) -> EnsembleKD:
    """Built once; checks set the losses that they need."""
    settings: dict[str, Any] = {"item_attributes": Attributes(3, TABLE), "classifier": classifier}
    model = EnsembleKD(encoder, n=n, num_items=ITEMS, objective=objective, losses=0, **settings).double()
    with torch.no_grad():
        for parameter in model.parameters():  # heads start near 0, where many faults are too small to see
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return model


def model_step(model: EnsembleKD, item_ids: Tensor, seed: int) -> Step:
    """A step whose masks come from a seed."""
    return model.loss(item_ids, generator=torch.Generator().manual_seed(seed))


STEP = {"ids": sequences(ITEMS), "n": st.integers(1, 3), "objective": st.sampled_from(OBJECTIVES), "seed": seeds}


BUILT = [(objective, Running, "linear") for objective in OBJECTIVES]
BUILT += [(objective, Running, "tied") for objective in OBJECTIVES]
BUILT += [(objective, Last, classifier) for objective in OBJECTIVES[:2] for classifier in ("linear", "tied")]


@identity(model_step, ids=sequences(ITEMS), n=st.integers(1, 3), built=st.sampled_from(BUILT), seed=seeds)
def step_is_what_the_oracles_add_up_to(step: Function, ids: Tensor, n: int, built: tuple[Any, ...], seed: int) -> None:
    model, (objective, _, _) = small_model(n, *built), built
    model.losses = ALL
    got: Step = step(model, ids, seed)
    generator = torch.Generator().manual_seed(seed)
    draw = objective.draw(ids, mask_token=model.mask_token, newest_only=model.newest_only, generator=generator)
    keep = slice(None) if draw.valid is None else draw.valid
    positions, targets = draw.positions[keep], draw.targets[keep] - 1
    (m, b, length), (weight, bias) = draw.inputs.shape, model.classifier_weights()
    views, anchor = model.hidden(draw.inputs.flatten(0, 1)), model.hidden(draw.anchor)
    states, size = views.reshape(n, -1, views.shape[-1]), b if model.newest_only else b * length
    want = {objective.name: torch.zeros((), dtype=torch.float64), "kd": torch.zeros((), dtype=torch.float64)}
    for view in range(m):
        here = positions // size == view
        p = reference.logits(states[:, positions[here]], weight, bias)
        want[objective.name] = want[objective.name] + reference.mip(p, targets[here]).sum()
        want["kd"] = want["kd"] + reference.kd(p, 0.5)
    head: Any = model.attribute_classifier
    items = draw.anchor_items.flatten()
    q = reference.logits(anchor.reshape(n, -1, anchor.shape[-1]), head.weight, head.bias)
    want["ap"] = reference.ap(q, TABLE[items], items != 0).sum()
    for name, tau, kind in (("icl", 0.3, "flatten"), ("ccl", 1.0, "mean")):
        a, h = anchor, views
        if not model.newest_only:
            a = reference.pooled(anchor, draw.anchor != 0, kind)
            h = reference.pooled(views, draw.inputs.flatten(0, 1) != 0, kind)
        want[name] = reference.contrast(a, h.unflatten(1, (m, b)), tau)[name == "ccl"]
    assert got.terms.keys() == want.keys()
    for name, value in want.items():
        close(got.terms[name].double(), value.detach())
        assert not got.terms[name].requires_grad
    total = want[objective.name] + want["ap"] + 0.5 * (want["icl"] + want["ccl"]) + 2.0 * want["kd"]
    close(got.total.detach().double(), total.detach())
    for slope, expected in zip(slopes(got.total, model), slopes(total, model), strict=True):
        close(slope, expected, 1e-7)


def slopes(total: Tensor, model: EnsembleKD) -> list[Tensor]:
    """The gradient of every parameter, 0 for one that takes no part."""
    model.zero_grad()
    total.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone().to_dense() for p in model.parameters()]


@identity(model_step, **STEP, a=weights, b=weights)
def step_is_linear_in_its_weights(
    step: Function, ids: Tensor, n: int, objective: MaskedItem | NextItem, seed: int, a: float, b: float
) -> None:
    model = small_model(n, objective)
    totals, gradients = [], []
    first, second = AP() + 0.5 * KD(), 2.0 * ICL() + CCL() + KD()
    chosen: list[Loss | Literal[0]] = [0, first, second, a * first + b * second]
    for losses in chosen:
        model.losses = losses
        total = step(model, ids, seed).total
        totals.append(total.detach())
        gradients.append(torch.cat([slope.flatten() for slope in slopes(total, model)]))
    for none, one, two, both in (totals, gradients):
        close(both - none, a * (one - none) + b * (two - none), 1e-7)


@identity(model_step, ids=sequences(ITEMS), n=st.integers(1, 3), columns=st.integers(1, 3))
def step_ignores_columns_of_padding(step: Function, ids: Tensor, n: int, columns: int) -> None:
    model = small_model(n, NextItem())
    model.losses = ALL
    wider = torch.cat([ids.new_zeros(len(ids), columns), ids], dim=1)
    close(step(model, wider, 0).total.detach(), step(model, ids, 0).total.detach())


@identity(model_step, ids=sequences(ITEMS), n=st.integers(1, 3), seed=seeds)
def step_ignores_the_order_of_sequences(step: Function, ids: Tensor, n: int, seed: int) -> None:
    model = small_model(n, NextItem())
    model.losses = ALL
    close(step(model, ids[permutation(len(ids), seed)], 0).total.detach(), step(model, ids, 0).total.detach())


@identity(model_step, **STEP)
def step_leaves_no_trace(step: Function, ids: Tensor, n: int, objective: MaskedItem | NextItem, seed: int) -> None:
    model = small_model(n, objective)
    model.losses = ALL
    leaves_no_trace(lambda ids, *_: step(model, ids, seed), ids, *(p.data for p in model.parameters()))


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity(name: str) -> None:
    IDENTITIES[name].hold(IDENTITIES[name].of)
