# SPDX-License-Identifier: Apache-2.0
"""The frozen model: packed passes, families, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.training.teacher import Teacher, split_by_tokens
from tests.tiny import save_tiny_llama

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
FAMILIES = [
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
]


def make_teacher(config_class: Any = LlamaConfig, **values: Any) -> Teacher:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SHAPE | values))
    return Teacher(model.float(), "tiny")


@pytest.mark.parametrize("config_class", FAMILIES)
def test_packed_sequences_do_not_see_each_other(config_class: Any) -> None:
    teacher = make_teacher(config_class)
    sequences = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15]]
    packed = teacher.streams(sequences, [1, 3, 4])
    alone = [teacher.streams([sequence], [1, 3, 4]) for sequence in sequences]
    for layer in (1, 3, 4):
        expected = torch.cat([streams[layer] for streams in alone])
        assert packed[layer].shape == (11, 16)
        torch.testing.assert_close(packed[layer], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config_class", FAMILIES)
def test_packed_equals_padded(config_class: Any) -> None:
    teacher = make_teacher(config_class)
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


@pytest.mark.parametrize("config_class", [CohereConfig, Gemma2Config])
def test_refuses_a_model_that_changes_its_logits(config_class: Any) -> None:
    with pytest.raises(AdaDecodeError, match="caps or scales what its LM head says"):
        make_teacher(config_class)


def test_texts_end_at_an_attention_window() -> None:
    assert make_teacher(MistralConfig, sliding_window=8).max_length == 8
    assert make_teacher(MistralConfig, sliding_window=None).max_length == 64
    assert make_teacher(Gemma3TextConfig, sliding_window=8).max_length == 8
    whole = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4}
    assert make_teacher(Qwen2Config, **whole).max_length == 64


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


def test_split_by_tokens() -> None:
    groups = [list(group) for group in split_by_tokens([3, 3, 9, 1, 1], 6)]
    assert groups == [[0, 1], [2], [3, 4]]
    assert list(split_by_tokens([], 6)) == []
