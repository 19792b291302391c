# SPDX-License-Identifier: Apache-2.0
"""Prompts and reference texts that the engine tests share.

Starting an engine takes much longer than the tests themselves, so tests share engines
and change the policy of a running one. All run in float32, where greedy texts must be
identical (I6).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import demo_corpus, generate, make_memory_heads, start_engine


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """16 prompts of mixed lengths: problems and code, whole and cut short."""
    corpus = demo_corpus()
    problems = corpus.heldout_problems(10)
    code = corpus.heldout_code_prompts(6)
    return [
        text[: 12 * (i + 2)] if i % 3 == 0 else text
        for i, text in enumerate(
            [text for pair in zip(problems, code, strict=False) for text in pair]
            + problems[6:]
        )
    ]


@pytest.fixture(scope="session")
def reference(prompts: list[str]) -> dict[str, list[list[int]]]:
    """Plain vLLM's greedy texts.

    `texts`: of one batch with all prompts. `full`: the same prompts, generating until
    `max_model_len` whatever is sampled.
    """
    with start_engine() as llm:
        return {
            "texts": generate(llm, prompts),
            "full": generate(llm, prompts[:4], max_tokens=None, ignore_eos=True),
        }


@pytest.fixture(scope="session")
def memory_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`make_memory_heads`."""
    return make_memory_heads(tmp_path_factory.mktemp("memory") / "heads")
