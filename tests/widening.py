# SPDX-License-Identifier: Apache-2.0
"""Models to widen with their heads, and models as they are read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from adadecode_vllm.heads import ExitHeadsConfig, read_lm_head, save_heads
from adadecode_vllm.heads.config import ExitCalibration
from tests.tiny import save_tiny_llama

DRAFT_TOKENS = [7, 95, 3]


def save_source(directory: Path, **config: Any) -> Path:
    """A random Llama whose weights are large enough to make a difference."""
    save_tiny_llama(directory, **{"initializer_range": 0.4} | config)
    return directory


def load(directory: Path) -> LlamaForCausalLM:
    model, info = LlamaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def save_source_heads(directory: Path, model: Path) -> ExitHeadsConfig:
    """Calibrated heads at 1 (T = I) and 3, with memory and a draft vocabulary."""
    lm_head = read_lm_head(model)
    assert lm_head is not None
    size = lm_head.hidden_size
    config = ExitHeadsConfig(
        exit_layers=[1, 3],
        hidden_size=size,
        vocab_size=lm_head.vocab_size,
        num_hidden_layers=4,
        base_model=str(model),
        lm_head_fingerprint=lm_head.fingerprint,
        calibration={
            str(layer): ExitCalibration(slope=0.5, intercept=float(layer), tokens=9)
            for layer in (1, 3)
        },
    )
    torch.manual_seed(1)
    weights = {1: torch.eye(size), 3: torch.randn(size, size)}
    memory = {layer: torch.randn(size, size) / 8 for layer in (1, 3)}
    save_heads(directory, weights, config, torch.tensor(DRAFT_TOKENS), memory)
    return config
