"""Templates: one thread at a time, copies for evaluation, modes and look-ups that belong to the call."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from ensemble_kd.stacking import Backend, StackedModule, sparse_lookups
from ensemble_kd.stacking.tree import filled

ROWS, D, N, THREADS = 9, 4, 3, 4
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Small(nn.Module):
    """Look-up, dropout, a recurrent layer, a result in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(ROWS, D)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(D, D)

    def forward(self, item_ids: Tensor) -> Tensor:
        self.last = self.out(self.drop(self.item_embedding(item_ids)))
        return self.last


def stack(kind: type[nn.Module] = Small, backend: Backend = "loop") -> StackedModule:
    torch.manual_seed(0)
    return StackedModule([kind() for _ in range(N)], backend=backend)


@pytest.fixture
def _impatient() -> Iterator[None]:
    """Threads take turns after every few lines of Python."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("training", [False, True])
def test_threads_evaluate_as_one(backend: Backend, training: bool) -> None:
    """Whatever the mode of the stack, which stays as it was."""
    stacked = stack(backend=backend).train(training)
    batches = [(IDS + i) % ROWS for i in range(20)]
    want = [stacked(ids, training=False).detach() for ids in batches]

    @torch.no_grad()
    def all_batches(shift: int) -> float:
        order = [(i + shift) % len(batches) for i in range(len(batches))]
        return max(float((stacked(batches[i], training=False) - want[i]).abs().max()) for i in order)

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(all_batches, range(THREADS * 2))) == [0.0] * THREADS * 2
    assert stacked.training == training
    assert all(m.training == training for i in range(N) for m in stacked.member(i).modules())


@pytest.mark.usefixtures("_impatient")
def test_evaluation_is_undisturbed_by_training_and_training_by_evaluation() -> None:
    stacked, calm = stack(), stack()
    want, losses = stacked(IDS, training=False).detach(), []

    def steps(trained: StackedModule) -> list[Tensor]:
        return [trained(IDS).square().sum() for _ in range(30)]

    def watch() -> bool:
        same = True
        while not losses:
            same &= torch.equal(stacked(IDS, training=False), want)
        return same

    torch.manual_seed(1)
    expected = steps(calm)
    with ThreadPoolExecutor(2) as pool:
        watching = [pool.submit(watch) for _ in range(2)]
        torch.manual_seed(1)
        losses += steps(stacked)
        assert all(one.result() for one in watching)
    assert torch.equal(torch.stack(losses), torch.stack(expected))


def on_copies(stacked: StackedModule, threads: int = 1, run: Callable[[], Tensor] | None = None) -> list[Tensor]:
    """Outputs of threads that ask while the members are in use, each from a copy of its own, which stays."""
    for _ in range(50):
        with ThreadPoolExecutor(threads) as pool:
            with stacked.undisturbed():
                asked = [pool.submit(run or (lambda: stacked(IDS, training=False))) for _ in range(threads)]
                time.sleep(0.05)
            outputs = [one.result() for one in asked]
        if len(stacked._templates._spare) == threads:
            return outputs
    raise AssertionError("no copies were made")


class Meeting(Small):
    """In evaluation mode, waits for as many threads as the barrier, which all copies share."""

    barrier: threading.Barrier | None = None

    def forward(self, item_ids: Tensor) -> Tensor:
        hidden = super().forward(item_ids)
        if not self.training and self.barrier is not None:
            self.barrier.wait(timeout=10)
        assert self.last is hidden, "another thread's result"
        return hidden


def test_evaluation_runs_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads are within forward at once, and each sees its own result there."""
    stacked = stack(Meeting).eval()
    want = [stacked((IDS + i) % ROWS) for i in range(THREADS)]
    on_copies(stacked, THREADS - 1)
    monkeypatch.setattr(Meeting, "barrier", threading.Barrier(THREADS))
    with ThreadPoolExecutor(THREADS) as pool:
        got = list(pool.map(lambda i: stacked((IDS + i) % ROWS), range(THREADS)))
    assert all(map(torch.equal, got, want))


