# SPDX-License-Identifier: Apache-2.0
"""A tiny model and heads for it; the plugin is installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.models import registry

from adadecode_vllm import plugin
from adadecode_vllm.heads import init_heads
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """What vLLM does in every process."""
    plugin.register()


@pytest.fixture(autouse=True)
def inspect_models_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a process per architecture, which would import vLLM anew each time."""
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory)
    return directory


@pytest.fixture(scope="module")
def heads(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("heads")
    init_heads(str(model), directory, [1, 3])
    return directory


@pytest.fixture
def edited_heads(heads: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the heads with another configuration."""

    def edit(**values: Any) -> Path:
        directory = tmp_path / "edited"
        shutil.copytree(heads, directory)
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return directory

    return edit
