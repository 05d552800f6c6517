"""``check_encoder``: a report on an encoder of your own, before any training time is spent on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from ensemble_kd.errors import EnsembleKDError, first_line
from ensemble_kd.internal import flag, seeded, whole
from ensemble_kd.testing.checks import (
    BASIC,
    COMPARING,
    LATER,
    NotApplicableError,
    WrongError,
)
from ensemble_kd.testing.subject import Subject

Verdict = Literal["ok", "wrong", "not applicable"]


class Check(NamedTuple):
    """One line of a report."""

    name: str
    verdict: Verdict
    seen: str  # what was seen, and what to do if it is wrong


@dataclass(frozen=True)
class Report:
    """The findings of ``check_encoder``, one per check. ``print`` shows them.

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
        """True if nothing is wrong."""
        return not self.wrong

    @property
    def wrong(self) -> list[str]:
        """The names of the checks that found a fault."""
        return [check.name for check in self.checks if check.verdict == "wrong"]

    def __getitem__(self, name: str) -> Check:
        return {check.name: check for check in self.checks}[name]

    def __str__(self) -> str:
        return "\n".join(f"{name:<11} {verdict:<15} {seen}" for name, verdict, seen in self.checks)

    def raise_if_wrong(self) -> None:
        """Raise one error that names every fault, or do nothing if there is none.

        Raises:
            EnsembleKDError: a check found a fault.
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
    """Try an encoder on small batches, and report check by check what it does right and wrong.

    An error that the encoder raises becomes a line of the report and is not passed on. The random states are left as
    they were. Checks that compare outputs add noise to the weights, as training would move them.

    ========== =========================================================================================================
    factory    builds modules that can be stacked, and V is known
    contract   (b, l, d) or (b, d), floating, of the weights' dtype, finite; ids are left as they are
    mask token id V + 1 is accepted (needed for ``MaskedItem``)
    dropout    active in training, silent in evaluation
    padding    more padding on the left changes nothing
    rows       a sequence's output depends on no other sequence
    causality  position t sees items up to t alone (of encoders with ``causal = True``)
    seeds      equal seeds give equal weights, other seeds other weights
    ties       tied weights are one parameter, and stay so when trained
    loop, vmap each backend gives what plain modules give in evaluation; or why vmap cannot serve
    state_dict has all that the outputs depend on
    training   gradients are finite and reach the weights, and one step lowers the loss
    compile    ``torch.compile`` gives the same (only with ``compile=True``)
    ========== =========================================================================================================

    Args:
        encoder_fn: ``() -> nn.Module``, as for ``EnsembleKD``.
        num_items: V; needed if the encoder has no ``.num_items``.
        max_len: longest input that the encoder reads; None: its ``.max_len``, or 10 columns.
        compile: try ``torch.compile``, too, which may take minutes.
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
            whole("check_encoder", name, value, least=1)
    whole("check_encoder", "seed", seed, least=0)
    flag("check_encoder", "compile", compile)
    subject = Subject(encoder_fn, num_items=num_items, max_len=max_len, seed=seed)
    with warnings.catch_warnings(), seeded(seed), torch.enable_grad():
        warnings.simplefilter("ignore")  # torch's warnings about performance are no faults of the encoder
        return Report(tuple(_run(subject, compile)))


def _run(subject: Subject, compile: bool) -> Iterator[Check]:
    """Run every check in turn, but none whose ground an earlier one found missing."""
    why = ""
    for name, check in BASIC.items():
        yield (done := Check(name, *(_outcome(check, subject) if not why else _not_tried(why))))
        if done.verdict == "wrong":
            why = f"{name} is wrong"
    for name, check in LATER.items():
        if why:
            yield Check(name, *_not_tried(why))
        elif name in COMPARING and not subject.repeats:
            yield Check(name, *_not_tried("outputs in evaluation are random"))
        elif name == "compile" and not compile:
            yield Check(name, "not applicable", "Not asked for: compile=True tries it.")
        else:
            yield Check(name, *_outcome(check, subject))


def _not_tried(why: str) -> tuple[Verdict, str]:
    return "not applicable", f"Not tried, since {why}."


def _outcome(check: Callable[[Subject], str], subject: Subject) -> tuple[Verdict, str]:
    try:
        return "ok", check(subject)
    except NotApplicableError as reason:
        return "not applicable", str(reason)
    except (WrongError, EnsembleKDError) as fault:
        return "wrong", str(fault)
    except Exception as error:  # any error of an encoder that is not ours
        return "wrong", f"{first_line(error)}. It comes from the encoder: call it by itself."
