# SPDX-License-Identifier: Apache-2.0
"""The shapes and the mask that xformers is called with, on a stand-in for it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM

from adadecode_vllm.toolkit.states.attention import xformers_attention
from adadecode_vllm.toolkit.states.teacher import Teacher, packed_arguments
from tests.tiny import save_tiny_llama


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """xformers' layout: (1, n, heads, head size)."""
    output = functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=attn_bias,
        scale=scale,
    )
    return output.transpose(1, 2)


@pytest.fixture
def _xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_seqlens(lengths: list[int]) -> torch.Tensor:
        arguments = packed_arguments(lengths, "sdpa", torch.device("cpu"))
        return arguments["attention_mask"]

    mask = SimpleNamespace(from_seqlens=from_seqlens)
    ops = ModuleType("xformers.ops")
    ops.fmha = SimpleNamespace(  # type: ignore[attr-defined]
        attn_bias=SimpleNamespace(BlockDiagonalCausalMask=mask),
        memory_efficient_attention=_attention,
    )
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


@pytest.mark.usefixtures("_xformers")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_each_sequence_alone_with_grouped_heads(kv_heads: int) -> None:
    torch.manual_seed(0)
    lengths, heads, size = [3, 1, 5], 4, 8
    query = torch.randn(1, heads, 9, size)
    key, value = torch.randn(2, 1, kv_heads, 9, size).unbind(0)
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads)
    packed, weights = xformers_attention(
        module,  # type: ignore[arg-type]
        query,
        key,
        value,
        None,
        scaling=0.3,
        sequence_lengths=lengths,
    )
    assert weights is None
    assert packed.shape == (1, 9, heads, size)
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        start += length
        alone = functional.scaled_dot_product_attention(
            query[:, :, here],
            key[:, :, here],
            value[:, :, here],
            is_causal=True,
            scale=0.3,
            enable_gqa=True,
        )
        torch.testing.assert_close(packed[:, here], alone.transpose(1, 2))


@pytest.mark.usefixtures("_xformers")
def test_the_model_hands_the_lengths_to_attention(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, num_key_value_heads=1)
    sequences = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15]]
    plain = Teacher.load(str(tmp_path))
    expected = plain.streams(sequences, [1, 4])
    AttentionInterface.register("adadecode_xformers", xformers_attention)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="adadecode_xformers"
    )
    found = Teacher(model, "tiny", "xformers").streams(sequences, [1, 4])
    for layer in (1, 4):
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=1e-5)
