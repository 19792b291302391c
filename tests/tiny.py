# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints and heads for tests; the weights are random."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN_SIZE = 16
VOCAB_SIZE = 96
NUM_LAYERS = 4
FINGERPRINT = "sim64x16:" + "-".join(["0123456789abcdef"] * 16)


def save_tiny_llama(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
    **config: Any,
) -> torch.Tensor:
    """Save a random Llama checkpoint.

    Args:
        directory: Where to save.
        dtype: Dtype of the checkpoint.
        max_shard_size: Small values give a sharded checkpoint with an index.
        seed: Seed of the weights.
        **config: Overrides for `LlamaConfig`.

    Returns:
        The LM head, shape (V, d), as saved.
    """
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**values | config)).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model.lm_head.weight.detach()
