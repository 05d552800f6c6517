"""Adapters: against fakes whose answer is known, and against real models where ``transformers`` is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from ensemble_kd.encoders import from_huggingface, right_padded
from ensemble_kd.errors import EnsembleKDError

V, D = 10, 8
IDS = torch.tensor([[0, 0, 3, 4, 5], [0, 0, 0, 0, 0], [1, 2, 3, 4, 11], [0, 0, 0, 0, 7]])


class FakeHuggingFace(nn.Module):
    """Keeps what it was called with; hidden states are the item's embedding plus its position id."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**{"vocab_size": V + 2, **config})
        self.words = nn.Embedding(V + 2, D, padding_idx=config.get("pad_token_id"))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool) -> Any:
        self.called_with = (attention_mask, position_ids, use_cache)
        return SimpleNamespace(last_hidden_state=self.words(input_ids) + position_ids[..., None])


def test_huggingface_call_hides_padding_and_counts_items() -> None:
    model = FakeHuggingFace(pad_token_id=0)
    hidden = from_huggingface(model)(IDS)
    attention_mask, position_ids, use_cache = model.called_with
    assert attention_mask.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1] * 5, [0, 0, 0, 0, 1]]
    assert position_ids.tolist() == [[0, 0, 0, 1, 2], [0] * 5, [0, 1, 2, 3, 4], [0] * 5]
    assert use_cache is False
    torch.testing.assert_close(hidden, model.words(IDS) + position_ids[..., None])


def test_huggingface_facts_come_from_the_config_unless_given() -> None:
    encoder = from_huggingface(FakeHuggingFace(max_position_embeddings=7, model_type="bert"))
    assert (encoder.num_items, encoder.max_len, encoder.causal) == (V, 7, False)
    assert from_huggingface(FakeHuggingFace(model_type="bert", is_decoder=True)).causal
    assert from_huggingface(FakeHuggingFace(model_type="llama")).causal
    assert not from_huggingface(FakeHuggingFace(model_type="unheard-of")).causal
    given_ = from_huggingface(FakeHuggingFace(model_type="llama"), num_items=3, max_len=4, causal=False)
    assert (given_.num_items, given_.max_len, given_.causal) == (3, 4, False)
    assert [name for name, _ in given_.named_parameters()] == ["model.words.weight"]


def test_huggingface_errors_say_what_to_do() -> None:
    with pytest.raises(EnsembleKDError, match=r"got None\. Pass num_items"):
        from_huggingface(nn.Linear(2, 2))
    with pytest.raises(EnsembleKDError, match="vocab_size of 3 or more, got 2"):
        from_huggingface(FakeHuggingFace(vocab_size=2))
    with pytest.raises(EnsembleKDError, match="num_items, a whole number >= 1, got 0"):
        from_huggingface(FakeHuggingFace(), num_items=0)
    with pytest.raises(EnsembleKDError, match="padding id 0, got 1"):
        from_huggingface(FakeHuggingFace(pad_token_id=1))

    class WithHead(FakeHuggingFace):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return SimpleNamespace(logits=input_ids)

    with pytest.raises(EnsembleKDError, match=r"last_hidden_state, got SimpleNamespace\. Wrap the bare model"):
        from_huggingface(WithHead())(IDS)


class RightPaddedGRU(nn.Module):
    """In RecBole's manner: reads from the first column on, and returns position length - 1, or all of them."""

    def __init__(self, every: bool = False) -> None:
        super().__init__()
        self.n_items, self.every = V + 1, every
        self.words, self.mix = nn.Embedding(V + 2, D), nn.Linear(D, D)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        place = torch.arange(1, item_seq.shape[1] + 1, device=item_seq.device)
        # A causal mean whose weights depend on the column, so that a wrong roll shows.
        summed = (self.mix(self.words(item_seq)) * place[:, None]).cumsum(1) / place[:, None]
        if self.every:
            return summed
        last = (item_seq_len - 1)[:, None, None].expand(-1, 1, D)
        return summed.gather(1, last)[:, 0]


@given(real=st.integers(1, 5), padding=st.integers(0, 4), seed=st.integers(0, 1000))
def test_right_padded_model_sees_each_row_from_its_first_item(real: int, padding: int, seed: int) -> None:
    torch.manual_seed(seed)
    last, every = RightPaddedGRU().double(), RightPaddedGRU(every=True).double()
    every.load_state_dict(last.state_dict())
    items, lengths = torch.randint(1, V + 2, (3, real)), torch.full((3,), real)
    padded = F.pad(items, (padding, 0))
    torch.testing.assert_close(right_padded(last)(padded), last(items, lengths))
    hidden = right_padded(every, positions="all")(padded)
    assert hidden.shape == (3, padding + real, D)
    torch.testing.assert_close(hidden[:, padding:], every(items, lengths))


