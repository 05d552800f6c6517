"""The conformance kit against encoders that are right, and against faults that exactly one check must see."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble_kd import EnsembleKDError
from ensemble_kd.testing import Check, Report, check_encoder

V, D = 20, 8
NAMES = (
    *("factory", "contract", "mask token", "dropout", "padding", "rows", "causality", "seeds", "ties", "loop", "vmap"),
    *("state_dict", "training", "compile"),
)


class Right(nn.Module):
    """A causal mean of the items so far, with dropout: nothing is wrong with it."""

    num_items, max_len, causal = V, 9, True

    def __init__(self) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(V + 2, D, padding_idx=0)
        self.mix = nn.Linear(D, D)
        self.drop = nn.Dropout(0.2)

    def forward(self, item_ids: Tensor) -> Tensor:
        real = (item_ids != 0)[:, :, None]
        h = self.mix(self.item_embedding(item_ids)) * real
        return self.drop(h + h.cumsum(dim=1) / real.cumsum(dim=1).clamp(min=1))


FAULTS: dict[str, tuple[Callable[[], Any], str, str]] = {}  # factory, the check that must see it, part of its sentence


def fault(check: str, text: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        FAULTS[build.__name__] = (build, check, text)
        return build

    return register


@fault("factory", "a new module for each member, got the same module twice")
def one_module_for_all(kept: list[nn.Module] = []) -> nn.Module:  # noqa: B006 - the fault
    kept.append(kept[0] if kept else Right())
    return kept[-1]


@fault("factory", "KeyError: 'no such key'. It comes from the encoder")
def factory_that_fails() -> nn.Module:
    raise KeyError("no such key")


@fault("factory", "expected an nn.Module, got int")
def no_module() -> int:
    return 1


@fault("factory", "Pass num_items=")
class NoNumItems(Right):
    num_items = None  # type: ignore[assignment]


@fault("contract", "expected hidden states (b, l, d) or (b, d), got (4, 2, 8)")
class Transposed(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids).transpose(0, 1)


@fault("contract", "expected a tensor, got tuple")
class Tuple(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids), None  # type: ignore[return-value]


@fault("contract", "expected (b, l, d), got (3, 4, 8) for item_ids of shape (3, 9)")
class Truncating(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids)[:, -4:]


@fault("contract", "index out of range in self. Its embedding needs V + 2 rows")
class FewRows(Right):
    def __init__(self) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(V, D, padding_idx=0)


@fault("contract", "Hidden states are torch.float64, the weights torch.float32: a plain tensor of another type")
class PlainFloat64(Right):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(D, dtype=torch.float64)

    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids) * self.scale


@fault("contract", "floating-point hidden states, got torch.int64")
class Integers(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids).long()


@fault("contract", "forward writes into item_ids")
class WritesInput(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids.clamp_(max=V - 1))


@fault("contract", "not finite for l = 1")
class Divides(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids) / (item_ids.shape[1] - 1)


@fault("contract", "RuntimeError: too long, for l = 9. Pass max_len if it reads fewer columns.")
class TooLong(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        if item_ids.shape[1] > 5:
            raise RuntimeError("too long.\nsecond line")
        return super().forward(item_ids)


@fault("mask token", "Its embedding needs V + 2 rows")
class NoMaskRow(Right):
    causal = False

    def __init__(self) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(V + 1, D, padding_idx=0)


@fault("dropout", "Two calls in eval() differ")
class DropsInEvaluation(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        return F.dropout(super().forward(item_ids), 0.2)


@fault("dropout", "'drop' drops nothing in training")
class NeverDrops(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        self.drop.eval()
        return super().forward(item_ids)


@fault("dropout", "is no seed set in forward?")
class SeedsInForward(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        torch.manual_seed(0)
        return super().forward(item_ids)


@fault("padding", "3 more columns of padding change the items' hidden states by")
class ReadsPadding(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        h = self.mix(self.item_embedding(item_ids))  # the bias stands at padding, too
        return self.drop(h + h.cumsum(dim=1))


@fault("padding", "count positions from the newest item")
class PositionsFromTheLeft(Right):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(9, D))  # equal at the start, so that only training would show it

    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids) + self.places[: item_ids.shape[1]]


@fault("rows", "Are two axes confused (batch_first=True)?")
class SequenceFirst(Right):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2)

    def forward(self, item_ids: Tensor) -> Tensor:
        h = super().forward(item_ids)
        return h + self.attention(h, h, h, need_weights=False)[0]


@fault("causality", "the target leaks. Mask what comes after each position")
class Leaks(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        h = super().forward(item_ids) * (item_ids != 0)[:, :, None]
        return h + 0.1 * h.sum(dim=1, keepdim=True)


@fault("seeds", "All seeds give equal weights")
def seeds_all() -> nn.Module:
    torch.manual_seed(0)
    return Right()


@fault("seeds", "A seed is set inside the factory, so members share weights: 'mix.weight', 'mix.bias'")
class SeedsBody(Right):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(D, D)


@fault("seeds", "Equal seeds give different 'mix.bias'. Draw from torch's global generator")
class DrawsElsewhere(Right):
    entropy = np.random.default_rng(0)  # goes on from one construction to the next

    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.mix.bias, self.entropy.normal())


@fault("ties", "'mix.weight' and 'out.weight' share memory, but are two parameters")
class TiesData(Right):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(D, D)
        self.out.weight.data = self.mix.weight.data

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.out(super().forward(item_ids))


@fault("contract", "With newest=True, forward's last position differs by")
class OtherNewest(Right):
    def forward(self, item_ids: Tensor, *, newest: bool = False) -> Tensor:
        return super().forward(item_ids[:, -5:])[:, -1] if newest else super().forward(item_ids)


@fault("state_dict", "Register all that they depend on")
class HiddenState(Right):
    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.randn(D, D)

    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids) @ self.projection


@fault("training", "No gradient reaches the encoder. Is its output detached?")
class Detached(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        return super().forward(item_ids).detach()


@fault("training", "is not finite")
class BadGradient(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        h = super().forward(item_ids)
        return h + (h - h).sqrt()  # 0, with a gradient of 0/0


@fault("training", "One step raises the loss")
class WrongGradient(Right):
    def forward(self, item_ids: Tensor) -> Tensor:
        h = super().forward(item_ids) * 100
        return h.detach() * 2 - h if self.training else h


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen_by_its_check_alone(name: str) -> None:
    build, check, text = FAULTS[name]
    report = check_encoder(build)
    assert report.wrong == [check], str(report)
    assert text in report[check].seen
    assert not report.ok
    assert tuple(c.name for c in report.checks) == NAMES
    with pytest.raises(EnsembleKDError) as caught:
        report.raise_if_wrong()
    assert str(caught.value).startswith(f"check_encoder: expected an encoder without faults, got {check}: ")
    if check in ("factory", "contract"):
        later = report.checks[NAMES.index(check) + 1 :]
        assert {c.seen for c in later} == {f"Not tried, since {check} is wrong."}
    elif report["dropout"].seen.startswith("Two calls in eval()"):
        not_tried = [c.name for c in report.checks if "outputs in evaluation are random" in c.seen]
        assert not_tried == ["padding", "rows", "causality", "loop", "vmap", "state_dict", "compile"]


def test_a_right_encoder_passes_every_check() -> None:
    report = check_encoder(Right)
    assert report.ok, str(report)
    report.raise_if_wrong()
    assert {c.name for c in report.checks if c.verdict != "ok"} == {"ties", "compile"}
    assert len(str(report).splitlines()) == len(NAMES)
    assert str(report).splitlines()[1] == (
        "contract    ok              Hidden states (b, l, 8), torch.float32, for l = 1, 2, 9."
    )


def test_what_is_asked_depends_on_the_encoder() -> None:
    class Newest(Right):
        def __init__(self) -> None:
            super().__init__()
            self.item_embedding = nn.Embedding(V + 1, D, padding_idx=0)
            self.back = nn.Linear(D, D)
            self.back.weight = self.mix.weight

        def forward(self, item_ids: Tensor) -> Tensor:
            return self.back(super().forward(item_ids)[:, -1])

    report = check_encoder(Newest)
    assert report.ok, str(report)
    assert report["contract"].seen.startswith("Hidden states (b, 8)")
    assert report["mask token"] == Check(
        "mask token", "not applicable", "id 21 is refused, so masked views are out; NextItem() needs none."
    )
    assert report["causality"].verdict == "not applicable"
    assert report["ties"] == Check("ties", "ok", "mix.weight = back.weight stay equal when trained.")


def test_vmap_need_not_serve() -> None:
    class Choosing(Right):
        def forward(self, item_ids: Tensor) -> Tensor:
            h = super().forward(item_ids)
            return h if bool(self.mix.weight.sum() > 0) else -h

    report = check_encoder(Choosing)
    assert report.ok, str(report)
    assert report["vmap"].verdict == "not applicable"
    assert report["vmap"].seen.endswith('; backend="auto" takes the loop.')


def test_hints_without_a_fault() -> None:
    class Quiet(Right):
        causal = False

        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.0)
            self.unused = nn.Linear(2, 2)

    report = check_encoder(Quiet)
    assert report.ok, str(report)
    assert "Its outputs are causal, though" in report["causality"].seen
    assert report["dropout"].seen.startswith("Nothing is random in training")
    assert report["training"].seen.endswith("Without gradient: 'unused.weight', 'unused.bias'.")

    def pretrained() -> nn.Module:
        module = Right()
        nn.init.eye_(module.mix.weight)
        return module

    assert check_encoder(pretrained)["seeds"].seen.endswith("the same in all members: 'mix.weight'.")


def test_other_precisions() -> None:
    report = check_encoder(lambda: Right().double())
    assert report.ok, str(report)
    assert "torch.float64" in report["contract"].seen
    assert check_encoder(lambda: Right().bfloat16())["contract"].verdict == "ok"


@pytest.mark.parametrize("max_len", [1, 2, 3])
def test_short_inputs(max_len: int) -> None:
    report = check_encoder(Right, max_len=max_len)
    assert report.ok, str(report)
    assert (report["padding"].verdict == "ok") == (max_len > 1)


def test_nothing_outside_is_touched() -> None:
    kept = Right()
    before, state, python_state = copy.deepcopy(kept.state_dict()), torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()[1]  # noqa: NPY002 - encoders may use it
    check_encoder(lambda: copy.deepcopy(kept))
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # type: ignore[arg-type]  # noqa: NPY002
    assert random.getstate() == python_state
    assert all(torch.equal(value, before[name]) for name, value in kept.state_dict().items())
    assert kept.training


def test_arguments_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(EnsembleKDError, match="num_items, a whole number >= 1, got 0"):
        check_encoder(Right, num_items=0)
    with pytest.raises(EnsembleKDError, match="max_len, a whole number >= 1, got -1"):
        check_encoder(Right, max_len=-1)
    with pytest.raises(EnsembleKDError, match="seed, a whole number >= 0, got -1"):
        check_encoder(Right, seed=-1)


def test_compile_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: real(module, backend="eager"))
    assert check_encoder(Right, compile=True)["compile"].verdict == "ok"
    monkeypatch.setattr(torch, "compile", lambda module: lambda ids: module(ids) + 1)
    assert check_encoder(Right, compile=True).wrong == ["compile"]


def test_a_report_of_nothing_wrong_is_ok() -> None:
    assert Report((Check("a", "ok", "A."), Check("b", "not applicable", "B."))).ok
    with pytest.raises(KeyError):
        Report(())["a"]
