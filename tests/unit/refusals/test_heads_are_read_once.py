# SPDX-License-Identifier: Apache-2.0
"""A start opens each file of the heads once in every process."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from adadecode_vllm.heads import files, load_heads_config, save_heads
from tests.start_up import create, load_in_worker

ONCE = {"config.json": 1, "model.safetensors": 1}
_watched: list[Callable[[str], None]] = []


@contextmanager
def opened_files(directory: Path) -> Iterator[Counter[str]]:
    """Count how often each file of a directory is opened."""
    found: Counter[str] = Counter()

    def count(path: str) -> None:
        if Path(path).parent == directory:
            found[Path(path).name] += 1

    def open_and_count(path: Any, *arguments: Any, **options: Any) -> Any:
        count(str(path))  # Rust opens it, which Python does not audit
        return safe_open(path, *arguments, **options)

    safe_open = files.safe_open
    _watched.append(count)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "safe_open", open_and_count)
            yield found
    finally:
        _watched.remove(count)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str):
        for count in _watched:
            count(arguments[0])


sys.addaudithook(_audit)  # for good: there is no way to take one away


@pytest.fixture
def whole_heads(heads: Path, tmp_path: Path) -> Path:
    """Heads with all that heads can have."""
    config = load_heads_config(heads)
    matrices = {layer: torch.eye(config.hidden_size) for layer in config.exit_layers}
    save_heads(tmp_path, matrices, config, torch.arange(8), matrices)
    return tmp_path


def test_heads_by_their_option(model: Path, whole_heads: Path) -> None:
    with opened_files(whole_heads) as found:
        config = create(model, whole_heads)
    assert found == ONCE
    with opened_files(whole_heads) as found:
        served = load_in_worker(config, model)
    assert found == ONCE
    assert served.exits.has_memory
    assert served.draft_token_ids is not None


def test_heads_in_the_models_place(whole_heads: Path) -> None:
    args = EngineArgs(model=str(whole_heads), additional_config={"adadecode": {}})
    with opened_files(whole_heads) as found:
        args.create_engine_config()
    assert found == ONCE
