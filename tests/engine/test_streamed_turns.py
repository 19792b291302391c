# SPDX-License-Identifier: Apache-2.0
"""Requests whose prompt goes on after an answer, as vLLM's streaming input does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import adadecode_options, start_engine, stats

TURN_TOKENS = 16


def answers(
    llm: Any, prompts: list[list[int]], stop_token_ids: list[int]
) -> tuple[list[list[int]], list[int]]:
    """Take turns with one request.

    Args:
        llm: The engine, in this process.
        prompts: What each turn adds, token ids.
        stop_token_ids: Tokens that end a turn.

    Returns:
        The turns' answers, and all tokens that the last one was told from.
    """
    from vllm import SamplingParams

    engine, name = llm.llm_engine, f"until {stop_token_ids}"
    params = SamplingParams(
        temperature=0, max_tokens=TURN_TOKENS, stop_token_ids=stop_token_ids
    )
    scheduler = engine.engine_core.engine_core.scheduler
    texts = []
    for prompt in prompts:
        request = engine.input_processor.process_inputs(
            request_id=name,
            prompt={"prompt_token_ids": [*prompt]},  # vLLM appends to it
            params=params,
            supported_tasks=("generate",),
            resumable=True,
        )
        engine.engine_core.add_request(request)
        text: list[int] = []
        ended = False
        for _ in range(100):
            for output in engine.engine_core.get_output().outputs:
                text += output.new_token_ids
                ended |= output.finish_reason is not None
            if ended:
                break
        assert ended
        texts.append(text)
    context = list(scheduler.requests[name].all_token_ids)
    engine.engine_core.abort_requests([name])
    return texts, context


@pytest.mark.feature("streaming input", "supported")
def test_a_turn_that_a_draft_ends(prompts: list[str]) -> None:
    """What ended a turn is in no later turn's context, whether drafted or not."""
    with start_engine() as llm:
        tokenizer = llm.get_tokenizer()
        turns = [tokenizer(prompt).input_ids[:40] for prompt in prompts[:4]]
        (first, *_), _ = answers(llm, turns[:1], [])
        # One token of the first answer each, so that turns end at different ones.
        stops = [[token] for token in dict.fromkeys(first[2:12])]
        expected = [answers(llm, turns, stop) for stop in stops]
    with start_engine(**adadecode_options(threshold=0.2)) as llm:
        assert [answers(llm, turns, stop) for stop in stops] == expected
        assert sum(stats(llm)["accepted"]) > 0
