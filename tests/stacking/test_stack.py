"""n modules as one: seeds, names, buffers, ties, modes, copies, and what is refused."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import member_seed, seeded
from ensemble_kd.stacking import Heads, MixedModule, StackedModule, build_members, check_members

ROWS, D = 8, 4
IDS = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 1]])
BACKENDS = ("loop", "vmap")


class Embed(nn.Module):
    """The smallest encoder: the item's row."""

    def __init__(self) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(ROWS, D)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.item_embedding(item_ids)


class Tied(Embed):
    """One weight under two names, and one buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(D, ROWS, bias=False)
        self.out.weight = self.item_embedding.weight
        scale = torch.full((D,), 2.0)
        self.register_buffer("scale", scale)
        self.out.register_buffer("scale", scale)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.out(super().forward(item_ids) * self.scale * self.out.get_buffer("scale"))


class Newest(Embed):
    """It can leave all positions but the last out, and notes when it does."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[bool] = []

    def forward(self, item_ids: Tensor, *, newest: bool = False) -> Tensor:
        self.asked.append(newest)
        return super().forward(item_ids[:, -1] if newest else item_ids)


class Other(Newest):
    """Of another architecture."""


class Thrifty(Embed):
    def __init__(self, layer: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, item_ids: Tensor) -> Tensor:
        embedded = super().forward(item_ids)
        out = torch.utils.checkpoint.checkpoint(self.layer, embedded, use_reentrant=self.reentrant)
        return out[0] if isinstance(out, tuple) else out


class Normed(Embed):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.norm(super().forward(item_ids).mT).mT


