"""The encoder under test: its members, and the batches, calls, stacks and losses that the checks try on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ensemble_kd.ensemble import EnsembleKD, size_of
from ensemble_kd.internal import seeded
from ensemble_kd.objectives import MaskedItem, NextItem
from ensemble_kd.stacking import StackedModule, build_members, duplicate

TOLERANCE = 1e-4  # of a relative difference in float32; faults are far above it, rounding is far below
LONGEST = 64  # columns that are tried if an encoder reads more
MOVED = 0.1  # standard deviation of the noise on trained weights, so that no check rests on a start of zeros


class Subject:
    """An encoder under test. ``build`` and ``move`` fill in what the later checks use."""

    members: list[nn.Module]  # two, as built
    moved: list[nn.Module]  # copies in evaluation mode, their weights as if trained
    num_items: int
    longest: int  # columns of the longest batch
    causal: bool
    device: torch.device
    tolerance: float  # of a relative difference of outputs
    repeats: bool  # two calls in evaluation give the same
    leaks: bool = False  # causal is True, and a later item changes earlier states
    newest_only = False  # the output is (b, d)
    masks = False  # the encoder accepts the mask token

    def __init__(
        self, encoder_fn: Callable[[], nn.Module], *, num_items: int | None, max_len: int | None, seed: int
    ) -> None:
        self.encoder_fn, self.given_items, self.max_len, self.seed = encoder_fn, num_items, max_len, seed

    def build(self) -> nn.Module:
        """Build two members, read the facts that an encoder may state, and return the first member.

        Raises:
            EnsembleKDError: the members cannot be stacked, or V is unknown.
        """
        self.members = build_members(self.encoder_fn, 2, seed=self.seed)
        first = self.members[0]
        known = self.given_items if self.given_items is not None else getattr(first, "num_items", None)
        self.num_items = size_of(first, "num_items", known)
        length = self.max_len if self.max_len is not None else getattr(first, "max_len", None)
        self.longest = 10 if length is None else min(size_of(first, "max_len", length), LONGEST)
        self.causal = bool(getattr(first, "causal", False))
        self.device = next((t.device for t in first.parameters()), torch.device("cpu"))
        return first

    def move(self, dtype: torch.dtype) -> None:
        """Make the members with weights as if trained, and see if their outputs in evaluation repeat.

        Args:
            dtype: of the hidden states, on which the tolerance depends.
        """
        self.tolerance = max(TOLERANCE, 10 * torch.finfo(dtype).eps)
        self.moved = [_moved(duplicate(member)).eval() for member in self.members]
        ids = self.ids(3, self.longest)
        if not bool(self.real(self.call(ids), ids).isfinite().all()):  # training would not reach such weights
            self.moved = [duplicate(member).eval() for member in self.members]
        with torch.no_grad():  # under two seeds, or random outputs would be equal
            with seeded(1):
                first = self.moved[0](ids)
            with seeded(2):
                second = self.moved[0](ids)
        self.repeats = difference(first, second) <= self.tolerance

    def ids(self, b: int, length: int, *, padded: bool = True) -> Tensor:
        """Return items (b, length). Row 0 is full; the other rows have padding, unless ``padded`` is False."""
        generator = torch.Generator().manual_seed(self.seed)
        out = torch.randint(1, self.num_items + 1, (b, length), generator=generator)
        if padded:
            out *= torch.arange(length) >= (torch.arange(b) % length)[:, None]
        return out.to(self.device)

    def real(self, out: Tensor, ids: Tensor) -> Tensor:
        """Return the part of an output that is read: never the hidden states at padding."""
        return out if self.newest_only else out[..., ids != 0, :]

    def call(self, ids: Tensor, i: int = 0) -> Tensor:
        """Return the hidden states of plain member i in evaluation, its weights as if trained."""
        with torch.no_grad(), seeded(self.seed):
            out: Tensor = self.moved[i](ids)
        return out

    def evaluate(self, stack: StackedModule, ids: Tensor) -> Tensor:
        """Return the hidden states of a stack in evaluation, (2, ...)."""
        with torch.no_grad():
            return stack.eval()(ids)  # type: ignore[no-any-return]

    def stack(self, members: list[nn.Module], backend: Literal["loop", "vmap"] = "loop") -> StackedModule:
        """Return copies of the members as one module."""
        return StackedModule([duplicate(member) for member in members], backend=backend)

    def ensemble(self) -> EnsembleKD:
        """Return the members as an ensemble with the default losses."""
        return EnsembleKD.from_members(
            self.members,
            num_items=self.num_items,
            objective=MaskedItem() if self.leaks else None if self.masks else NextItem(),
            max_len=self.max_len,
            seed=self.seed,
            backend="loop",
        )

    def loss(self, model: EnsembleKD, *, backward: bool = False) -> float:
        """Return the training loss, each time from the same random numbers and buffers."""
        shortest = model.objective.min_items
        length = max(self.longest, shortest)  # next-item training reads one item less than a window has
        ids = self.ids(8, length, padded=False)
        ids[4:, : length - shortest] = 0
        with model.encoder.undisturbed():
            model.train()
            total = model.loss(ids, generator=torch.Generator(ids.device).manual_seed(self.seed)).total
            if backward:
                total.backward()
        return float(total.detach())


def difference(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, relative to the largest value; infinity for NaN or for another shape."""
    if got.shape != want.shape:
        return float("inf")
    if not got.numel():
        return 0.0
    error = float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-6))
    return error if error == error else float("inf")


def _moved(module: nn.Module) -> nn.Module:
    """Add noise to all that training moves: not to frozen weights, nor to an embedding's padding row."""
    fixed = {
        id(layer.weight): layer.padding_idx
        for layer in module.modules()
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None
    }
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad and p.is_floating_point():
                noise = MOVED * torch.randn_like(p)
                if id(p) in fixed:
                    noise[fixed[id(p)]] = 0
                p.add_(noise)
    return module
