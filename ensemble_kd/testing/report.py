"""``check_encoder``: what an encoder of your own does right and wrong, before any training time is spent on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ensemble_kd.ensemble.contract import positive
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.seeding import member_seed, seeded
from ensemble_kd.testing.checks import Check, Kit

__all__ = ["Check", "Report", "check_encoder"]


@dataclass(frozen=True)
class Report:
    """What ``check_encoder`` found; ``print`` it.

    Examples:
        >>> report = Report((Check("dropout", "wrong", "Two calls in eval() differ."),))
        >>> print(report)
        dropout     wrong           Two calls in eval() differ.
        >>> report.ok
        False
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong

    @property
    def wrong(self) -> list[str]:
        """The names of the checks that found something wrong."""
        return [check.name for check in self.checks if check.verdict == "wrong"]

    def __getitem__(self, name: str) -> Check:
        return {check.name: check for check in self.checks}[name]

    def __str__(self) -> str:
        return "\n".join(f"{name:<11} {verdict:<15} {seen}" for name, verdict, seen in self.checks)

    def raise_if_wrong(self) -> None:
        """Do nothing for an encoder without faults.

        Raises:
            EnsembleKDError: names each fault.
        """
        if not self.ok:
            faults = " ".join(f"{name}: {seen}" for name, verdict, seen in self.checks if verdict == "wrong")
            fix = "Mend these, and print(check_encoder(...)) again."
            raise EnsembleKDError("check_encoder", "an encoder without faults", faults.rstrip("."), fix)


def check_encoder(
    encoder_fn: Callable[[], nn.Module],
    *,
    num_items: int | None = None,
    max_len: int | None = None,
    compile: bool = False,
    seed: int = 0,
) -> Report:
    """Try an encoder on small batches and report, check by check, what it does right and wrong.

    Whatever the encoder raises is reported, never passed on; the random states are left as they were. Checks that ask
    for equal outputs use weights with noise on them, as training would move them.

    ========== =========================================================================================================
    factory    builds modules that can be stacked, and V is known
    contract   (b, l, d) or (b, d), floating, of the weights' dtype, finite; ids are left as they are
    mask token id V + 1 is accepted (asked of encoders for ``MaskedItem``)
    dropout    active in training, silent in evaluation
    padding    more padding on the left changes nothing
    rows       a sequence's output depends on no other sequence
    causality  position t sees items up to t alone (asked of encoders that say ``causal = True``)
    seeds      equal seeds give equal weights, other seeds other weights
    ties       tied weights are one parameter, and stay so when trained
    loop, vmap each backend gives what plain modules give in evaluation; or why vmap cannot serve
    state_dict holds all that outputs depend on
    training   gradients are finite and reach the weights, and one step lowers the loss
    compile    ``torch.compile`` gives the same (only where asked for)
    ========== =========================================================================================================

    Args:
        encoder_fn: ``() -> nn.Module``, as for ``EnsembleKD``.
        num_items: V; may be left out where the encoder has ``.num_items``.
        max_len: longest input that the encoder reads; may be left out where it has ``.max_len`` or reads 10 columns.
        compile: try ``torch.compile`` too, which takes up to minutes.
        seed: of weights and batches.

    Returns:
        A report: ``.ok``, ``.checks``, ``.raise_if_wrong()``.

    Raises:
        EnsembleKDError: an argument (not the encoder) cannot be used.

    Examples:
        >>> class Mean(torch.nn.Module):
        ...     num_items = 20
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.item_embedding = torch.nn.Embedding(22, 4)
        ...     def forward(self, item_ids):  # forgets that padding is no item
        ...         h = self.item_embedding(item_ids)
        ...         return h + h.mean(dim=1, keepdim=True)
        >>> report = check_encoder(Mean)
        >>> report.wrong
        ['padding']
        >>> print(report["padding"].seen)  # doctest: +ELLIPSIS
        3 more columns of padding change the items' hidden states by ...%. Hide id 0 from attention, means and ...
    """
    for name, value in (("num_items", num_items), ("max_len", max_len)):
        if value is not None:
            positive(name, value)
    member_seed(seed, 0)  # raises where it is none
    with warnings.catch_warnings(), seeded(seed), torch.enable_grad():
        warnings.simplefilter("ignore")  # of performance, from torch: none tells right from wrong
        return Report(Kit(encoder_fn, num_items, max_len, compile, seed).run())
