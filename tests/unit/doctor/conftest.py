# SPDX-License-Identifier: Apache-2.0
"""A tiny model and heads for it, of which one exit is the identity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adadecode_vllm.heads import init_heads, save_heads
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory)
    return directory


@pytest.fixture
def heads(model: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "heads"
    config = init_heads(str(model), directory, [1, 3])
    weights = {layer: torch.eye(config.hidden_size) for layer in (1, 3)}
    weights[3] = torch.flip(weights[3], [0])
    save_heads(directory, weights, config)
    return directory
