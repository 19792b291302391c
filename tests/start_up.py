# SPDX-License-Identifier: Apache-2.0
"""Engine configurations through vLLM's own arguments, accepted or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from adadecode_vllm import engine_args
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
