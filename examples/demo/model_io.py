# SPDX-License-Identifier: Apache-2.0
"""The demo model seen from outside: loading it, its residual streams, greedy text."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load(directory: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Loads the model, frozen and in float32, with its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.requires_grad_(False)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def residual_streams(
    model: LlamaForCausalLM, ids: torch.Tensor, layers: Collection[int]
) -> dict[int, torch.Tensor]:
    """Runs the decoder and keeps the residual stream after some layer counts.

    Args:
        model: A Llama model.
        ids: Token ids of shape (batch, tokens). Padding may only stand on the right:
            attention is causal and has no other mask.
        layers: Layer counts to keep, each in [1, L].

    Returns:
        Layer count -> residual stream (batch, tokens, hidden_size), before any norm.
    """
    decoder = model.model
    hidden = decoder.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = decoder.rotary_emb(hidden, positions)
    kept = {}
    for count, layer in enumerate(decoder.layers, start=1):
        # Without a mask the attention falls back to plain causal attention.
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        if count in layers:
            kept[count] = hidden
    return kept


@torch.inference_mode()
def greedy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 128,
) -> list[tuple[list[int], list[int]]]:
    """Continues prompts greedily, in batches.

    Returns:
        For every prompt its token ids and those of the continuation, which ends with
        EOS unless it was cut at ``max_new_tokens``.
    """
    tokenizer.padding_side = "left"
    eos_id = tokenizer.eos_token_id
    results = []
    for first in range(0, len(prompts), batch_size):
        encoded = tokenizer(
            list(prompts[first : first + batch_size]),
            return_tensors="pt",
            padding=True,
            return_token_type_ids=False,
        )
        width = encoded["input_ids"].shape[1]
        # Typed for a class of its own that no model is derived from.
        output = model.generate(  # type: ignore[misc]
            **encoded, max_new_tokens=max_new_tokens, do_sample=False
        )
        for row, mask in zip(output, encoded["attention_mask"], strict=True):
            prompt = row[:width][mask.bool()].tolist()
            text = row[width:].tolist()
            if eos_id in text:
                text = text[: text.index(eos_id) + 1]
            results.append((prompt, text))
        logger.info("generated %d of %d", len(results), len(prompts))
    return results
