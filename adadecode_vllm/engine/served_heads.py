# SPDX-License-Identifier: Apache-2.0
"""The heads of a running engine, as its exits use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger

from adadecode_vllm.config import AdaDecodeConfig
from adadecode_vllm.engine.exit_heads import ExitHeads
from adadecode_vllm.engine.exit_scorer import has_plain_rows
from adadecode_vllm.engine.heads_fit import (
    fingerprint_mismatch,
    resolve_draft_vocabulary,
)
from adadecode_vllm.engine.segments import Decoder
from adadecode_vllm.heads import ExitHeadsConfig, Heads, check_fingerprint

logger = init_logger("vllm.adadecode")


@dataclass(frozen=True)
class ServedHeads:
    """All that an engine needs of its heads; nothing reads their directory again.

    Attributes:
        config: Their description.
        exits: The used exits' transformations, on the model's device.
        draft_token_ids: (m,) int64 tokens that the exits look at; None for all.
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
        AdaDecodeError: If the heads cannot be read or are another model's, or rank
            fewer tokens than were asked for.
    """
    assert config.exit_layers is not None, "resolved at start-up"
    # On several machines each has a cache of its own for what comes from the Hub.
    heads = Heads.find(config.heads)
    if not _lm_head_fits(decoder, heads.config):
        raise fingerprint_mismatch(config.heads, model, heads.config.base_model)
    tensors, used = heads.tensors, config.exit_layers
    memory, token_ids = tensors.memory, tensors.draft_token_ids
    size = resolve_draft_vocabulary(config, heads.config)
    if size and config.draft_vocabulary_size is None and not has_plain_rows(decoder):
        logger.info_once(
            "adadecode: the exits look at the whole vocabulary, because the LM head is "
            "quantized and has no rows to choose from",
            scope="global",
        )
        size = 0
    return ServedHeads(
        heads.config,
        ExitHeads(
            {layer: tensors.weights[layer] for layer in used},
            decoder.dtype,
            decoder.device,
            memory and {layer: memory[layer] for layer in used},
        ),
        token_ids[:size] if token_ids is not None and size else None,
    )


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