def test_right_padded_rows_of_mixed_lengths_are_rolled_one_by_one() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
            seen.extend([item_seq, item_seq_len])
            return item_seq[:, :, None]

    back = right_padded(Spy(), positions="all")(IDS)
    assert seen[0].tolist() == [[3, 4, 5, 0, 0], [0] * 5, [1, 2, 3, 4, 11], [7, 0, 0, 0, 0]]
    assert seen[1].tolist() == [3, 1, 5, 1]
    assert torch.equal(back[:, :, 0], IDS)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_right_padded_under_vmap_equals_the_loop(positions: Any) -> None:
    members = [right_padded(RightPaddedGRU(positions == "all").double(), positions=positions) for _ in range(3)]
    parameters, _ = stack_module_state(members)
    inputs = torch.stack([IDS, IDS.roll(1, 0), IDS.roll(2, 0)])

    def call(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(members[0], p, (x,))

    stacked = torch.vmap(call, randomness="different")(parameters, inputs)
    plain = torch.stack([member(x) for member, x in zip(members, inputs, strict=True)])
    torch.testing.assert_close(stacked, plain)
    assert all(name.startswith("model.") for name in parameters)


def test_right_padded_facts_and_errors() -> None:
    encoder = right_padded(RightPaddedGRU())
    assert (encoder.num_items, encoder.causal) == (V, True)
    assert not right_padded(RightPaddedGRU(every=True), positions="all").causal
    assert right_padded(RightPaddedGRU(every=True), positions="all", causal=True).causal
    assert right_padded(RightPaddedGRU(), num_items=4).num_items == 4
    assert encoder.max_len is None
    sized = RightPaddedGRU()
    sized.max_seq_length = 6
    assert (right_padded(sized).max_len, right_padded(sized, max_len=4).max_len) == (6, 4)
    without = right_padded(nn.Embedding(V + 2, D), positions="all", lengths=False)
    assert not hasattr(without, "num_items")
    torch.testing.assert_close(without(IDS), without.model(IDS))
    with pytest.raises(EnsembleKDError, match="positions 'last' or 'all'"):
        right_padded(RightPaddedGRU(), positions="first")  # type: ignore[arg-type]
    with pytest.raises(EnsembleKDError, match=r"3 axes, got \(4, 8\)\. Choose positions="):
        right_padded(RightPaddedGRU(), positions="all")(IDS)


def tiny(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokens = {"bos_token_id": None, "eos_token_id": None, "attn_implementation": "eager"}
    if kind == "bert":
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": D, "intermediate_size": 16}
        config = transformers.BertConfig(vocab_size=V + 2, max_position_embeddings=9, **sizes, **tokens)
        return transformers.BertModel(config, add_pooling_layer=False)
    config = transformers.GPT2Config(vocab_size=V + 2, n_positions=9, n_layer=2, n_head=2, n_embd=D, **tokens)
    return transformers.GPT2Model(config)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_real_model_honours_the_contract(kind: str) -> None:
    encoder = from_huggingface(tiny(kind)).eval()
    assert (encoder.num_items, encoder.max_len, encoder.causal) == (V, 9, kind == "gpt2")
    hidden = encoder(IDS)
    assert hidden.shape == (4, 5, D)
    assert hidden.isfinite().all()
    torch.testing.assert_close(hidden[:1, 2:], encoder(IDS[:1, 2:]), rtol=1e-4, atol=1e-5)
    changed = IDS.clone()
    changed[:, -1] = 9
    same = torch.allclose(encoder(changed)[2, :-1], hidden[2, :-1], atol=1e-6)
    assert same == encoder.causal


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_real_model_under_vmap_equals_the_loop(kind: str) -> None:
    members = [from_huggingface(tiny(kind)).eval() for _ in range(2)]
    with torch.no_grad():
        for parameter in members[1].parameters():
            parameter.add_(0.1)
    parameters, buffers = stack_module_state(members)

    def call(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return functional_call(members[0], (p, b), (IDS,))

    stacked = torch.vmap(call, randomness="different")(parameters, buffers)
    torch.testing.assert_close(stacked, torch.stack([m(IDS) for m in members]), rtol=1e-4, atol=1e-5)
    stacked.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
