# SPDX-License-Identifier: Apache-2.0
"""Greedy texts equal plain vLLM's, whatever is predicted early (I6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.backend_vllm import stream
from tests.harness import (
    MAX_MODEL_LEN,
    OUTPUT_TOKENS,
    Reference,
    adadecode_options,
    demo_corpus,
    generate,
    metric,
    set_policy,
    start_engine,
    stats,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def adaptive(reference: Reference) -> Iterator[Any]:
    """AdaDecode with all exits and the largest cap that the tests use.

    Asks for the reference first: its engine must be gone before this one starts.
    """
    options = adadecode_options(policy="threshold", max_early_predictions=8)
    with start_engine(**options) as llm:
        yield llm


def test_steps_tell_what_each_exit_predicted(
    adaptive: Any, prompts: list[str], reference: Reference
) -> None:
    """What the demo shows: every token's exit, and drafts that were not confirmed."""
    set_policy(adaptive, 0.3, 5)
    tokenizer = adaptive.get_tokenizer()
    steps = []
    for number, prompt in enumerate(prompts[:3]):
        token_ids = tokenizer(prompt)["input_ids"]
        told = list(stream(adaptive, f"s{number}", token_ids, OUTPUT_TOKENS, True))
        text = [token for step in told for token, _ in step["tokens"]]
        assert text == reference["texts"][number]
        steps += told
    counted = stats(adaptive)
    accepted = [layer for step in steps for _, layer in step["tokens"] if layer]
    for layer, count in zip(counted["exit_layers"], counted["accepted"], strict=True):
        assert accepted.count(layer) == count
    rejected = [step["rejected"] for step in steps if step["rejected"]]
    assert len(rejected) == sum(counted["rejected"]) > 0
    assert len(steps) == counted["request_steps"]


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
        # Everything is predicted at the first exit, so no later one ever scores.
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


@pytest.mark.feature("prefix caching", "supported")
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


def test_the_demo_reaches_its_target(adaptive: Any) -> None:
    """On held-out problems most tokens are predicted early and nearly all rightly."""
    set_policy(adaptive, 0.75, 5)
    generate(adaptive, demo_corpus().heldout_problems(40, seed=7), max_tokens=80)
    counted = stats(adaptive)
    accepted, rejected = sum(counted["accepted"]), sum(counted["rejected"])
    predicted = sum(counted["early_predictions"])
    assert accepted / counted["generated_tokens"] >= 0.4
    assert accepted / predicted >= 0.85
    assert rejected > 0


def test_a_length_for_which_the_kv_cache_has_room(prompts: list[str]) -> None:
    """Up to its end, also where vLLM cannot verify the request's drafts.

    Comes before the last: its engines take the place of the one that tests share.
    """
    room = {"max_model_len": -1, "kv_cache_memory_bytes": 3 << 19}
    kinds: list[dict[str, Any]] = [{}, {"logit_bias": {5: 100.0}}]

    def texts(llm: Any) -> list[list[int]]:
        return [
            generate(llm, prompts[:1], None, ignore_eos=True, **kind)[0]
            for kind in kinds
        ]

    with start_engine(**room) as llm:
        expected = texts(llm)
        length = llm.llm_engine.model_config.max_model_len
        assert 64 < length < MAX_MODEL_LEN
    with start_engine(**adadecode_options(threshold=0.3), **room) as llm:
        assert texts(llm) == expected
        assert llm.llm_engine.model_config.max_model_len == length
        assert sum(stats(llm)["accepted"]) > 0


def test_defaults(prompts: list[str], reference: Reference) -> None:
    """Without any option: drafts by costs, n-gram lookup first.

    Comes last: its engine takes the place of the one that the other tests share.
    """
    with start_engine(**adadecode_options()) as llm:
        for _ in range(2):
            assert generate(llm, prompts) == reference["texts"]
            counted = stats(llm)
            assert sum(counted["accepted"]) > 0
            assert counted["ngram_accepted"] > 0
