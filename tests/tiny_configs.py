# SPDX-License-Identifier: Apache-2.0
"""Configurations, without weights, of architectures that are refused in some way."""

import json
from pathlib import Path
from typing import Any

_TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "MambaForCausalLM": {
        **_TEXT,
        "model_type": "mamba",
        "state_size": 4,
        "conv_kernel": 4,
    },
    "FalconH1ForCausalLM": {
        **_TEXT,
        "model_type": "falcon_h1",
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
    "WhisperForConditionalGeneration": {
        "model_type": "whisper",
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "vocab_size": 96,
    },
    "Qwen2AudioForConditionalGeneration": {
        "model_type": "qwen2_audio",
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "audio_config": {"model_type": "qwen2_audio_encoder", "d_model": 16},
    },
    "GPT2LMHeadModel": {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 4,
        "n_head": 2,
        "vocab_size": 96,
    },
    # Its layers carry one tensor; the residual stream is inside of it.
    "GraniteForCausalLM": {**_TEXT, "model_type": "granite"},
    # Served by vLLM through Transformers' own implementation.
    "Olmo2ForCausalLM": {**_TEXT, "model_type": "olmo2"},
    "MixtralForCausalLM": {
        **_TEXT,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def save_config(directory: Path, architecture: str) -> None:
    """Write the `config.json` of a tiny model.

    Args:
        directory: Where to save; created.
        architecture: A key of :data:`CONFIGS`.
    """
    directory.mkdir(parents=True)
    config = {"architectures": [architecture], **CONFIGS[architecture]}
    (directory / "config.json").write_text(json.dumps(config))
