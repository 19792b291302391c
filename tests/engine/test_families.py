# SPDX-License-Identifier: Apache-2.0
"""Every architecture that is accepted gives ordinary vLLM's texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.harness import (
    adadecode_options,
    generate,
    set_policy,
    start_engine,
    stats,
)

pytestmark = pytest.mark.engine

_SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large enough that a tied model does more than repeat its input.
    "initializer_range": 0.15,
}


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Mistral", {"head_dim": 32, "sliding_window": None}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 32}),
        ("Phi3", {"tie_word_embeddings": False}),
    ],
)
def test_family(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    from adadecode_vllm.heads import init_heads

    config = getattr(transformers, f"{family}Config")(**{**_SHAPE, **extra})
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        # Late layers that change little: exits are right often, but not always.
        for layer in model.model.layers[2:]:
            layer.mlp.down_proj.weight.mul_(0.3)
            layer.self_attn.o_proj.weight.mul_(0.3)
    model.save_pretrained(tmp_path / "model")
    init_heads(str(tmp_path / "model"), tmp_path / "heads", [2, 4], "float32")
    prompts = [
        {"prompt_token_ids": [3 + (i * j) % 250 for j in range(5 + 7 * i)]}
        for i in range(1, 5)
    ]
    options = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 16 << 20}
    request = {"ignore_eos": True, "detokenize": False}
    with start_engine(str(tmp_path / "model"), **options) as llm:
        expected = generate(llm, prompts, **request)
    heads = adadecode_options(str(tmp_path / "heads"), threshold=0.0)
    with start_engine(str(tmp_path / "model"), **heads, **options) as llm:
        assert generate(llm, prompts, **request) == expected
        counted = stats(llm)
        assert sum(counted["accepted"]) > 0
        assert sum(counted["rejected"]) > 0
        set_policy(llm, 0.006, 3)
        assert generate(llm, prompts, **request) == expected