class Counting(Small):
    """Keeps a plain number that training moves and that evaluation uses."""

    steps = 0

    def forward(self, item_ids: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return super().forward(item_ids) * self.steps


def test_copies_know_what_training_left_in_attributes() -> None:
    stacked = stack(Counting)
    once = [stacked(IDS), stacked(IDS, training=False)][1]
    for steps in (1, 2, 3):
        (copied,) = on_copies(stacked)
        assert_close(copied, once * steps)
        assert torch.equal(stacked(IDS, training=False), copied)
        stacked(IDS)


def test_copies_of_before_are_never_used_again() -> None:
    """Whatever may have changed the members; a copy that is in use meanwhile is not kept either."""
    stacked = stack()
    changes: list[Callable[[], object]] = [lambda: stacked(IDS), stacked.double, stacked.eval]
    for change in changes:
        stacked.train()
        on_copies(stacked)
        took, done = threading.Event(), threading.Event()

        def borrow(took: threading.Event = took, done: threading.Event = done) -> None:
            with stacked._templates.lend(training=False) as lent:
                assert lent is not stacked._templates.members
                took.set()
                done.wait(10)

        with ThreadPoolExecutor(1) as pool:
            with stacked._templates.lend(training=False):
                borrowing = pool.submit(borrow)
                took.wait(10)
            change()
            done.set()
            borrowing.result()
        assert stacked._templates._spare == []


def test_copies_follow_the_members_to_another_type() -> None:
    class Caching(Small):
        def forward(self, item_ids: Tensor) -> Tensor:
            if not hasattr(self, "shift"):
                self.register_buffer("shift", torch.ones(D), persistent=False)
            return super().forward(item_ids) + self.shift.to(torch.float64)

    stacked = stack(Caching)
    on_copies(stacked)
    assert torch.equal(on_copies(stacked.double())[0], stacked(IDS, training=False))


class Locked(Small):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, item_ids: Tensor) -> Tensor:
        assert self.lock.acquire(blocking=False), "two threads on one module"
        try:
            return super().forward(item_ids)
        finally:
            self.lock.release()


@pytest.mark.usefixtures("_impatient")
def test_members_that_cannot_be_copied_serve_one_thread_at_a_time() -> None:
    stacked = stack(Locked).eval()
    want = stacked(IDS)
    with ThreadPoolExecutor(THREADS) as pool:
        assert all(torch.equal(want, got) for got in pool.map(lambda _: stacked(IDS), range(40)))


def test_a_copy_made_in_inference_mode_takes_part_in_a_gradient() -> None:
    class Scaled(Small):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.full((D,), 2.0)  # a plain tensor

        def forward(self, item_ids: Tensor) -> Tensor:
            return super().forward(item_ids) * self.scale

    stacked = stack(Scaled).eval()
    stacked(IDS)

    def evaluate() -> Tensor:
        with torch.inference_mode():
            return stacked(IDS)

    on_copies(stacked, run=evaluate)
    with ThreadPoolExecutor(1) as pool, stacked._templates.lend(training=False):  # the other thread takes the copy
        pool.submit(lambda: stacked(IDS).sum().backward()).result()
    assert all(p.grad is not None for p in stacked.parameters())


# Modes


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_the_mode_of_a_call_is_that_of_the_stack_or_the_one_passed(backend: Backend) -> None:
    stacked = stack(backend=backend)
    for mode in (True, False):
        stacked.train(mode)
        for run in (stacked, stacked.looped, stacked.vectorised):
            evaluated = run(IDS, training=False)
            assert torch.equal(evaluated, run(IDS, training=False))
            torch.manual_seed(3)
            drawn = run(IDS, training=True)
            assert not torch.equal(drawn, evaluated)
            torch.manual_seed(3)
            assert torch.equal(run(IDS), drawn if mode else evaluated)
        assert torch.equal(stacked.call_member(1, IDS, training=False), stacked.each(IDS, training=False)[1])
        assert stacked.training == mode
        assert all(m.training == mode for i in range(N) for m in stacked.member(i).modules())


def test_a_part_kept_in_evaluation_mode_stays_so() -> None:
    def still() -> Small:
        encoder = Small()
        encoder.drop.eval()
        return encoder

    stacked = StackedModule([still() for _ in range(N)], backend="loop")
    assert torch.equal(stacked(IDS), stacked(IDS, training=False))
    assert not stacked.member(0).drop.training  # type: ignore[union-attr]
    assert stacked.member(0).training


