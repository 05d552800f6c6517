"""The contract of an encoder, for each of the four, and each against an oracle of other algebra."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from ensemble_kd.encoders import BERT4Rec, Caser, GRU4Rec, SASRec
from ensemble_kd.encoders.parts import HIDDEN_KEY, LONG, SelfAttention, SequenceEncoder, dropout
from ensemble_kd.encoders.sasrec import by_distance
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.testing import check_encoder

V, D, MAX_LEN = 20, 8, 9
Factory = Callable[..., SequenceEncoder]

FACTORIES: dict[str, Factory] = {
    "bert4rec": lambda **k: BERT4Rec(V, d_model=D, max_len=MAX_LEN, **k),
    "bert4rec-pre-norm-head": lambda **k: BERT4Rec(
        V, d_model=D, max_len=MAX_LEN, norm_first=True, output_head=True, **k
    ),
    "sasrec": lambda **k: SASRec(V, d_model=D, max_len=MAX_LEN, num_heads=2, **k),
    "sasrec-relative": lambda **k: SASRec(
        V, d_model=D, max_len=MAX_LEN, num_heads=2, d_ff=3 * D, activation="gelu", positions="relative", **k
    ),
    "sasrec-post-norm": lambda **k: SASRec(V, d_model=D, max_len=MAX_LEN, norm_first=False, scale_embedding=False, **k),
    "gru4rec": lambda **k: GRU4Rec(V, d_model=D, max_len=MAX_LEN, num_layers=2, hidden_size=6, **k),
    "caser": lambda **k: Caser(V, d_model=D, max_len=MAX_LEN, window=3, horizontal=2, vertical=2, **k),
}
CAUSAL = [name for name in FACTORIES if not name.startswith("bert4rec")]
BATCHED = [name for name in FACTORIES if name != "gru4rec"]  # nn.GRU has no batching rule


def build(name: str, seed: int = 0, **arguments: object) -> SequenceEncoder:
    torch.manual_seed(seed)
    encoder = FACTORIES[name](**arguments)
    with torch.no_grad():  # large weights, so that nothing real hides below a tolerance
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        encoder.item_embedding.weight[0].zero_()
    return encoder


def ids(b: int = 4, l: int = 7, seed: int = 0) -> Tensor:  # noqa: E741 - the alphabet's letter
    """Row 0 has no padding, row 1 is all padding, the others have some."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randint(1, V + 2, (b, l), generator=generator)
    padding = torch.randint(0, l, (b, 1), generator=generator)
    padding[0], padding[1] = 0, l
    return out * (torch.arange(l) >= padding)


@pytest.mark.parametrize("name", FACTORIES)
def test_the_kit_for_users_finds_no_fault(name: str) -> None:
    report = check_encoder(FACTORIES[name])
    assert report.ok, str(report)
    served = {check.name for check in report.checks if check.verdict == "ok"}
    assert ("causality" in served) == (name in CAUSAL)
    assert ("vmap" in served) == (name in BATCHED)


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("length", [1, 2, MAX_LEN])
def test_any_length_gives_a_hidden_state_per_position(name: str, length: int) -> None:
    encoder = build(name)
    assert encoder(ids(l=length)).shape == (4, length, D)
    assert (encoder.num_items, encoder.d_model, encoder.max_len) == (V, D, MAX_LEN)
    assert encoder.item_embedding.weight.shape == (V + 2, D)


@pytest.mark.parametrize("name", FACTORIES)
@given(real=st.integers(1, 6), padding=st.integers(1, 3), seed=st.integers(0, 1000))
def test_left_padding_changes_nothing(name: str, real: int, padding: int, seed: int) -> None:
    encoder = build(name, seed).double().eval()
    items = torch.randint(1, V + 2, (3, real))
    padded = F.pad(items, (padding, 0))
    torch.testing.assert_close(encoder(padded)[:, padding:], encoder(items), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FACTORIES)
