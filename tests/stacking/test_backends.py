"""A zoo of encoders, most of them somebody else's, under both backends.

Each either runs under vmap exactly as n plain modules do, or is refused there by name and served by the loop.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ensemble_kd import (
    CCL,
    ICL,
    KD,
    EnsembleKD,
    EnsembleKDError,
    MaskedItem,
    NextItem,
)
from ensemble_kd.encoders import from_huggingface, right_padded
from ensemble_kd.internal import is_vmap_slice
from ensemble_kd.stacking import Backend, StackedModule, build_members
from ensemble_kd.stacking.backends import decide
from ensemble_kd.stacking.tree import values_of
from ensemble_kd.stacking.trial import Trial, seconds_of

pytestmark = [
    # Operations without a batching rule run under vmap one by one: slower, as torch says, and right.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    # What nn.TransformerEncoder uses in evaluation.
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]

V, D, LENGTH, N = 20, 8, 6, 3
IDS = (1 + torch.randint(V, (6, LENGTH), generator=torch.Generator().manual_seed(0))) * (
    torch.arange(LENGTH) >= torch.tensor([0, 0, 1, 2, 3, 4])[:, None]
)


class Animal(NamedTuple):
    build: Callable[[], nn.Module]
    obstacle: str | None = None  # what vmap is refused with; None: it runs
    random: bool = False  # draws in training mode


ZOO: dict[str, Animal] = {}


def animal(
    name: str, *, obstacle: str | None = None, random: bool = False
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        ZOO[name] = Animal(build, obstacle, random)
        return build

    return register


class Base(nn.Module):
    num_items = V

    def __init__(self) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(V + 2, D, padding_idx=0)


@animal("BERT of Hugging Face", random=True)
def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=V + 2,
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    return from_huggingface(transformers.BertModel(config, add_pooling_layer=False))


@animal("GPT-2 of Hugging Face", random=True)
def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return from_huggingface(
        transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=V + 2, n_embd=D, n_layer=1, n_head=2, n_positions=8, pad_token_id=0)
        )
    )


@animal("Llama of Hugging Face")
def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V + 2,
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        max_position_embeddings=8,
        pad_token_id=0,
    )
    return from_huggingface(transformers.LlamaModel(config))


@animal("x-transformers")
class XTransformers(nn.Module):
    num_items, max_len = V, LENGTH + 1

    def __init__(self) -> None:
        super().__init__()
        x = pytest.importorskip("x_transformers")
        layers = x.Encoder(dim=D, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True)
        self.net = x.TransformerWrapper(num_tokens=V + 2, max_seq_len=self.max_len, attn_layers=layers)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.net(item_ids, mask=item_ids != 0, return_embeddings=True)


class Recurrent(Base):
    causal = True

    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = cell(D, D, batch_first=True)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.rnn(self.item_embedding(item_ids))[0]


animal("nn.GRU", obstacle="aten::gru")(lambda: Recurrent(nn.GRU))
animal("nn.LSTM", obstacle="aten::lstm")(lambda: Recurrent(nn.LSTM))


@animal("nn.TransformerEncoder", random=True)
class Torch(Base):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.layers(self.item_embedding(item_ids), src_key_padding_mask=item_ids == 0)


@animal("nn.MultiheadAttention, its weights kept")
class Attending(Base):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, item_ids: Tensor) -> Tensor:
        h = self.item_embedding(item_ids)
        out, self.weights = self.attention(h, h, h, key_padding_mask=item_ids == 0)
        return out + h


@animal("a CNN with BatchNorm")
class Convolving(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(D, D, 3, padding=1), nn.BatchNorm1d(D), nn.ReLU(), nn.Conv1d(D, D, 1))

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.net(self.item_embedding(item_ids).mT).mT


@animal("plain tensors, the same for all")
class Constant(Base):
    def __init__(self) -> None:
        super().__init__()
        self.decay = 0.5 ** torch.arange(LENGTH + 2).flip(0)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.item_embedding(item_ids).cumsum(dim=1) * self.decay[-item_ids.shape[1] :, None]


@animal("plain tensors, each its own", obstacle="outputs that differ from the members' own")
class Projecting(Base):
    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.randn(D, D)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.item_embedding(item_ids) @ self.projection


@animal("buffers written in forward")
class Writing(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, item_ids: Tensor) -> Tensor:
        h = self.item_embedding(item_ids)
        if self.training:
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(dim=(0, 1))
        return h - self.mean


@animal("a rotary cache filled in forward")
class Rotary(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 1 / 10 ** torch.arange(D), persistent=False)
        self.cache: Tensor | None = None

    def forward(self, item_ids: Tensor) -> Tensor:
        length = item_ids.shape[1]
        if self.cache is None or len(self.cache) < length:
            self.cache = (torch.arange(length)[:, None] * self.frequencies).cos()
        return self.item_embedding(item_ids) * self.cache[:length]


@animal("tied weights")
class Tied(Base):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, D), nn.Linear(D, D)
        self.down.weight = self.up.weight

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.down(self.up(self.item_embedding(item_ids)).tanh())


@animal("a layer used twice")
class Shared(Base):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D))
        layer.register_buffer("scale", torch.full((D,), 0.5))
        self.layers = nn.Sequential(layer, nn.Tanh(), layer)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.layers(self.item_embedding(item_ids))


@animal("dropout", random=True)
class Dropping(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.drop(self.item_embedding(item_ids))


@animal("(b, d)")
class Newest(Base):
    def forward(self, item_ids: Tensor) -> Tensor:
        h = self.item_embedding(item_ids)
        return h[:, -1] + 0.5 * h.mean(dim=1)


@animal("padded on the right, of somebody else")
def rolled() -> nn.Module:
    class Last(Base):
        n_items = V + 1

        def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
            h = self.item_embedding(item_seq).cumsum(dim=1) / (1 + torch.arange(item_seq.shape[1]))[:, None]
            return h.gather(1, (item_seq_len - 1)[:, None, None].expand(-1, 1, D))[:, 0]

    return right_padded(Last())


@animal("a class of the factory's own")
def local() -> nn.Module:
    class Local(Base):
        def forward(self, item_ids: Tensor) -> Tensor:
            return self.item_embedding(item_ids)

    return Local()


@animal("a plain nn.Parameter alone")
class Bare(nn.Module):
    num_items = V

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(0.5 * torch.randn(V + 2, D))

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.rows[item_ids]


@animal("a mixture of dtypes")
class Mixed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D, dtype=torch.float64)
        self.outer = nn.Linear(D, D)
        self.register_buffer("steps", torch.arange(3))

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.outer(self.inner(self.item_embedding(item_ids).double()).tanh().float()) * self.steps[1]


@animal("weight normalisation")
def normalised() -> nn.Module:
    class Normalised(Base):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(D, D))

        def forward(self, item_ids: Tensor) -> Tensor:
            return self.linear(self.item_embedding(item_ids))

    return Normalised()


@animal("modules in lists and dictionaries")
class Nested(Base):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"linear": nn.Linear(D, D), "norm": nn.LayerNorm(D)})])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(()))])

    def forward(self, item_ids: Tensor) -> Tensor:
        h = self.item_embedding(item_ids)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            h = block["norm"](h + block["linear"](h))
        return h * self.scales[0] + self.scales[1]


class Forgetting(torch.autograd.Function):
    """The right output under vmap, and the wrong gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream * (0.9 if is_vmap_slice(upstream) else 1.0)


