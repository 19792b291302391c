# SPDX-License-Identifier: Apache-2.0
"""Requests whose prompt goes on after an answer, as vLLM's streaming input does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import adadecode_options, start_engine, stats

TURN_TOKENS = 16
MOST_STEPS = 100


def add_turn(
    llm: Any, name: str, prompt: list[int], params: Any, *, last: bool = False
) -> None:
    """Begin a request, or go on with one whose turn has ended."""
    request = llm.llm_engine.input_processor.process_inputs(
        request_id=name,
        prompt={"prompt_token_ids": [*prompt]},  # vLLM appends to it
        params=params,
        supported_tasks=("generate",),
        resumable=not last,
    )
    llm.llm_engine.engine_core.add_request(request)


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
        add_turn(llm, name, prompt, params)
        text: list[int] = []
        ended = False
        for _ in range(MOST_STEPS):
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


def steps_of_turns(llm: Any, turns: list[list[int]], tokens: int) -> list[int]:
    """Steps until each turn's first token, while another request goes on and on."""
    from vllm import SamplingParams

    core = llm.llm_engine.engine_core
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    endless = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    add_turn(llm, "endless", turns[0], endless, last=True)
    found = []
    for turn in turns:
        for _ in range(4):  # the endless one has got its drafts
            core.get_output()
        add_turn(llm, "session", turn, params)
        first, text = 0, 0
        for step in range(1, MOST_STEPS):
            for output in core.get_output().outputs:
                if output.request_id == "session":
                    first, text = first or step, text + len(output.new_token_ids)
            if text == tokens:
                break
        found.append(first)
    scheduler = core.engine_core.scheduler
    assert [own.request_id for own in scheduler.running] == ["endless"]
    core.abort_requests(["session", "endless"])
    return found


def test_a_turn_begins_beside_drafts_that_fill_the_budget() -> None:
    """A session between its turns does not wait where new requests do."""
    turns = [list(range(start, start + 20)) for start in (300, 330)]
    options = {"max_model_len": 512, "max_num_batched_tokens": 17, "max_num_seqs": 8}
    with start_engine(**options) as llm:
        expected = steps_of_turns(llm, turns, 2)
    drafting = adadecode_options(threshold=0.0, max_early_predictions=16)
    with start_engine(**drafting, **options) as llm:
        found = steps_of_turns(llm, turns, 2)
        assert sum(stats(llm)["early_predictions"]) > 0
    for plain, drafted in zip(expected, found, strict=True):
        assert 0 < drafted <= plain + 2
