# SPDX-License-Identifier: Apache-2.0
"""The shapes and the mask that xformers is called with, on a stand-in for it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional

from adadecode_vllm.training.attention import xformers_attention
from adadecode_vllm.training.teacher import packed_arguments


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
