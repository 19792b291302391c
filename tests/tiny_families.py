# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint of every family, and the two engines that are compared on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from adadecode_vllm.heads import init_heads
from benchmarks.parity import NUM_TOP_LOGITS, TopLogits, compare, top_logits
from tests.harness import (
    adadecode_options,
    configure,
    generate,
    start_engine,
    stats,
)

EXITS = [2, 4]
# A threshold that exits reach for some tokens.
BETWEEN = 0.1
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
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_GEMMA = {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32}
# By the name of its classes in Transformers.
FAMILIES: dict[str, dict[str, Any]] = {
    "Cohere": {"logit_scale": 2.0},
    "Cohere2": {"head_dim": 32, "logit_scale": 2.0, "sliding_window": 32},
    "Gemma": {"head_dim": 32},
    "Gemma2": _GEMMA,
    "Gemma3": _GEMMA,
    "Glm4": {"head_dim": 32},
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {"head_dim": 32, "sliding_window": None},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Nemotron": {},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Phi3": {"tie_word_embeddings": False},
    "Qwen2": {"tie_word_embeddings": True},
    # Ordinary and sparse layers take turns.
    "Qwen2Moe": {
        **_EXPERTS,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 2,
    },
    "Qwen3": {"head_dim": 32},
    "Qwen3Moe": {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True},
}
# What a layer adds to the residual stream passes one of these last.
_BRANCH_ENDS = ("o_proj.weight", "down_proj.weight", "down_proj")
_BRANCH_NORMS = (
    "post_feedforward_layernorm.weight",
    "post_mlp_layernorm.weight",
    "post_self_attn_layernorm.weight",
)
# Embeddings that are multiplied by the root of d would drown the layers; smaller ones
# make smaller logits where they are the LM head as well.
_EMBEDDING_SCALE = 0.2
# Enough for texts beyond any window here.
MAX_TOKENS = 60
PROMPTS = [
    {"prompt_token_ids": [3 + (i * j) % 250 for j in range(5 + 7 * i)]}
    for i in range(1, 5)
]
ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 16 << 20,
}
REQUEST: dict[str, Any] = {
    "ignore_eos": True,
    "detokenize": False,
    "max_tokens": MAX_TOKENS,
}


def config_class(family: str) -> Any:
    """The class of a family's configuration in Transformers."""
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    return getattr(transformers, name)


def save_family(directory: Path, family: str, **extra: Any) -> None:
    """Save a random checkpoint whose exits are right often, but not always.

    Args:
        directory: Where to save.
        family: A key of :data:`FAMILIES`.
        **extra: More of its configuration.
    """
    config = config_class(family)(**{**_SHAPE, **FAMILIES[family], **extra})
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    # Gemma's norms multiply by 1 + weight.
    offset = 1.0 if family.startswith("Gemma") else 0.0
    with torch.no_grad():
        if family.startswith("Gemma"):
            model.model.embed_tokens.weight.mul_(_EMBEDDING_SCALE)
            _scale(model.model.norm.weight, 1 / _EMBEDDING_SCALE, offset)
        for layer in model.model.layers[EXITS[0] :]:
            _weaken(layer, offset)
    model.save_pretrained(directory)


def _weaken(layer: nn.Module, offset: float) -> None:
    """Let a late layer change little."""
    for name, weight in layer.named_parameters():
        if name.endswith(_BRANCH_NORMS):
            _scale(weight, 0.3, offset)
        elif name.endswith(_BRANCH_ENDS):
            weight.mul_(0.3)


def _scale(weight: torch.Tensor, factor: float, offset: float) -> None:
    """Let a norm that multiplies by weight + offset multiply by so much more."""
    weight.copy_((weight + offset) * factor - offset)


@dataclass(frozen=True)
class Baseline:
    """What plain vLLM says to :data:`PROMPTS`.

    Attributes:
        texts: Greedy token ids.
        logits: The best at each token where a tie would be one (I6), else None.
    """

    texts: list[list[int]]
    logits: list[TopLogits] | None

    def check(self, texts: list[list[int]]) -> None:
        """Fail unless other texts are the same."""
        if self.logits is None:
            assert texts == self.texts
        else:
            assert compare(self.texts, texts, self.logits).different == 0


def run_baseline(model: Path, dtype: str = "float32", **options: Any) -> Baseline:
    """Start plain vLLM and let it generate.

    Args:
        model: The checkpoint.
        dtype: In float32 there are no ties.
        **options: Of the engine.
    """
    from vllm import SamplingParams

    options = {**ENGINE, "dtype": dtype, "logprobs_mode": "raw_logits", **options}
    with inspected_here(), start_engine(str(model), **options) as llm:
        if dtype == "float32":
            return Baseline(generate(llm, PROMPTS, **REQUEST), None)
        params = SamplingParams(temperature=0, logprobs=NUM_TOP_LOGITS, **REQUEST)
        found = [
            output.outputs[0]
            for output in llm.generate(PROMPTS, params, use_tqdm=False)
        ]
    return Baseline(
        [list(completion.token_ids) for completion in found],
        [top_logits(completion.logprobs or ()) for completion in found],
    )


@contextmanager
def started(model: Path, heads: Path, **options: Any) -> Iterator[Any]:
    """An engine with AdaDecode and untrained heads, which drafts wherever it may.

    Args:
        model: The checkpoint.
        heads: Where to write the heads.
        **options: Of the engine.
    """
    init_heads(str(model), heads, EXITS, "float32")
    ours = adadecode_options(str(heads), threshold=0.0)
    with (
        inspected_here(),
        start_engine(str(model), **{**ENGINE, **ours, **options}) as llm,
    ):
        yield llm


def check_texts(llm: Any, expected: Baseline) -> None:
    """Compare a started engine's texts with plain vLLM's.

    Args:
        llm: The engine.
        expected: What plain vLLM said.
    """
    expected.check(generate(llm, PROMPTS, **REQUEST))
    counted = stats(llm)
    assert sum(counted["accepted"]) > 0
    assert sum(counted["rejected"]) > 0
    configure(llm, threshold=BETWEEN, max_early_predictions=3)
    expected.check(generate(llm, PROMPTS, **REQUEST))
    # Some tokens ran the first segment alone and some the second as well.
    assert min(stats(llm)["early_predictions"]) > 0


@contextmanager
def inspected_here() -> Iterator[None]:
    """Spare a process per architecture, which would import vLLM anew each time."""
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda function: function())
        yield