class Counting(Embed):
    """Writes one buffer in place and replaces the other."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(D), persistent=False)

    def forward(self, item_ids: Tensor) -> Tensor:
        h = super().forward(item_ids)
        self.calls += 1
        self.mean = 0.5 * self.mean + 0.5 * h.detach().mean(dim=(0, 1))
        return h + self.mean


class Keeping(Embed):
    """Leaves a result in an attribute, as attention layers do with their weights."""

    def forward(self, item_ids: Tensor) -> Tensor:
        self.last = super().forward(item_ids)
        return self.last


class Caching(Embed):
    """Registers a buffer in its first call."""

    def forward(self, item_ids: Tensor) -> Tensor:
        h = super().forward(item_ids)
        if not hasattr(self, "ramp"):
            self.register_buffer("ramp", torch.arange(D).to(h.dtype), persistent=False)
        return h + self.ramp


class Named(nn.Module):
    """Children named as methods and attributes of StackedModule."""

    def __init__(self) -> None:
        super().__init__()
        self.member = nn.Embedding(ROWS, D)
        self.each, self.decisions = nn.Linear(D, D), nn.Linear(D, D)
        self.register_buffer("undisturbed", torch.ones(D))

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.decisions(self.each(self.member(item_ids))) * self.undisturbed


KINDS: list[type[nn.Module]] = [Embed, Tied, Normed, Counting, Keeping, Caching, Named]


def build(kind: Callable[[], nn.Module], n: int = 3, seed: int = 0) -> list[nn.Module]:
    return build_members(kind, n, seed=seed)


def stack(kind: Callable[[], nn.Module], backend: str = "loop", n: int = 3) -> StackedModule:
    return StackedModule(build(kind, n), backend=backend)  # type: ignore[arg-type]


# Seeds


def test_member_seeds_differ_and_depend_on_seed_member_and_stream_alone() -> None:
    seeds = [member_seed(s, i, k) for s in range(5) for i in range(5) for k in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [member_seed(s, i, k) for s in range(5) for i in range(5) for k in range(3)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert member_seed(np.int64(3), 1) == member_seed(3, 1)


def test_members_differ_and_the_same_seed_gives_the_same_weights() -> None:
    first, again, other = build(Embed), build(Embed), build(Embed, seed=1)
    weights = [m.get_parameter("item_embedding.weight") for m in (*first, *other)]
    for i, w in enumerate(weights):
        assert all(not torch.equal(w, v) for v in weights[:i])
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.get_parameter("item_embedding.weight"), b.get_parameter("item_embedding.weight"))


def test_a_member_does_not_depend_on_how_many_there_are() -> None:
    for few, many in zip(build(Embed, 1), build(Embed, 4), strict=False):
        assert torch.equal(few.get_parameter("item_embedding.weight"), many.get_parameter("item_embedding.weight"))


class Drawing(nn.Module):
    """Plain parameters from all three generators."""

    def __init__(self) -> None:
        super().__init__()
        drawn = [torch.rand(()).item(), float(np.random.rand()), random.random()]  # noqa: NPY002
        self.w = nn.Parameter(torch.tensor(drawn))


def test_all_three_generators_are_seeded_for_a_member_and_left_as_they_were() -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    before = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    first, second = build(Drawing, 2), build(Drawing, 2)
    assert torch.equal(torch.rand(3), before[0])
    assert np.array_equal(np.random.rand(3), before[1])  # noqa: NPY002
    assert random.random() == before[2]
    values = [m.get_parameter("w") for m in first]
    assert bool((values[0] != values[1]).all())
    assert all(torch.equal(a, b.get_parameter("w")) for a, b in zip(values, second, strict=True))


def test_a_failing_factory_leaves_the_random_states() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]  # noqa: NPY002

    def work() -> None:
        torch.rand(1)
        raise RuntimeError("no such file")

    with pytest.raises(RuntimeError, match="no such file"), seeded(1):
        work()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]  # noqa: NPY002
    assert random.getstate() == states[2]


def test_heads_of_equal_width_start_from_streams_of_their_own() -> None:
    items, attributes = (Heads(2, 5, D, seed=0, stream=k, tied=False, like=torch.zeros(())) for k in (1, 2))
    assert items.weight is not None
    assert attributes.weight is not None
    rows = [*items.weight, *attributes.weight]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    assert 0.01 < float(items.weight.detach().std()) < 0.03


# Names and state


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_the_encoders_own_with_a_member_axis_in_front(kind: type[nn.Module]) -> None:
    plain, stacked = kind(), stack(kind)
    assert list(stacked.state_dict()) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert stacked.state_dict()[name].shape == (3, *tensor.shape)
    assert [name for name, _ in stacked.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in stacked.named_buffers()] == [name for name, _ in plain.named_buffers()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_buffers_are_those_of_plain_modules(kind: type[nn.Module], backend: str, training: bool) -> None:
    plain, stacked = [m.train(training) for m in build(kind)], stack(kind, backend).train(training)
    for _ in range(3):
        want = torch.stack([m(IDS) for m in plain])
        torch.testing.assert_close(stacked(IDS), want)
    torch.testing.assert_close(torch.stack(stacked.each(IDS)), torch.stack([m(IDS) for m in plain]))
    for name, buffer in stacked.named_buffers():
        torch.testing.assert_close(buffer, torch.stack([m.get_buffer(name) for m in plain]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_member_is_a_plain_module_with_a_copy_of_its_row(kind: type[nn.Module], backend: str) -> None:
    stacked = stack(kind, backend)
    stacked(IDS).sum().backward()  # fills caches, results and buffers
    with torch.no_grad():
        for p in stacked.parameters():
            p.add_(torch.randn_like(p))
    stacked.eval()
    before = {name: value.clone() for name, value in stacked.state_dict().items()}
    want = copy.deepcopy(stacked)(IDS).detach()
    for i in range(-3, 3):
        alone = stacked.member(i)
        assert type(alone) is kind
        assert not alone.training
        torch.testing.assert_close(alone(IDS), want[i])
        with torch.no_grad():
            for p in alone.parameters():
                p.zero_()
    for name, value in stacked.state_dict().items():
        assert torch.equal(value, before[name])


def test_ties_stay_ties_through_stacking_members_gradients_and_moves() -> None:
    stacked = stack(Tied)
    assert stacked.stacked_parameter("out.weight") is stacked.stacked_parameter("item_embedding.weight")
    alone = stacked.member(1)
    assert isinstance(alone, Tied)
    assert alone.out.weight is alone.item_embedding.weight
    assert alone.out.get_buffer("scale") is alone.scale
    for backend in BACKENDS:
        plain, stacked = [m.double() for m in build(Tied)], stack(Tied, backend).double()
        assert stacked(IDS).dtype == torch.float64
        stacked(IDS).square().sum().backward()
        for i, member in enumerate(plain):
            member(IDS).square().sum().backward()
            got = dict(stacked.named_parameters())["item_embedding.weight"].grad
            assert got is not None
            torch.testing.assert_close(got[i], member.get_parameter("item_embedding.weight").grad)


def test_frozen_parameters_stay_frozen() -> None:
    def half() -> nn.Module:
        encoder = Named()
        encoder.each.requires_grad_(False)
        return encoder

    for backend in BACKENDS:
        stacked = stack(half, backend)
        frozen = {name for name, p in stacked.named_parameters() if not p.requires_grad}
        assert frozen == {"each.weight", "each.bias"}
        stacked(IDS).sum().backward()
        assert {name for name, p in stacked.named_parameters() if p.grad is None} == frozen
        assert {name for name, p in stacked.member(0).named_parameters() if not p.requires_grad} == frozen
    entirely = stack(lambda: Embed().requires_grad_(False), "vmap")
    assert not entirely(IDS).requires_grad


def test_buffers_that_forward_registers_move_with_the_model() -> None:
    stacked = stack(Caching)
    stacked(IDS)
    assert stacked.double()(IDS).dtype == torch.float64
    assert stacked.member(2)(IDS).dtype == torch.float64
    assert stacked.member(2).get_buffer("ramp").dtype == torch.float64


class Recurrent(Embed):
    """Keeps its weights in plain lists besides: nn.GRU does so itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(D, D, batch_first=True)
        self.kept: list[Tensor] = []

    def forward(self, item_ids: Tensor) -> Tensor:
        self.newest, self.kept = self.gru.bias_ih_l0, [self.gru.weight_hh_l0]
        return self.gru(super().forward(item_ids))[0]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_stack_that_has_run_can_be_moved(swap: bool, training: bool) -> None:
    members = build_members(Recurrent, 2, seed=0)
    plain = [copy.deepcopy(member).double() for member in members]
    stacked, ids = StackedModule(members).train(training), torch.tensor([[1, 2, 3]])
    stacked(ids).sum().backward()
    stacked.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        stacked.to(torch.float64)
        stacked.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(stacked(ids), torch.stack([member(ids) for member in plain]))
    stacked(ids).sum().backward()
    sum(member(ids).sum() for member in plain).backward()
    for name, parameter in stacked.named_parameters():
        expected = torch.stack([member.get_parameter(name).grad for member in plain])  # type: ignore[misc]
        assert torch.equal(parameter.grad, expected), name  # type: ignore[arg-type]


