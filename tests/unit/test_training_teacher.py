# SPDX-License-Identifier: Apache-2.0
"""The frozen model: packed passes, families, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.states import teacher as teacher_module
from adadecode_vllm.toolkit.states.cache import LiveStates
from adadecode_vllm.toolkit.states.teacher import KeyValues, Teacher, split_by_tokens
from adadecode_vllm.toolkit.states.texts import Text
from tests.tiny import save_tiny_llama
from tests.tiny_families import FAMILIES, config_class

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# They cap or scale what their LM head says, and training does not.
REFUSED = ["Cohere", "Cohere2", "Gemma2"]
TRAINED = sorted(FAMILIES.keys() - set(REFUSED))


def make_teacher(family: str = "Llama", **values: Any) -> Teacher:
    torch.manual_seed(0)
    config = config_class(family)(**SHAPE | values)
    model = AutoModelForCausalLM.from_config(config)
    return Teacher(model.float(), "tiny")


@pytest.mark.parametrize("family", TRAINED)
def test_packed_sequences_do_not_see_each_other(family: str) -> None:
    teacher = make_teacher(family)
    sequences = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15]]
    packed = teacher.streams(sequences, [1, 3, 4])
    alone = [teacher.streams([sequence], [1, 3, 4]) for sequence in sequences]
    for layer in (1, 3, 4):
        expected = torch.cat([streams[layer] for streams in alone])
        assert packed[layer].shape == (11, 16)
        torch.testing.assert_close(packed[layer], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", TRAINED)
def test_packed_equals_padded(family: str) -> None:
    teacher = make_teacher(family)
    sequences = [[5, 6, 7, 8], [10, 11, 12, 13, 14, 15]]
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [10, 11, 12, 13, 14, 15]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        output = teacher.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        )
        norm = teacher.model.model.norm
        at_2 = norm(output.hidden_states[2])[mask.bool()]
        logits = output.logits[mask.bool()]
    streams = teacher.streams(sequences, [2, 4])
    torch.testing.assert_close(streams[2], at_2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        streams[4] @ teacher.lm_head.T, logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", TRAINED)
def test_texts_go_on_from_their_keys_and_values(family: str) -> None:
    """Also from a beginning of theirs, and no layer runs that nobody asks for."""
    teacher = make_teacher(family)
    tokens, layers = [5, 9, 2, 7, 11, 3, 8], [1, 3]
    ran: list[int] = []
    for layer, module in enumerate(teacher.model.model.layers, 1):
        module.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    cache = KeyValues()
    whole = teacher.extend(cache, tokens, layers)
    assert ran == [1, 2, 3]
    other = cache.beginning(4)
    parted = teacher.extend(other, [60, 61], layers)
    assert (len(cache), len(other)) == (7, 6)
    expected = teacher.streams([tokens, [*tokens[:4], 60, 61]], layers)
    for layer in layers:
        found = torch.cat([whole[layer], parted[layer]])
        wanted = torch.cat([expected[layer][:7], expected[layer][-2:]])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_nothing_of_the_model_needs_a_gradient() -> None:
    teacher = make_teacher()
    assert not any(weight.requires_grad for weight in teacher.model.parameters())


def test_loads_a_directory(tmp_path: Path) -> None:
    lm_head = save_tiny_llama(tmp_path / "model")
    teacher = Teacher.load(str(tmp_path / "model"))
    assert torch.equal(teacher.lm_head, lm_head)
    assert (teacher.num_layers, teacher.dtype) == (4, torch.float32)


def test_refuses_another_architecture() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=96, n_positions=32)
    )
    with pytest.raises(
        AdaDecodeError, match=r"MODEL gpt2 \(GPT2LMHeadModel\).*use one"
    ):
        Teacher(model, "gpt2")


def test_refuses_a_model_without_a_linear_lm_head() -> None:
    model = make_teacher().model
    model.lm_head = torch.nn.Identity()
    with pytest.raises(AdaDecodeError, match="LM head is Identity"):
        Teacher(model, "odd")


@pytest.mark.parametrize("family", REFUSED)
def test_refuses_a_model_that_changes_its_logits(family: str) -> None:
    with pytest.raises(AdaDecodeError, match="caps or scales what its LM head says"):
        make_teacher(family)


def test_texts_end_at_an_attention_window() -> None:
    assert make_teacher("Mistral", sliding_window=8).max_length == 8
    assert make_teacher("Mistral", sliding_window=None).max_length == 64
    assert make_teacher("Gemma3", sliding_window=8).max_length == 8
    whole = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4}
    assert make_teacher("Qwen2", **whole).max_length == 64


def test_refuses_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(AdaDecodeError, match="it cannot be loaded"):
        Teacher.load(str(tmp_path))


@pytest.mark.parametrize(
    ("attention", "message"),
    [("xformers", "need a CUDA device; use --attn sdpa"), ("flash", "unknown")],
)
def test_refuses_attention(tmp_path: Path, attention: str, message: str) -> None:
    save_tiny_llama(tmp_path / "model")
    with pytest.raises(AdaDecodeError, match=message):
        Teacher.load(str(tmp_path / "model"), attention=attention)


class Shapes(TorchDispatchMode):
    """Remembers the shapes of all tensors that operations returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return result

    def squares(self, length: int) -> list[tuple[int, ...]]:
        """Shapes in which two dimensions reach a length."""
        return [s for s in self.seen if sum(size >= length for size in s) > 1]