def test_vmap_with_other_gradients_is_refused_in_training() -> None:
    class Wrong(Base):
        def forward(self, item_ids: Tensor) -> Tensor:
            return Forgetting.apply(self.item_embedding(item_ids))  # type: ignore[no-any-return]

    stacked = StackedModule([Wrong() for _ in range(N)])
    obstacle = stacked.vmap_obstacle(IDS)
    assert obstacle is not None
    assert obstacle.startswith("gradients that differ from the loop's by 1.0e-01")
    assert stacked.eval().vmap_obstacle(IDS) is None


@animal("a choice by value", obstacle="data-dependent control flow")
class Choosing(Base):
    def forward(self, item_ids: Tensor) -> Tensor:
        h = self.item_embedding(item_ids)
        return h if bool(h.sum() > 0) else -h


PAIRS = [(name, backend) for name in ZOO for backend in ("loop", "vmap") if backend == "loop" or not ZOO[name].obstacle]
RUNS = [name for name in ZOO if not ZOO[name].obstacle]


def model_of(name: str, backend: str = "auto", **settings: Any) -> EnsembleKD:
    settings = {"losses": 0.1 * (ICL() + CCL()) + 0.1 * KD(), **settings}
    return EnsembleKD(ZOO[name].build, N, backend=backend, **settings)  # type: ignore[arg-type]


