# SPDX-License-Identifier: Apache-2.0
"""Every architecture that is accepted gives plain vLLM's texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adadecode_vllm.engine.families import SUPPORTED_ARCHITECTURES
from tests.interpreted.process import start_engine as start_v2
from tests.tiny_families import (
    BETWEEN,
    ENGINE,
    EXITS,
    FAMILIES,
    PROMPTS,
    REQUEST,
    check_texts,
    run_baseline,
    save_family,
    started,
)

pytestmark = pytest.mark.engine

TIED = "tied embeddings"
WINDOW = "sliding-window attention"


def _family(name: str, *features: str) -> Any:
    marks = [pytest.mark.feature(feature, "supported") for feature in features]
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize(
    "family",
    [
        _family("Cohere", "Cohere", TIED),
        _family("Cohere2", "Cohere 2", TIED, WINDOW),
        _family("Gemma", "Gemma", TIED),
        _family("Gemma2", "Gemma 2", TIED, WINDOW),
        _family("Gemma3", "Gemma 3", TIED, WINDOW),
        _family("Glm4", "GLM-4"),
        _family("Llama", "Llama", TIED),
        _family("Mistral", "Mistral"),
        _family("Mixtral", "Mixtral (mixture of experts)"),
        _family("Nemotron", "Nemotron"),
        _family("Olmoe", "OLMoE (mixture of experts)"),
        _family("Phi3", "Phi-3"),
        _family("Qwen2", "Qwen2", TIED),
        _family("Qwen2Moe", "Qwen2-MoE (mixture of experts)"),
        _family("Qwen3", "Qwen3"),
        _family("Qwen3Moe", "Qwen3-MoE (mixture of experts)"),
    ],
)
def test_family(family: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_family(model, family)
    expected = run_baseline(model)
    with started(model, tmp_path / "heads") as llm:
        check_texts(llm, expected)


def test_every_accepted_family_is_tested() -> None:
    assert {f"{family}ForCausalLM" for family in FAMILIES} == SUPPORTED_ARCHITECTURES


@pytest.mark.slow
@pytest.mark.feature("Qwen2-MoE (mixture of experts)", "supported")
def test_compiled_segments_find_their_own_experts(tmp_path: Path) -> None:
    """vLLM's operation for experts looks its layer up while the graph runs."""
    model = tmp_path / "model"
    save_family(model, "Qwen2Moe")
    expected = run_baseline(model)
    with started(model, tmp_path / "heads", enforce_eager=False) as llm:
        check_texts(llm, expected)


@pytest.mark.parametrize(
    "family", ["Mixtral", pytest.param("Gemma2", marks=pytest.mark.slow)]
)
def test_family_on_model_runner_v2(family: str, tmp_path: Path) -> None:
    """Experts and two KV cache groups, in what CUDA graphs hold as well."""
    from adadecode_vllm.heads import init_heads
    from tests.harness import adadecode_options

    model = tmp_path / "model"
    save_family(model, family)
    # The interpreter is slow; prompt and text together still leave the window.
    request = {**REQUEST, "max_tokens": 24}
    expected = [text[:24] for text in run_baseline(model).texts]
    init_heads(str(model), tmp_path / "heads", EXITS, "float32")
    options = adadecode_options(str(tmp_path / "heads"), threshold=0.0)
    with start_v2(model=str(model), **options, **ENGINE) as llm:
        assert llm.facts()["v2"]
        assert llm.generate(PROMPTS, **request) == expected
        counted = llm.stats()
        assert sum(counted["accepted"]) > 0
        assert sum(counted["rejected"]) > 0
        llm.use_whole_steps(True)
        llm.configure(threshold=BETWEEN, max_early_predictions=3)
        assert llm.generate(PROMPTS, **request) == expected
        assert sum(llm.stats()["accepted"]) > 0
        assert llm.whole_steps()["resumed"] > 0