@pytest.mark.parametrize("family", TRAINED)
def test_memory_of_a_long_text_grows_with_its_length_only(family: str) -> None:
    """At 131,072 tokens a mask of tokens x tokens would be 17 GB."""
    narrow = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    teacher = make_teacher(family, max_position_embeddings=2048, **narrow)
    length = min(1500, teacher.max_length - 1)
    text = Text(tuple(i % 90 for i in range(length)), 0)
    live = LiveStates(teacher, [text, text], [2, 4], pass_tokens=1024)
    with Shapes() as shapes:
        states = live.states([0, 1])
    assert states.shape == (2, 2 * (length - 1), 16)
    assert shapes.squares(length) == []
    # What it says is what the mask says.
    mask = torch.ones((1, 1, length, length), dtype=torch.bool).tril()
    with torch.no_grad():
        masked = teacher.model.model(
            input_ids=torch.tensor([text.token_ids]), attention_mask=mask
        )
    torch.testing.assert_close(
        states[1, : length - 1],
        masked.last_hidden_state[0, :-1],
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_mask_of_packed_texts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens --pass-tokens allows."""
    monkeypatch.setattr(teacher_module, "MASKED_TOKENS", 200)
    teacher = make_teacher()
    texts = [Text(tuple(range(60)), 0) for _ in range(40)]
    live = LiveStates(teacher, texts, [2, 4], pass_tokens=10**6)
    with Shapes() as shapes:
        states = live.states(range(40))
    assert states.shape == (2, 40 * 59, 16)
    assert shapes.squares(201) == []


@pytest.mark.parametrize("family", TRAINED)
def test_layer_0_is_what_enters_the_first_layer(family: str) -> None:
    teacher = make_teacher(family)
    tokens = [5, 6, 7, 8]
    states = teacher.streams([tokens], [0, 2])
    with torch.no_grad():
        output = teacher.model.model(
            input_ids=torch.tensor([tokens]), output_hidden_states=True
        )
        expected = teacher.model.model.norm(output.hidden_states[0])[0]
    torch.testing.assert_close(states[0], expected)
    # One at a time as well, with and without further layers.
    for layers in ([0], [0, 2]):
        cache = KeyValues()
        first = teacher.extend(cache, tokens[:2], layers)
        rest = teacher.extend(cache, tokens[2:], layers)
        for layer in layers:
            found = torch.cat((first[layer], rest[layer]))
            torch.testing.assert_close(found, states[layer], rtol=1e-4, atol=1e-4)


def test_split_by_tokens() -> None:
    groups = [list(group) for group in split_by_tokens([3, 3, 9, 1, 1], 6)]
    assert groups == [[0, 1], [2], [3, 4]]
    assert list(split_by_tokens([], 6)) == []