def stack_of(name: str, backend: Backend) -> tuple[list[nn.Module], StackedModule]:
    """n plain modules, and the same stacked."""
    plain, members = (build_members(ZOO[name].build, N, seed=0) for _ in range(2))
    return plain, StackedModule(members, backend=backend)


def test_the_zoo_is_large() -> None:
    assert len(ZOO) >= 20
    assert len(RUNS) < len(ZOO)


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_outputs_in_evaluation_are_those_of_plain_modules(name: str, backend: Backend) -> None:
    plain, stacked = stack_of(name, backend)
    stacked.eval()
    for ids, gradients in itertools.product((IDS, IDS[:1, 2:], IDS), (True, False)):
        with torch.set_grad_enabled(gradients):  # without them nn.TransformerEncoder takes a path of its own
            want = torch.stack([m.eval()(ids) for m in plain])
            torch.testing.assert_close(stacked(ids), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "backend"), [(n, b) for n, b in PAIRS if not ZOO[n].random])
def test_training_mode_is_that_of_plain_modules(name: str, backend: Backend) -> None:
    """Outputs, gradients, and the buffers after three passes."""
    plain, stacked = stack_of(name, backend)
    for _ in range(3):
        out, want = stacked(IDS), torch.stack([m(IDS) for m in plain])
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    slope = torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(1))
    (out * slope).sum().backward()
    (want * slope).sum().backward()
    for name_, p in stacked.named_parameters():
        grads = [m.get_parameter(name_).grad for m in plain]
        assert (p.grad is None) == (grads[0] is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, torch.stack(grads), rtol=1e-3, atol=1e-5)  # type: ignore[arg-type]
    for name_, b in stacked.named_buffers():
        torch.testing.assert_close(b, torch.stack([m.get_buffer(name_) for m in plain]))


@pytest.mark.parametrize("name", [name for name in RUNS if ZOO[name].random])
def test_members_draw_their_own_under_vmap(name: str) -> None:
    module = ZOO[name].build()
    stacked = StackedModule([copy.deepcopy(module) for _ in range(N)], backend="vmap")
    torch.manual_seed(0)
    out = stacked(IDS)
    for i, j in itertools.combinations(range(N), 2):
        assert not torch.equal(out[i], out[j])
    out = stacked.eval()(IDS)
    torch.testing.assert_close(out, out[:1].expand_as(out))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_training_lowers_the_loss(name: str, backend: str) -> None:
    model = model_of(name, backend)
    assert isinstance(model.objective, MaskedItem | NextItem)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)

    def loss() -> Tensor:
        """In training mode, with the same masks each time."""
        torch.manual_seed(0)
        return model.loss(IDS, generator=torch.Generator().manual_seed(0)).total

    first = loss()
    for _ in range(8):
        optimizer.zero_grad()
        loss().backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
    assert float(loss().detach()) < float(first.detach()) - 0.1
    assert set(model.backend) == {"train on cpu"}
    assert model.backend["train on cpu"] == f"{backend} (asked for)"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_a_member_scores_as_its_row_after_training(name: str, backend: str) -> None:
    model = model_of(name, backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.loss(IDS).total.backward()
    optimizer.step()
    model.eval()
    scores = model.member_scores(IDS).detach()
    for i in range(N):
        torch.testing.assert_close(model.member(i)(IDS), scores[i], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(IDS), scores.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(IDS), model(IDS))


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].obstacle])
@pytest.mark.parametrize("training", [True, False])
def test_vmap_is_refused_by_name_where_it_cannot_serve(name: str, training: bool) -> None:
    obstacle = ZOO[name].obstacle
    assert obstacle is not None
    model = model_of(name, "vmap").train(training)
    for _ in range(2):  # the first refusal leaves nothing behind
        with pytest.raises(EnsembleKDError) as caught:
            model.hidden(IDS)
        text = str(caught.value)
        assert text.startswith("backend='vmap': expected an encoder that torch.vmap can run, got ")
        assert obstacle in text
        assert text.endswith('. Use backend="loop" (or "auto"), which runs any encoder.')
    assert model.training == training
    assert model.backend == {}


