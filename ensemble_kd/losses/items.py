"""Cross-entropy of all members and KD between them, from hidden states and classifiers: no logits are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import choice, flag, number, tensor
from ensemble_kd.losses.autograd import tiled_losses
from ensemble_kd.losses.formula import Networks, Weight
from ensemble_kd.losses.pairs import Between, Gate, Pairs, Spread
from ensemble_kd.losses.peers import Part, Peers


class ItemLosses(NamedTuple):
    """The losses of a step's targets.

    Attributes:
        total: () differentiable: the weighted sum, ``ce_weight * cross_entropy.sum() + kd_weight * kd`` and so on.
        cross_entropy: (n,) detached: each member's mean over the targets (Eq. 6).
        kd: () detached: the sum over ordered pairs of members of means over the targets (Eqs. 16–18).
        ambiguity: () detached: the sum over members of means over the targets; 0 if it was not wanted.
    """

    total: Tensor
    cross_entropy: Tensor
    kd: Tensor
    ambiguity: Tensor = torch.zeros(())


def item_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    valid: Tensor | None = None,
    ce_weight: float = 1.0,
    kd_weight: Weight = 0.0,
    ambiguity_weight: Weight = 0.0,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    between: Between = "all",
    kinds: Sequence[int] | None = None,
    part: Part = "all",
    gate: Gate = "open",
    kd_bias: Tensor | None = None,
    compute_kd: bool | None = None,
    product_dtype: torch.dtype | None = None,
    tile_rows: int | None = None,
    compiled: bool | None = None,
    spread: Spread | None = None,
) -> ItemLosses:
    """Return the cross-entropy of every member and KD between all of them, in memory that is not targets × items.

    logits = hidden · weightᵀ + bias, and total = ce_weight · Σ_n CE_n + kd_weight · Σ_{x≠y} KL(z_x ‖ z_y) +
    ambiguity_weight · Σ_n KL(p_G ‖ p_n), means over the targets that count. Source: Eqs. 5–7 and 16–18, and
    ``functional.ambiguity``. Teachers are cut off from the gradient (Sec. 3.4.2). The gradients are computed in the
    forward pass, so they cannot be differentiated again.

    Args:
        hidden: (n, t, d) hidden states at the target positions.
        weight: (n, v, d) item classifiers; a view is fine.
        bias: (n, v), or None.
        targets: (t,) int64 class indices in [0, v).
        valid: (t,) bool, False where a target is padding and counts nowhere. With none valid all losses are 0.
        ce_weight: weight of the cross-entropy in ``total``.
        kd_weight: weight of KD in ``total``. At 0, KD is not computed. A tensor () on an accelerator is not read, and
            KD is computed, so that a graph of the step can be repeated with another weight.
        ambiguity_weight: weight of the ambiguity in ``total``; it may be negative. At 0, it is not computed. A tensor
            is taken as for KD.
        temperature: τ of KD.
        scale_by_temperature_squared: multiply KD by τ².
        between: the pairs of members that KD is summed over: "all", those of the "same" kind, or of "other" kinds.
        kinds: a number per member, equal for members of one architecture; needed unless ``between`` is "all".
        part: what a teacher passes on: "all" of its softmax, or the probability of the "target" alone. KD is then
            between (π, 1 − π) of two members, with π the target's probability at temperature τ.
        gate: "open", or "better": only members that give the target a higher probability teach. Which these are,
            changes from target to target, so that the gate's cost grows with the pairs.
        kd_bias: (v,) added to all members' logits / τ before KD compares them, or None.
        compute_kd: True: report KD even at weight 0. None: only if its weight is not 0.
        product_dtype: precision of the matrix products. None: that of autocast if it is on, else that of ``hidden``.
            Softmax, losses and the sum of weight gradients are always float32, or float64 for float64 input.
        tile_rows: target rows per tile. None: as many as the cache takes.
        compiled: True: compile the pointwise part. False: do not. None: compile it if that works and pays; on CUDA it
            is one kernel if Triton is installed.
        spread: given if other processes have members of the ensemble. ``total`` and ``kd`` are then the parts of these
            members, which add up over the processes. KD is not compiled, since S is added up within each tile.

    Returns:
        ``total``, ``cross_entropy``, ``kd`` and ``ambiguity``.

    Raises:
        EnsembleKDError: shapes or types that do not fit, no target, a target out of range (checked on the CPU only:
            elsewhere that would wait for the device), a weight that is not finite, a temperature that is not positive,
            ``tile_rows`` below 1, a gate between processes, or a backward pass with ``create_graph``.

    Examples:
        >>> hidden, weight = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(2, 5, 4)
        >>> losses = item_losses(hidden, weight, None, torch.tensor([0, 4, 2]), kd_weight=0.5)
        >>> losses.cross_entropy  # both members are uniform over 5 items
        tensor([1.6094, 1.6094])
        >>> float(losses.kd)
        0.0
        >>> losses.total.backward()
    """
    where = "item_losses"
    temperature = number(where, "temperature", temperature, above=0)
    flag(where, "scale_by_temperature_squared", scale_by_temperature_squared)
    ce_weight, kd_weight = number(where, "ce_weight", ce_weight), _weight(where, "kd_weight", kd_weight)
    ambiguity_weight = _weight(where, "ambiguity_weight", ambiguity_weight)
    tensor(where, "hidden", hidden)
    everyone = spread.n if spread is not None else len(hidden) if hidden.ndim else 0
    between, kinds = pairs_of(where, between, kinds, len(hidden) if hidden.ndim else 0)
    if kd_bias is not None:
        tensor(where, "kd_bias", kd_bias, "v", "floating", {"v": weight.shape[1]} if weight.ndim == 3 else None)
    taught = everyone > 1 and (between != "other" or len(set(kinds)) > 1)
    with_kd = taught and (_counts(kd_weight) if compute_kd is None else compute_kd)
    factor = temperature**2 if scale_by_temperature_squared else 1.0
    choice(where, "part", part, get_args(Part))
    choice(where, "gate", gate, get_args(Gate))
    if with_kd and gate == "better" and spread is not None:
        fix = "Keep the members in one process, or leave gate out: other processes see no single member's softmax."
        raise EnsembleKDError(where, "gate='open' where members are spread over processes", repr(gate), fix)
    with_ambiguity = everyone > 1 and _counts(ambiguity_weight)
    met = spread if with_kd or with_ambiguity else None
    pairs = Pairs(between, kinds, gate, met) if with_kd else Pairs(spread=met)
    weights = (ce_weight, kd_weight * factor if with_kd else 0.0, *([ambiguity_weight] if with_ambiguity else []))
    total, cross_entropy, kd, *ambiguity = tiled_losses(
        where,
        Peers(temperature, with_kd, pairs, part if with_kd else "all", with_ambiguity, with_kd and kd_bias is not None),
        weights,
        Networks(hidden, weight, bias),
        targets,
        further=kd_bias if with_kd else None,
        valid=valid,
        product_dtype=product_dtype,
        tile_rows=tile_rows,
        compiled=compiled,
    )
    return ItemLosses(total, cross_entropy, kd * factor, *(ambiguity or [torch.zeros_like(kd)]))


def _weight(where: str, name: str, value: Weight) -> Weight:
    """Return a weight: a finite number, or a tensor () of an accelerator as it is, since reading it would wait."""
    if isinstance(value, Tensor) and value.device.type != "cpu" and value.ndim == 0 and value.is_floating_point():
        return value
    return number(where, name, value)


def _counts(weight: Weight) -> bool:
    return isinstance(weight, Tensor) or weight != 0


def pairs_of(where: str, between: Between, kinds: Sequence[int] | None, n: int) -> tuple[Between, tuple[int, ...]]:
    """Return the pairs that teach each other; kinds are left out where they make no difference."""
    choice(where, "between", between, get_args(Between))
    if between == "all":
        return between, ()
    if kinds is None or len(kinds) != n:
        got = "none" if kinds is None else f"{len(kinds)}"
        fix = "Pass kinds=[0, 0, 1], say: equal numbers for members of one architecture."
        raise EnsembleKDError(where, f"{n} kinds, one per member, for between={between!r}", got, fix)
    return ("all", ()) if between == "same" and len(set(kinds)) == 1 else (between, tuple(kinds))
