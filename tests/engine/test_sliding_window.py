# SPDX-License-Identifier: Apache-2.0
"""Texts longer than an attention window, whose early blocks are given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import configure, generate, metric, start_engine, stats
from tests.tiny_families import (
    BETWEEN,
    ENGINE,
    PROMPTS,
    REQUEST,
    inspected_here,
    save_family,
    started,
)

pytestmark = pytest.mark.engine

WINDOW = 32
LONG = {**REQUEST, "max_tokens": 5 * WINDOW}


@pytest.mark.feature("sliding-window attention", "supported")
@pytest.mark.parametrize(
    ("family", "extra", "groups", "blocks"),
    [
        # All layers in one KV cache group; whole texts would take 25 blocks.
        ("Mistral", {"sliding_window": WINDOW}, 1, 17),
        # Every other layer sees everything: two groups would take 50.
        ("Gemma2", {"sliding_window": WINDOW}, 2, 41),
    ],
)
def test_blocks_outside_the_window_are_reused(
    family: str, extra: dict[str, Any], groups: int, blocks: int, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    save_family(model, family, **extra)
    options = {**ENGINE, "enable_prefix_caching": False}
    with inspected_here():
        with start_engine(str(model), **options) as llm:
            expected = generate(llm, PROMPTS, **LONG)
        wide = {"hf_overrides": {"sliding_window": 512}}
        with start_engine(str(model), **options, **wide) as llm:
            assert generate(llm, PROMPTS, **LONG) != expected
    tight = {**options, "num_gpu_blocks_override": blocks}
    with started(model, tmp_path / "heads", **tight) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        config = worker.model_runner.kv_cache_config
        assert len(config.kv_cache_groups) == groups
        assert generate(llm, PROMPTS, **LONG) == expected
        counted = stats(llm)
        assert sum(counted["accepted"]) > 0
        assert sum(counted["rejected"]) > 0
        configure(llm, threshold=BETWEEN, max_early_predictions=3)
        assert generate(llm, PROMPTS, **LONG) == expected
        assert metric(llm, "vllm:num_preemptions") == 0
