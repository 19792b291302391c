# SPDX-License-Identifier: Apache-2.0
"""Greedy texts equal ordinary vLLM's, whatever is predicted early (I6)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import (
    HEADS,
    MAX_MODEL_LEN,
    adadecode_options,
    generate,
    metric,
    set_policy,
    start_engine,
    stats,
)

pytestmark = pytest.mark.engine

Reference = dict[str, list[list[int]]]


@pytest.mark.parametrize("cap", [1, 3, 5, 8])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.75, 1.0])
def test_thresholds_and_caps(
    adaptive: Any,
    prompts: list[str],
    reference: Reference,
    threshold: float,
    cap: int,
) -> None:
    set_policy(adaptive, threshold, cap)
    assert generate(adaptive, prompts) == reference["texts"]
    counted = stats(adaptive)
    predicted = sum(counted["early_predictions"])
    if threshold == 1.0:
        assert predicted == 0
        assert counted["resumed_tokens"] == 0
        return
    assert sum(counted["accepted"]) > 0
    assert counted["resumed_tokens"] > 0
    assert counted["generated_tokens"] > counted["request_steps"]
    if threshold == 0.0:
        assert sum(counted["rejected"]) > 20
        # Everything is predicted at the first exit, so no later one is ever asked.
        assert counted["early_predictions"][1:] == [0, 0]
    else:
        assert all(count > 0 for count in counted["gates"])


@pytest.mark.parametrize("threshold", [0.0, 0.75])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_batch_sizes(
    adaptive: Any,
    prompts: list[str],
    reference: Reference,
    size: int,
    threshold: float,
) -> None:
    set_policy(adaptive, threshold, 5)
    texts = [
        text
        for first in range(0, len(prompts), size)
        for text in generate(adaptive, prompts[first : first + size])
    ]
    assert texts == reference["texts"]
    assert sum(stats(adaptive)["accepted"]) > 0


def test_prefix_cache_hits(
    adaptive: Any, prompts: list[str], reference: Reference
) -> None:
    """Blocks with once pending tokens are reused by later requests."""
    set_policy(adaptive, 0.5, 5)
    assert generate(adaptive, prompts) == reference["texts"]
    before = metric(adaptive, "vllm:prefix_cache_hits")
    assert generate(adaptive, prompts) == reference["texts"]
    assert metric(adaptive, "vllm:prefix_cache_hits") > before
    # Continue generated texts, so that cached blocks hold tokens that were drafted.
    tokenizer = adaptive.get_tokenizer()
    continued = [
        {"prompt_token_ids": tokenizer(prompt)["input_ids"] + text[:24]}
        for prompt, text in zip(prompts, reference["texts"], strict=True)
        if len(text) >= 25
    ]
    expected = [text[24:] for text in reference["texts"] if len(text) >= 25]
    assert len(continued) > 4
    texts = generate(adaptive, continued, max_tokens=16)
    assert texts == expected


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_requests_that_end_at_max_model_len(
    adaptive: Any, prompts: list[str], reference: Reference, threshold: float
) -> None:
    set_policy(adaptive, threshold, 8)
    texts = generate(adaptive, prompts[:4], max_tokens=None, ignore_eos=True)
    assert texts == reference["full"]
    tokenizer = adaptive.get_tokenizer()
    lengths = [
        len(tokenizer(prompt)["input_ids"]) + len(text)
        for prompt, text in zip(prompts[:4], texts, strict=True)
    ]
    assert lengths == [MAX_MODEL_LEN] * 4
    assert sum(stats(adaptive)["accepted"]) > 0


@pytest.mark.parametrize("exit_index", [0, 1, 2])
def test_single_exits(
    prompts: list[str], reference: Reference, exit_index: int
) -> None:
    from adadecode_vllm.heads import load_heads_config

    layer = load_heads_config(HEADS).exit_layers[exit_index]
    options = adadecode_options(exit_layers=[layer], threshold=0.5)
    with start_engine(**options) as llm:
        assert generate(llm, prompts) == reference["texts"]
        counted = stats(llm)
        assert counted["exit_layers"] == (layer,)
        assert counted["accepted"][0] > 0
        set_policy(llm, 0.0, 5)
        assert generate(llm, prompts) == reference["texts"]
        assert stats(llm)["rejected"][0] > 0


def test_chunked_prefill_and_preemption(
    prompts: list[str], reference: Reference
) -> None:
    """A token budget below the prompts' lengths and a KV cache that is too small."""
    with start_engine(
        **adadecode_options(threshold=0.5),
        enable_prefix_caching=False,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=20,
        max_num_seqs=12,
    ) as llm:
        tokenizer = llm.get_tokenizer()
        assert max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts) > 48
        assert generate(llm, prompts) == reference["texts"]
        assert metric(llm, "vllm:num_preemptions") > 0
        counted = stats(llm)
        assert sum(counted["accepted"]) > 0
        # What was pending when a request was preempted did not survive it.
        assert counted["dropped"]["not_scheduled"] > 0
        assert metric(llm, "vllm:prefix_cache_hits") == 0
        set_policy(llm, 0.0, 5)
        assert generate(llm, prompts) == reference["texts"]
        assert sum(stats(llm)["rejected"]) > 0


def test_compiled_as_vllm_does_by_default(
    prompts: list[str], reference: Reference
) -> None:
    options = adadecode_options(threshold=0.5)
    with start_engine(**options, enforce_eager=False) as llm:
        assert generate(llm, prompts) == reference["texts"]
        assert sum(stats(llm)["accepted"]) > 0
        set_policy(llm, 0.0, 5)
        assert generate(llm, prompts) == reference["texts"]
        assert sum(stats(llm)["rejected"]) > 0


def test_tensor_parallel_2(
    prompts: list[str], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank takes the same decisions (I7), with a vocab-parallel LM head."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = adadecode_options(threshold=0.0)
    with start_engine(**options, tensor_parallel_size=2) as llm:
        assert generate(llm, prompts) == reference["texts"]
        ranks = llm.collective_rpc("adadecode_stats")
    assert len(ranks) == 2
    for counter in ("early_predictions", "accepted", "rejected", "resumed_tokens"):
        assert ranks[0][counter] == ranks[1][counter]
    assert sum(ranks[0]["accepted"]) > 0
    assert sum(ranks[0]["rejected"]) > 0