@pytest.mark.parametrize("name", ["a mixture of dtypes", "nn.GRU"])
def test_auto_on_a_cpu_is_the_loop_and_says_so(name: str) -> None:
    model = model_of(name)
    assert "backend='auto' [undecided]" in repr(model)
    model.loss(IDS)
    model.recommend(IDS)
    why = "loop (on a CPU the loop is faster than vmap)"
    assert model.backend == {"train on cpu": why, "eval on cpu": why}
    assert f"backend='auto' [train on cpu: {why}, eval on cpu: {why}]" in repr(model)


@pytest.mark.parametrize("name", ZOO)
def test_auto_elsewhere_takes_vmap_where_it_serves(name: str) -> None:
    """The decision of an accelerator, made on a CPU; it leaves weights, buffers, modes and random states alone."""
    for training in (True, False):
        _, stacked = stack_of(name, "auto")
        stacked.train(training)
        before, state = copy.deepcopy(stacked.state_dict()), torch.get_rng_state()
        obstacle_to_vmap = functools.partial(stacked.vmap_obstacle, IDS)
        chosen, why = decide("auto", N, "cuda", obstacle_to_vmap, lambda: (2e-3, 1e-3))
        obstacle = ZOO[name].obstacle
        assert chosen == ("loop" if obstacle else "vmap")
        assert (
            why.startswith("vmap cannot serve: ") and obstacle in why
            if obstacle
            else why == "vmap agrees with the loop, and took 1 ms to its 2 ms"
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[key]) for key, value in stacked.state_dict().items())
        assert all(p.grad is None for p in stacked.parameters())
        assert all(m.training == training for i in range(N) for m in stacked.member(i).modules())
        assert decide("auto", 1, "cuda", lambda: None, lambda: (2.0, 1.0)) == ("loop", "there is one member")


def test_auto_elsewhere_takes_what_is_faster() -> None:
    chosen = decide("auto", N, "cuda", lambda: None, lambda: (1e-3, 2.5e-3))
    assert chosen == ("loop", "the loop took 1 ms to vmap's 2.5 ms")
    assert decide("vmap", N, "cuda", lambda: None, lambda: (1e-3, 2.5e-3)) == ("vmap", "asked for")


def test_a_measurement_runs_both_and_leaves_no_trace() -> None:
    _, stacked = stack_of("buffers written in forward", "auto")
    before, state = copy.deepcopy(stacked.state_dict()), torch.get_rng_state()
    trial = Trial(stacked._templates, *values_of(stacked), (IDS,))
    assert all(0 < seconds < 10 for seconds in seconds_of(trial, training=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in stacked.state_dict().items())
    assert all(p.grad is None for p in stacked.parameters())


def test_vmap_that_fails_on_the_inputs_is_not_taken() -> None:
    _, stacked = stack_of("nn.GRU", "auto")
    loop, vmap = seconds_of(Trial(stacked._templates, *values_of(stacked), (IDS,)), training=True)
    assert loop < vmap == float("inf")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_first_call_without_gradients_decides_as_any_other(
    context: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("tied weights", "vmap")
    tried, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: tried.append(True) or grad(*a, **k))
    with context():
        model(IDS)
    assert tried, "a backward pass is part of what vmap must be able to do in training mode"
    assert model.backend == {"train on cpu": "vmap (asked for)"}
    model.loss(IDS).total.backward()


def test_an_encoders_own_error_is_not_blamed_on_vmap() -> None:
    class Narrow(Base):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(D)

        def forward(self, item_ids: Tensor) -> Tensor:
            return self.norm(self.item_embedding(item_ids)[:, -1])

    model = EnsembleKD(Narrow, 2, backend="vmap", losses=0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.loss(IDS[:1])
    model.loss(IDS).total.backward()
    assert model.backend == {"train on cpu": "vmap (asked for)"}


def test_vmap_with_other_outputs_is_refused_under_autocast_too() -> None:
    class Wrong(Base):
        def forward(self, item_ids: Tensor) -> Tensor:
            x = self.item_embedding(item_ids)
            return x * (1.3 if is_vmap_slice(x) else 1.0)

    stacked = StackedModule([Wrong() for _ in range(N)])
    with torch.autocast("cpu", torch.bfloat16):
        obstacle = stacked.vmap_obstacle(IDS, training=False)
    assert obstacle is not None
    assert obstacle.startswith("outputs that differ from the members' own by 3.0e-01")
