# SPDX-License-Identifier: Apache-2.0
"""Engine configurations through vLLM's own arguments, accepted or refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from adadecode_vllm import engine_args
from adadecode_vllm.config import engine_config
from adadecode_vllm.engine import served_heads
from adadecode_vllm.engine.served_heads import ServedHeads, load_served_heads
from adadecode_vllm.errors import AdaDecodeError


def create(
    model: Path, heads: Path, options: dict[str, Any] | None = None, **arguments: Any
) -> VllmConfig:
    ours = engine_args(str(heads), **(options or {}))
    return EngineArgs(model=str(model), **ours, **arguments).create_engine_config()


def refusal(
    model: Path, heads: Path, options: dict[str, Any] | None = None, **arguments: Any
) -> str:
    with pytest.raises(AdaDecodeError) as caught:
        create(model, heads, options, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def load_in_worker(vllm_config: VllmConfig, model: Path) -> ServedHeads:
    """What a worker, alone on its model, makes of the configuration it was sent."""
    config = engine_config(vllm_config)
    assert config is not None
    weights = load_file(model / "model.safetensors")
    decoder: Any = SimpleNamespace(
        lm_head=SimpleNamespace(weight=weights["lm_head.weight"]),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served_heads, "get_tensor_model_parallel_world_size", lambda: 1)
        return load_served_heads(config, decoder, str(model))