def test_modes_follow_torch() -> None:
    def with_a_still_part() -> nn.Module:
        encoder = Normed()
        encoder.norm.eval()
        return encoder

    stacked = stack(with_a_still_part)
    assert stacked.training
    for backend in BACKENDS:
        stacked = stack(with_a_still_part, backend)
        stacked(IDS)  # the decision must not wake it
        assert float(stacked.get_buffer("norm.num_batches_tracked").sum()) == 0
    pretrained = stack(lambda: nn.Sequential(Embed(), nn.Dropout()).eval())
    assert pretrained.member(0).training
    assert not pretrained.eval().member(0).training
    assert pretrained.train().member(0)[1].training  # type: ignore[index]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_and_pickles_run_and_stand_apart(kind: type[nn.Module], backend: str) -> None:
    stacked = stack(kind, backend).eval()
    stacked(IDS)
    for twin in (copy.deepcopy(stacked), pickle.loads(pickle.dumps(stacked))):
        assert torch.equal(twin(IDS), copy.deepcopy(stacked)(IDS))
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert all(bool(p.any()) for name, p in stacked.named_parameters() if "norm.bias" not in name)


def test_the_state_loads_with_weights_only(tmp_path: Path) -> None:
    first, second = stack(Named), StackedModule(build(Named, seed=9))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert torch.equal(first(IDS), second(IDS))


def test_gradients_reach_a_stack_as_they_reach_plain_modules() -> None:
    for backend in BACKENDS:
        plain, stacked = build(Normed), stack(Normed, backend)
        (stacked(IDS) ** 3).sum().backward()
        for i, member in enumerate(plain):
            (member(IDS) ** 3).sum().backward()
            for name, p in stacked.named_parameters():
                assert p.grad is not None
                torch.testing.assert_close(p.grad[i], member.get_parameter(name).grad)