@given(length=st.integers(1, MAX_LEN), seed=st.integers(0, 99))
def test_the_newest_state_alone_is_the_last_of_all(name: str, length: int, seed: int) -> None:
    encoder, item_ids = build(name, seed).double().eval(), ids(l=length, seed=seed)
    every, newest = encoder(item_ids), encoder(item_ids, newest=True)
    assert newest.shape == (4, D)
    torch.testing.assert_close(newest, every[:, -1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [LONG - 1, LONG])  # on either side of the change of attention's path
@pytest.mark.parametrize("cls", [BERT4Rec, SASRec])
def test_the_newest_state_of_long_histories_costs_one_row_of_attention(cls: type[SequenceEncoder], length: int) -> None:
    torch.manual_seed(0)
    encoder = cls(V, d_model=D, max_len=LONG).double().eval()  # type: ignore[call-arg]
    item_ids, rows = torch.randint(1, V, (2, length)), []
    for block in encoder.blocks:  # type: ignore[union-attr]
        block.norm2.register_forward_hook(lambda _module, given, _output: rows.append(given[0].shape[1]))
    newest = encoder(item_ids, newest=True)
    assert rows == [length, 1]
    torch.testing.assert_close(newest, encoder(item_ids)[:, -1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CAUSAL)
@given(length=st.integers(2, MAX_LEN), data=st.data(), seed=st.integers(0, 1000))
def test_causal_encoders_see_no_later_item(name: str, length: int, data: st.DataObject, seed: int) -> None:
    changed = data.draw(st.integers(1, length - 1))
    encoder = build(name, seed).double().eval()
    assert encoder.causal
    before = torch.randint(1, V + 1, (2, length))
    after = before.clone()
    after[:, changed] = after[:, changed] % V + 1
    out, other = encoder(before), encoder(after)
    torch.testing.assert_close(out[:, :changed], other[:, :changed], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(out[:, changed], other[:, changed])


@pytest.mark.parametrize("name", ["bert4rec", "bert4rec-pre-norm-head"])
def test_bert4rec_sees_both_directions_and_order(name: str) -> None:
    encoder = build(name).double().eval()
    assert not encoder.causal
    before = torch.tensor([[1, 2, 3, 4]])
    for place in range(4):
        after = before.clone()
        after[0, place] = 9
        moved = (encoder(before) - encoder(after)).abs().amax(-1)[0]
        assert (moved > 1e-6).all()
    swapped = torch.tensor([[2, 1, 3, 4]])
    assert not torch.allclose(encoder(before)[:, -1], encoder(swapped)[:, -1])


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_reach_every_parameter_and_stay_finite(name: str, p: float) -> None:
    encoder = build(name, dropout=p).train()
    hidden = encoder(ids(b=16, l=MAX_LEN))
    assert hidden.isfinite().all()  # row 1 is all padding
    (hidden * torch.randn_like(hidden)).sum().backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key
    assert encoder.item_embedding.weight.grad is not None
    assert (encoder.item_embedding.weight.grad[0] == 0).all()


@pytest.mark.parametrize("name", BATCHED)
def test_vmap_equals_a_loop_of_plain_modules(name: str) -> None:
    members = [build(name, seed).double().eval() for seed in range(3)]
    parameters, buffers = stack_module_state(members)
    inputs = torch.stack([ids(seed=seed) for seed in range(3)])

    def call(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(members[0], (p, b), (x,))

    stacked = torch.vmap(call, randomness="different")(parameters, buffers, inputs)
    plain = torch.stack([member(x) for member, x in zip(members, inputs, strict=True)])
    torch.testing.assert_close(stacked, plain, rtol=1e-9, atol=1e-9)
    # Only real positions, as in every loss: torch's batching rule of embedding keeps padding_idx for member 0 alone.
    real = inputs != 0
    stacked[real].square().sum().backward()
    plain[real].square().sum().backward()
    for key, parameter in parameters.items():
        expected = torch.stack([dict(member.named_parameters())[key].grad for member in members])
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", BATCHED)
def test_members_draw_their_own_dropout_under_vmap(name: str) -> None:
    encoder = build(name, dropout=0.5).train()
    copies = {key: torch.stack([value, value]) for key, value in encoder.state_dict().items()}
    inputs = ids(b=8)

    def call(p: dict[str, Tensor]) -> Tensor:
        return functional_call(encoder, p, (inputs,))

    first, second = torch.vmap(call, randomness="different")(copies)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("name", FACTORIES)
def test_bfloat16_autocast_stays_close_to_float32(name: str) -> None:
    encoder = build(name).eval()
    inputs = ids()
    exact = encoder(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(inputs)
    assert rough.isfinite().all()
    real = inputs != 0  # what stands at padding depends on rounding, and nobody reads it
    error = (rough.float() - exact)[real].norm() / exact[real].norm()
    assert 0 < error < 0.03


@pytest.mark.parametrize("name", FACTORIES)
def test_zero_dropout_trains_as_it_evaluates_and_draws_nothing(name: str) -> None:
    encoder = build(name, dropout=0.0)
    state = torch.get_rng_state()
    torch.testing.assert_close(encoder.train()(ids()), encoder.eval()(ids()), rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_drops_at_its_rate_keeps_the_mean_and_passes_gradients() -> None:
    torch.manual_seed(0)
    x = torch.ones(100_003, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.3)
    zeros = (y == 0).double().mean()
    assert abs(zeros - 0.3) < 0.01
    torch.testing.assert_close(y[y != 0].mean().item(), 1 / 0.7, rtol=1e-4, atol=0)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    for lag in (1, 2, 3, 4):  # lanes of one draw are independent of each other and of the next draw
        dropped = (y == 0).double()
        assert abs((dropped[lag:] * dropped[:-lag]).mean() - 0.09) < 0.01


@pytest.mark.parametrize("length", [5, LONG - 1, LONG])
@pytest.mark.parametrize("p", [0.0, 1e-6])  # the other path of long sequences; so small a rate drops nothing
@pytest.mark.parametrize("num_heads", [1, 2])
def test_attention_equals_torch_multi_head_attention(num_heads: int, p: float, length: int) -> None:
    ours = SelfAttention(D, num_heads, p).double().train()
    oracle = nn.MultiheadAttention(D, num_heads, batch_first=True, dtype=torch.float64).eval()
    with torch.no_grad():
        oracle.in_proj_weight.copy_(ours.qkv.weight)
        oracle.in_proj_bias.copy_(ours.qkv.bias.normal_())
        oracle.out_proj.load_state_dict(ours.out.state_dict())
    x, hidden = torch.randn(3, length, D, dtype=torch.float64), torch.ones(length, length, dtype=torch.bool).triu(1)
    mask = (hidden.double() * HIDDEN_KEY)[None, None].expand(3, 1, length, length)
    out, expected = ours(x, mask), oracle(x, x, x, attn_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    gradient = torch.randn_like(out)
    grads = torch.autograd.grad((out * gradient).sum(), [ours.qkv.weight])
    torch.testing.assert_close(
        grads, torch.autograd.grad((expected * gradient).sum(), [oracle.in_proj_weight]), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", BATCHED)
def test_path_of_other_devices_gives_the_same_shape(name: str) -> None:
    encoder = build(name).train().to("meta")
    assert encoder(ids().to("meta")).shape == (4, 7, D)


def test_gru4rec_equals_the_gru_on_each_row_without_its_padding() -> None:
    encoder = build("gru4rec").double().eval()
    assert isinstance(encoder, GRU4Rec)
    inputs = ids(b=6)
    hidden = encoder(inputs)
    for row, out in zip(inputs, hidden, strict=True):
        items = row[row != 0]
        if len(items):
            states, _ = encoder.gru(encoder.item_embedding(items)[None])
            torch.testing.assert_close(out[-len(items) :], encoder.project(states)[0], rtol=1e-9, atol=1e-9)


def test_caser_equals_convolutions_written_position_by_position() -> None:
    encoder = build("caser").double().eval()
    assert isinstance(encoder, Caser)
    with torch.no_grad():
        encoder.item_embedding.weight[0].fill_(5.0)  # padding must count as zero rows whatever stands there
    inputs = ids(b=3)
    hidden = encoder(inputs)
    for row, out in zip(inputs, hidden, strict=True):
        for position in range(len(row)):
            seen = [int(row[t]) if t >= 0 else 0 for t in range(position - 2, position + 1)]
            zero = torch.zeros(D, dtype=torch.float64)
            square = torch.stack([encoder.item_embedding.weight[item] if item else zero for item in seen])
            vertical = [sum(w * e for w, e in zip(filter_, square, strict=True)) for filter_ in encoder.vertical.weight]
            pooled = []
            for height, layer in enumerate(encoder.horizontal, start=1):
                kernel = layer.weight.view(-1, 1, height, D)
                maps = F.relu(F.conv2d(square[None, None], kernel, layer.bias))
                pooled.append(maps.flatten(1).view(len(kernel), -1).max(-1).values)
            expected = F.relu(encoder.join(torch.cat([torch.stack(vertical, -1).flatten(), *pooled])))
            torch.testing.assert_close(out[position], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cls", [BERT4Rec, SASRec, GRU4Rec, Caser])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_items": 0}, "num_items, a whole number"),
        ({"d_model": 0}, "d_model, a whole number"),
        ({"max_len": 2.5}, "max_len, a whole number"),
        ({"dropout": 1.0}, r"dropout, a number in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(cls: type[SequenceEncoder], arguments: dict[str, object], text: str) -> None:
    with pytest.raises(EnsembleKDError, match=f"{cls.__name__}: expected {text}"):
        cls(**{"num_items": 5, **arguments})  # type: ignore[arg-type]


def test_bad_arguments_of_one_class_are_named() -> None:
    for cls in (BERT4Rec, SASRec):
        with pytest.raises(EnsembleKDError, match="multiple of num_heads, got d_model = 8, num_heads = 3"):
            cls(5, d_model=8, num_heads=3)
        with pytest.raises(EnsembleKDError, match="init_std, a finite number > 0"):
            cls(5, init_std=0.0)
    with pytest.raises(EnsembleKDError, match="window, a whole number"):
        Caser(5, window=0)
    with pytest.raises(EnsembleKDError, match="hidden_size, a whole number"):
        GRU4Rec(5, hidden_size=-1)


@pytest.mark.parametrize("name", FACTORIES)
def test_bad_input_is_named(name: str) -> None:
    encoder = build(name)
    with pytest.raises(EnsembleKDError, match=r"l <= max_len = 9, got l = 10\. Keep the newest"):
        encoder(torch.ones(1, 10, dtype=torch.long))
    with pytest.raises(EnsembleKDError, match=r"item_ids \(b, l\) of integers"):
        encoder(torch.ones(5, dtype=torch.long))
    with pytest.raises(EnsembleKDError, match=r"item_ids \(b, l\) of integers"):
        encoder(torch.ones(1, 5))


def test_biases_by_distance_are_those_of_a_loop() -> None:
    bias = torch.randn(2, MAX_LEN, dtype=torch.float64, requires_grad=True)
    for length in (1, 2, MAX_LEN):
        found = by_distance(bias, length)
        want = torch.stack([torch.stack([bias[:, q - k] for k in range(q + 1)], 1).sum(1) for q in range(length)], 1)
        assert torch.allclose(found.tril().sum(-1), want)
        for q in range(length):
            for k in range(q + 1):
                assert torch.equal(found[:, q, k], bias[:, q - k])
    by_distance(bias, MAX_LEN).tril().sum().backward()
    assert bias.grad is not None
    assert bias.grad[0].tolist() == [float(MAX_LEN - distance) for distance in range(MAX_LEN)]


def test_relative_positions_shift_with_the_sequence() -> None:
    """Without learned positions an item's state depends on what is before it alone, not on where it stands."""
    encoder = SASRec(V, d_model=D, max_len=MAX_LEN, positions="relative", dropout=0.0).double().eval()
    torch.nn.init.normal_(encoder.blocks[0].distance_bias)  # type: ignore[arg-type]
    items = torch.tensor([[1, 2, 3, 4]])
    longer = encoder(torch.cat([items, torch.tensor([[5]])], 1))[:, :-1]
    assert torch.allclose(encoder(items), longer)
    learned = SASRec(V, d_model=D, max_len=MAX_LEN, dropout=0.0).double().eval()
    assert not torch.allclose(learned(items), learned(torch.cat([items, torch.tensor([[5]])], 1))[:, :-1])


@pytest.mark.parametrize("options", [{"positions": "sine"}, {"activation": "tanh"}, {"d_ff": 0}])
def test_sasrec_refuses_what_it_does_not_know(options: dict[str, object]) -> None:
    with pytest.raises(EnsembleKDError, match=f"SASRec: expected {next(iter(options))}"):
        SASRec(V, **options)  # type: ignore[arg-type]
