# SPDX-License-Identifier: Apache-2.0
"""Drafts take no tokens, blocks or steps from what must run; the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams

from tests.harness import (
    adadecode_options,
    drafts_of_requests,
    metric,
    start_engine,
    stats,
)

pytestmark = pytest.mark.engine

LONG = list(range(300, 333))
MOST_STEPS = 400


def run(
    llm: Any,
    *arrivals: tuple[int, list[int], dict[str, Any]],
    ended: dict[int, int] | None = None,
) -> list[list[int]]:
    """Step an engine by hand.

    Args:
        llm: The engine.
        *arrivals: For each request the step before which it arrives, its prompt and
            its parameters.
        ended: Receives the steps in which requests were finished, by number.

    Returns:
        The requests' texts; that of one which is never finished is empty.
    """
    engine, texts = llm.llm_engine, {}
    for step in range(MOST_STEPS):
        for number, (arrival, prompt, params) in enumerate(arrivals):
            if arrival == step:
                engine.add_request(
                    str(number),
                    {"prompt_token_ids": prompt},
                    SamplingParams(**params),
                )
        for output in engine.step():
            if output.finished:
                number = int(output.request_id.split("-")[0])
                texts[number] = list(output.outputs[0].token_ids)
                if ended is not None:
                    ended[number] = step
        if len(texts) == len(arrivals):
            break
    left = list(engine.output_processor.request_states)
    engine.abort_request(left)
    return [texts.get(number, []) for number in range(len(arrivals))]


@pytest.fixture(scope="module")
def baseline() -> Iterator[Any]:
    with start_engine(max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="module")
def eager() -> Iterator[Any]:
    """Every prediction is submitted."""
    with start_engine(
        **adadecode_options(threshold=0.0),
        max_model_len=512,
        per_request_spec_decode_metrics="detailed",
    ) as llm:
        yield llm


def test_a_request_with_one_token_to_compute_joins_drafts(
    baseline: Any, eager: Any
) -> None:
    """vLLM fills such a request up with drafts that nobody made."""
    sampled = {"temperature": 1, "ignore_eos": True}
    drafting = {**sampled, "allowed_token_ids": [1023], "max_tokens": 60}
    joining = {**sampled, "top_k": 1, "max_tokens": 20}
    arrivals = [(0, [338, 20, 30, 40], drafting), (3, [338], joining)]
    expected = run(baseline, *arrivals)
    assert expected[1][:5] == [28, 223, 20, 18, 652]
    assert run(eager, *arrivals) == expected


def test_nothing_is_counted_that_was_never_drafted(eager: Any) -> None:
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")

    def counted() -> list[float]:
        return [metric(eager, f"vllm:spec_decode_{name}") for name in names]

    before = counted()
    options = {"temperature": 0, "extra_args": {"adadecode_enabled": False}}
    greedy = {**options, "max_tokens": 8}
    run(eager, (0, LONG, greedy), (20, LONG, greedy), (22, [338], greedy))
    assert counted() == before
    prompts = [{"prompt_token_ids": tokens} for tokens in (LONG, LONG[:9], [338])]
    found = drafts_of_requests(eager, prompts)
    assert sum(map(sum, found)) == counted()[1] - before[1] > 0
    assert all(drafts > 0 for steps in found for drafts in steps)


@pytest.mark.parametrize("budget", [8, 17])
def test_a_token_budget_below_the_drafts(baseline: Any, budget: int) -> None:
    greedy = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    arrivals = [(0, LONG, greedy), (6, LONG, greedy), (7, LONG[:20], greedy)]
    with start_engine(
        **adadecode_options(threshold=0.0, max_early_predictions=16),
        max_model_len=512,
        max_num_batched_tokens=budget,
        max_num_seqs=8,
    ) as llm:
        assert run(llm, *arrivals) == run(baseline, *arrivals)
        counted = stats(llm)
        assert sum(counted["accepted"]) + sum(counted["rejected"]) > 0


def test_a_prompt_that_is_not_cut_gets_its_place() -> None:
    """It fits beside the running requests, but not beside all of their drafts."""
    greedy = {"temperature": 0, "max_tokens": 100, "ignore_eos": True}
    arrivals = [(0, LONG[start : start + 8], greedy) for start in range(4)]
    arrivals.append((4, (LONG * 8)[:240], {**greedy, "max_tokens": 1}))
    options = {"enable_chunked_prefill": False, "max_num_batched_tokens": 256}
    expected: dict[int, int] = {}
    with start_engine(**options) as llm:
        texts = run(llm, *arrivals, ended=expected)
    ended: dict[int, int] = {}
    with start_engine(
        **adadecode_options(threshold=0.0, max_early_predictions=8), **options
    ) as llm:
        assert run(llm, *arrivals, ended=ended) == texts
        assert sum(stats(llm)["accepted"]) > 0
    assert ended[4] == expected[4]


def test_no_request_is_preempted_for_drafts(baseline: Any) -> None:
    """Two texts of one block each, and two blocks beside vLLM's own."""
    greedy = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    arrivals = [(0, LONG[:24], greedy), (1, LONG[4:28], greedy)]
    with start_engine(
        **adadecode_options(threshold=0.0, max_early_predictions=12),
        max_model_len=64,
        num_gpu_blocks_override=3,
    ) as llm:
        assert run(llm, *arrivals) == run(baseline, *arrivals)
        assert metric(llm, "vllm:num_preemptions") == 0