def test_a_switch_of_the_encoders_own_follows_the_mode_of_the_call() -> None:
    class Switching(Small):
        merged = False

        def train(self, mode: bool = True) -> Switching:
            super().train(mode)
            self.merged = not mode
            return self

        def forward(self, item_ids: Tensor) -> Tensor:
            assert self.merged != self.training
            return super().forward(item_ids)

    stacked = stack(Switching)
    stacked(IDS)
    stacked(IDS, training=False)
    stacked(IDS)


def test_a_call_that_fails_gives_its_templates_back() -> None:
    stacked = stack()
    want = stacked(IDS, training=False)
    for training in (True, False):
        with pytest.raises(IndexError):
            stacked(IDS + ROWS, training=training)
    assert all(m.training for i in range(N) for m in stacked.member(i).modules())
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: stacked(IDS, training=False)).result(), want)


def test_a_call_that_fails_leaves_the_template_empty() -> None:
    stacked = stack()
    with pytest.raises(IndexError):
        stacked(IDS + ROWS)
    with stacked._templates.lend(training=True) as templates:
        assert all(p.is_meta for t in templates for p in t.parameters())


class Tangled(nn.Module):
    """A tied parameter, a layer under two names, a buffer that forward replaces and one that it writes into."""

    seen: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D, bias=False)
        self.again, self.tied = self.first, nn.Linear(D, D)
        self.tied.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.last = x.sum(dim=0)
        return torch.as_tensor(self.tied(self.again(x)) + self.last)


def test_a_module_is_filled_as_by_functional_call() -> None:
    x = torch.randn(2, D)
    source, results = Tangled(), []
    for run in ("filled", "functional_call"):
        module, values = Tangled(), {name: tensor.clone() for name, tensor in source.state_dict().items()}
        del values["again.weight"]  # a module has one path
        own = dict(module.named_parameters(remove_duplicate=False)), dict(module.named_buffers())
        if run == "filled":
            with filled(module, values):
                out = module(x)
        else:
            out = functional_call(module, values, (x,), tie_weights=False)
        assert all(module.get_parameter(name) is p for name, p in own[0].items())
        assert all(module.get_buffer(name) is b for name, b in own[1].items())
        results.append({"out": out, **values})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())
    assert results[0]["seen"] == 1
    assert torch.equal(results[0]["last"], x.sum(dim=0))


# Look-ups


def test_a_reader_replaces_look_ups_in_its_thread_alone() -> None:
    stacked, names = stack(), []
    want = stacked(IDS, training=False)

    def reader(member: int, name: str, module: nn.Embedding) -> Callable[[Tensor], Tensor] | None:
        names.append((member, name, module.num_embeddings))
        return lambda ids: torch.zeros(*ids.shape, D) if member else module.weight[ids]

    with stacked.reading(reader):
        mine = stacked(IDS, training=False)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(lambda: stacked(IDS, training=False)).result(), want)
        with stacked.reading(lambda *_: None):
            assert torch.equal(stacked(IDS, training=False), want)
        assert torch.equal(stacked(IDS, training=False), mine)
    assert torch.equal(mine[0], want[0])
    assert not torch.equal(mine[1], want[1])
    assert names[:N] == [(i, "item_embedding", ROWS) for i in range(N)]
    assert torch.equal(stacked(IDS, training=False), want)


def test_embeddings_whose_weight_is_computed_are_looked_up_as_ever() -> None:
    class Normed(Small):
        def __init__(self) -> None:
            super().__init__()
            torch.nn.utils.parametrizations.weight_norm(self.item_embedding)

    stacked = stack(Normed)
    with sparse_lookups(stacked, at_least=1):
        stacked(IDS).sum().backward()
    assert all(p.grad is not None and not p.grad.is_sparse for p in stacked.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_compiler_traces_the_loop_whole_in_the_mode_of_the_call(training: bool) -> None:
    stacked = stack().train(training)
    compiled = torch.compile(partial(stacked, training=False), backend="eager", fullgraph=not training)
    assert_close(compiled(IDS), stacked(IDS, training=False))
    assert stacked.training == training
    assert all(m.training == training for i in range(N) for m in stacked.member(i).modules())