def test_each_parameter_is_unbound_once() -> None:
    """The gradient of ``[i]`` would be a tensor of the whole stack's size per member and name."""
    outputs = stack(Tied).each(IDS)
    seen, todo, counted = set(), [output.grad_fn for output in outputs], {"UnbindBackward0": 0, "SelectBackward0": 0}
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            counted[node.name()] = counted.get(node.name(), 0) + 1
            todo += [below for below, _ in node.next_functions]
    assert (counted["UnbindBackward0"], counted["SelectBackward0"]) == (1, 0)


@pytest.mark.parametrize("copied", [lambda stacked: stacked, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("layer", [nn.Linear(D, D), nn.LayerNorm(D), nn.GRU(D, D)])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_an_error(
    reentrant: bool, layer: nn.Module, copied: Callable[[StackedModule], StackedModule]
) -> None:
    stacked = copied(StackedModule([Thrifty(copy.deepcopy(layer), reentrant) for _ in range(2)]))
    out = stacked(IDS)
    with pytest.raises(EnsembleKDError, match="Switch activation checkpointing off"):
        out.sum().backward()


def test_a_buffer_must_keep_its_shape() -> None:
    class Growing(Embed):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, item_ids: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, self.seen])
            return super().forward(item_ids)

    with pytest.raises(EnsembleKDError) as caught:
        stack(Growing)(IDS)
    assert str(caught.value) == (
        "encoder: expected buffers that keep their shape, got 'seen' from (1,) to (2,). Keep a tensor that grows as a "
        "plain attribute instead."
    )


# What is refused


def once() -> Callable[[], nn.Module]:
    module = Embed()
    return lambda: module


def sharing(first_has: bool) -> Callable[[], nn.Module]:
    """Members 1 and 2 share a parameter; member 0 too, or not."""
    shared, made = nn.Parameter(torch.ones(ROWS, D)), [0]

    def factory() -> nn.Module:
        encoder = Embed()
        made[0] += 1
        if first_has or made[0] > 1:
            encoder.item_embedding.weight = shared
        return encoder

    return factory


def alternating(change: Callable[[Embed], object]) -> Callable[[], nn.Module]:
    made = [0]

    def factory() -> nn.Module:
        encoder = Embed()
        made[0] += 1
        if made[0] == 2:
            change(encoder)
        return encoder

    return factory


def test_two_factories_may_not_return_one_module() -> None:
    one = Embed()
    with pytest.raises(EnsembleKDError, match="a new module for each member, got the same module twice"):
        build_members([lambda: one, lambda: one], seed=0)


