# SPDX-License-Identifier: Apache-2.0
"""What vLLM compiled for one start serves the next, also with other options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import adadecode_options, generate, start_engine, stats
from tests.short_model import save_short_model

pytestmark = pytest.mark.slow


def compiled(cache: Path) -> dict[Path, int]:
    """The files of compiled code in vLLM's cache, by name, and when they were made."""
    files = (cache / "torch_compile_cache").rglob("rank_0_0/model")
    return {file: file.stat().st_mtime_ns for file in files}


def test_another_start_with_other_options(
    tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, heads = save_short_model(tmp_path, layers=6, exits=[2, 4])
    with start_engine(model) as llm:
        texts = generate(llm, prompts)
    cache = tmp_path / "cache"
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(cache))

    def start(**options: Any) -> dict[Path, int]:
        """Start, compare texts, and say what is compiled afterwards."""
        arguments = adadecode_options(heads, **options)
        with start_engine(
            model, **arguments, enforce_eager=False, multiprocessing=True
        ) as llm:
            assert generate(llm, prompts) == texts
            assert sum(stats(llm)["early_predictions"]) > 0
        return compiled(cache)

    first = start(threshold=0.5)
    assert len(first) == 3  # the segments, which are the model
    assert start(threshold=0.2, max_early_predictions=3, ngram="tail") == first
    fewer = start(threshold=0.5, exit_layers=[4])
    assert len(fewer) == 3 + 2
    assert fewer.items() > first.items()
