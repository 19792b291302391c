# SPDX-License-Identifier: Apache-2.0
"""The heads of a running engine, read once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size

from adadecode_vllm.config import AdaDecodeConfig
from adadecode_vllm.engine.heads_fit import fingerprint_mismatch
from adadecode_vllm.engine.segments import Decoder
from adadecode_vllm.heads import (
    ExitHeads,
    ExitHeadsConfig,
    check_fingerprint,
    load_draft_token_ids,
    load_exit_memory,
    load_exit_weights,
    load_heads_config,
    resolve_heads,
)


@dataclass(frozen=True)
class ServedHeads:
    """All that an engine needs of its heads; nothing reads their directory again.

    Attributes:
        config: Their description.
        exits: The used exits' transformations, on the model's device.
        draft_token_ids: (m,) int64 tokens that the gates look at; None for all.
    """

    config: ExitHeadsConfig
    exits: ExitHeads
    draft_token_ids: torch.Tensor | None


def load_served_heads(
    config: AdaDecodeConfig, decoder: Decoder, model: str
) -> ServedHeads:
    """Load an engine's heads.

    Args:
        config: Resolved options: ``exit_layers`` is set.
        decoder: The loaded model's parts.
        model: The model's name, for messages.

    Returns:
        The heads.

    Raises:
        AdaDecodeError: If the heads cannot be read or are another model's.
    """
    assert config.exit_layers is not None, "resolved at start-up"
    # On several machines each has a cache of its own for what comes from the Hub.
    directory = resolve_heads(config.heads)
    heads = load_heads_config(directory)
    if not _lm_head_fits(decoder, heads):
        raise fingerprint_mismatch(config.heads, model, heads.base_model)
    weights = load_exit_weights(directory, heads)
    memory = load_exit_memory(directory, heads)
    used = config.exit_layers
    return ServedHeads(
        heads,
        ExitHeads(
            {layer: weights[layer] for layer in used},
            decoder.dtype,
            decoder.device,
            memory and {layer: memory[layer] for layer in used},
        ),
        _draft_token_ids(directory, heads, config.draft_vocabulary_size),
    )


def _draft_token_ids(
    directory: Path, heads: ExitHeadsConfig, size: int | None
) -> torch.Tensor | None:
    if not size:
        return None
    token_ids = load_draft_token_ids(directory, heads)
    assert token_ids is not None, "refused at start-up"
    return token_ids[:size]


def _lm_head_fits(decoder: Decoder, heads: ExitHeadsConfig) -> bool:
    """Compare the loaded LM head's rows with the heads' fingerprint.

    Start-up compares local checkpoints without loading them; this covers the others.
    A quantized LM head has no rows to compare, nor has one whose weight vLLM moved into
    a packed format of its own.
    """
    head: Any = decoder.lm_head
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point() or not weight.numel():
        return True
    first_row, rows = 0, heads.vocab_size
    if get_tensor_model_parallel_world_size() > 1:
        shard = head.shard_indices
        first_row = shard.org_vocab_start_index
        rows = shard.org_vocab_end_index - first_row
    return check_fingerprint(
        heads.lm_head_fingerprint, weight[:rows], first_row, heads.vocab_size
    )