EQUAL = " All members must have the same architecture; only their seeds differ."
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no module": (
        lambda: build(lambda: None),  # type: ignore[arg-type, return-value]
        "encoder_fn: expected an nn.Module, got NoneType. Return the module that maps item_ids (b, l) to hidden states "
        "(b, l, d).",
    ),
    "a module for a factory": (
        lambda: build(Embed()),
        "EnsembleKD: expected a factory () -> nn.Module, got Embed. Wrap the construction: "
        "EnsembleKD(lambda: MyEncoder(...)).",
    ),
    "the same module twice": (
        lambda: build(once()),
        "encoder_fn: expected a new module for each member, got the same module twice. Build a new module for each "
        "member, or they would share their weights.",
    ),
    "a parameter of all": (
        lambda: build(sharing(True)),
        "encoder_fn: expected members with parameters of their own, got 'item_embedding.weight' in members 0 and 1. "
        "Create the parameters inside the factory.",
    ),
    "a parameter of members 1 and 2": (
        lambda: build(sharing(False)),
        "encoder_fn: expected members with parameters of their own, got 'item_embedding.weight' in members 1 and 2. "
        "Create the parameters inside the factory.",
    ),
    "lazy": (
        lambda: build(lambda: nn.LazyLinear(3)),
        "encoder_fn: expected initialised parameters, got an uninitialised 'weight'. Run it once on a batch inside the "
        "factory, so that its lazy layers take their shapes.",
    ),
    "another shape": (
        lambda: build(alternating(lambda e: setattr(e, "item_embedding", nn.Embedding(ROWS, 2)))),
        "encoder_fn: expected members of equal shapes, got 'item_embedding.weight': (8, 4) torch.float32 on cpu in "
        "member 0, (8, 2) torch.float32 on cpu in member 1." + EQUAL,
    ),
    "another dtype": (
        lambda: build(alternating(lambda e: e.double())),
        "encoder_fn: expected members of equal shapes, got 'item_embedding.weight': (8, 4) torch.float32 on cpu in "
        "member 0, (8, 4) torch.float64 on cpu in member 1." + EQUAL,
    ),
    "one frozen": (
        lambda: build(alternating(lambda e: e.requires_grad_(False))),
        "encoder_fn: expected members of equal shapes, got 'item_embedding.weight': (8, 4) torch.float32 on cpu in "
        "member 0, (8, 4) torch.float32 on cpu frozen in member 1." + EQUAL,
    ),
    "another tensor": (
        lambda: build(alternating(lambda e: e.register_buffer("x", torch.ones(1)))),
        "encoder_fn: expected members of equal shapes, got 'x': none in member 0, (1,) torch.float32 on cpu in "
        "member 1." + EQUAL,
    ),
    "another tie": (
        lambda: check_members(_tied_and_untied(), where="from_members"),
        "from_members: expected members of equal shapes, got 'out.weight': (8, 4) torch.float32 on cpu tied to "
        "'item_embedding.weight' in member 0, (8, 4) torch.float32 on cpu in member 1." + EQUAL,
    ),
    "no members": (
        lambda: StackedModule([]),
        "encoder_fn: expected at least one member, got none. Pass one module or more.",
    ),
    "n = 0": (
        lambda: build(Embed, 0),
        "EnsembleKD: expected n, a whole number in 1..1000, got 0. Pass such a number.",
    ),
    "n = True": (
        lambda: build(Embed, True),
        "EnsembleKD: expected n, a whole number in 1..1000, got True. Pass such a number.",
    ),
    "n = 2.0": (
        lambda: build(Embed, 2.0),  # type: ignore[arg-type]
        "EnsembleKD: expected n, a whole number in 1..1000, got 2.0. Pass such a number.",
    ),
    "seed = -1": (
        lambda: build(Embed, seed=-1),
        "EnsembleKD: expected seed, a whole number >= 0, got -1. Pass such a number.",
    ),
    "seed = None": (
        lambda: build(Embed, seed=None),  # type: ignore[arg-type]
        "EnsembleKD: expected seed, a whole number >= 0, got None. Pass such a number.",
    ),
    "backend": (
        lambda: stack(Embed, "cuda"),
        "EnsembleKD: expected backend 'auto', 'vmap' or 'loop', got 'cuda'. Choose one of these.",
    ),
    "member 3 of 3": (lambda: stack(Embed).member(3), "member: expected an index below 3, got 3. Count from 0."),
}


def _tied_and_untied() -> list[nn.Module]:
    tied, untied = Tied(), Tied()
    untied.out.weight = nn.Parameter(torch.ones(ROWS, D))
    return [tied, untied]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str) -> None:
    make, text = REFUSED[name]
    with pytest.raises(EnsembleKDError) as caught:
        make()
    assert str(caught.value) == text


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
def test_only_what_is_asked_for_is_computed_where_members_can_leave_the_rest_out(backend: Any, training: bool) -> None:
    members = [Newest(), Newest()]
    stack = StackedModule(members, backend=backend)
    expected = stack(IDS)[:, :, -1]
    stack.backend_for(IDS, training=training)  # tries members, too
    for member in members:
        member.asked.clear()
    torch.testing.assert_close(stack.newest(IDS, training=training), expected)
    alone = backend == "loop" and not training
    assert [member.asked for member in members] == [[alone], [alone] if backend == "loop" else []]
    assert stack.gives_newest


def test_of_members_that_cannot_leave_it_out_the_rest_is_computed() -> None:
    stack = StackedModule([Embed(), Embed()])
    assert not stack.gives_newest
    assert torch.equal(stack.newest(IDS, training=False), stack(IDS)[:, :, -1])


def test_a_mixed_stack_gives_the_newest_of_each_group() -> None:
    mixed = MixedModule([Embed(), Newest(), Embed()])
    assert not mixed.gives_newest
    assert torch.equal(mixed.newest(IDS, training=False), mixed(IDS)[:, :, -1])
    assert MixedModule([Newest(), Other()]).gives_newest
