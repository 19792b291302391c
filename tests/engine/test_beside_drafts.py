# SPDX-License-Identifier: Apache-2.0
"""Requests that are served without drafts, beside requests that have them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config.reasoning import ReasoningConfig
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from tests.harness import adadecode_options, configure, start_engine, stats

pytestmark = pytest.mark.engine
SEEDS = pytest.mark.feature("seeds", "supported", "sampled without drafts")


class Forbid(AdapterLogitsProcessor):
    """Forbids the tokens that a request names."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        forbidden = (params.extra_args or {}).get("forbid")
        if forbidden is None:
            return None

        def process(output_ids: list[int], logits: Any) -> Any:
            logits[forbidden] = float("-inf")
            return logits

        return process


def engine_options() -> dict[str, Any]:
    return {
        "logits_processors": [Forbid],
        "reasoning_config": ReasoningConfig(
            reasoning_start_str="\n", reasoning_end_str=".\n"
        ),
    }


@pytest.fixture(scope="module")
def baseline() -> Iterator[Any]:
    with start_engine(**engine_options()) as llm:
        yield llm


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    options = adadecode_options(threshold=0.0)
    with start_engine(**options, **engine_options()) as llm:
        yield llm


def texts(
    llm: Any, prompts: list[str], options: list[dict[str, Any]]
) -> list[list[int]]:
    """Of one batch, in which each request has options of its own."""
    params = [SamplingParams(**{"max_tokens": 24, **own}) for own in options]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


GREEDY: dict[str, Any] = {"temperature": 0}
FIRST: dict[str, Any] = {"temperature": 1, "top_k": 1}


@pytest.mark.parametrize(
    "special",
    [
        pytest.param(
            {"temperature": 1, "min_p": 1.0},
            marks=pytest.mark.feature("min-p", "supported", "without drafts"),
        ),
        pytest.param(
            {**GREEDY, "logit_bias": {16: 50.0, 201: 45.0}},
            marks=pytest.mark.feature("logit bias", "supported", "without drafts"),
        ),
        pytest.param(
            {**GREEDY, "extra_args": {"forbid": [16, 201, 223]}},
            marks=pytest.mark.feature(
                "custom logits processors",
                "supported",
                "without drafts for the requests that they concern; on CUDA for all",
            ),
        ),
        pytest.param(
            {**GREEDY, "thinking_token_budget": 3},
            marks=pytest.mark.feature(
                "thinking budgets", "supported", "in steps without drafts"
            ),
        ),
        pytest.param({"temperature": 2.0, "seed": 11}, marks=SEEDS),
    ],
)
def test_beside_requests_with_drafts(
    baseline: Any, engine: Any, prompts: list[str], special: dict[str, Any]
) -> None:
    options = [GREEDY, special, FIRST, GREEDY, special, FIRST]
    expected = texts(baseline, prompts[:6], options)
    plain = texts(baseline, prompts[:6], [GREEDY] * 6)
    assert expected[1] != plain[1] or "min_p" in special, "it makes a difference"
    configure(engine)
    assert texts(engine, prompts[:6], options) == expected
    # Texts of other lengths, so that some steps hold one kind only.
    options = [{**own, "max_tokens": 12 + 5 * i} for i, own in enumerate(options)]
    expected = texts(baseline, prompts[:6], options)
    assert texts(engine, prompts[:6], options) == expected
    assert sum(stats(engine)["accepted"]) > 0
    assert sum(stats(engine)["rejected"]) > 0


@pytest.mark.feature("logprobs of chosen tokens", "supported", "in plain steps")
def test_logprobs_of_chosen_tokens(
    baseline: Any, engine: Any, prompts: list[str]
) -> None:
    chosen = [3, 17, 201]

    def run(llm: Any) -> list[Any]:
        scoring = SamplingParams(temperature=0, max_tokens=6, logprob_token_ids=chosen)
        greedy = SamplingParams(temperature=0, max_tokens=24)
        params = [scoring, greedy, scoring, greedy]
        outputs = llm.generate(prompts[:4], params, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    configure(engine)
    found, expected = run(engine), run(baseline)
    assert [text.token_ids for text in found] == [text.token_ids for text in expected]
    for text, reference in zip(found[::2], expected[::2], strict=True):
        for step, other in zip(text.logprobs, reference.logprobs, strict=True):
            assert step.keys() == other.keys() >= set(chosen)
            for token in step:
                assert step[token].logprob == pytest.approx(
                    other[token].logprob, abs=1e-3
                )
    assert sum(stats(engine)["accepted"]) > 0


def test_a_processor_concerns_its_requests_only(
    engine: Any, prompts: list[str]
) -> None:
    configure(engine)
    texts(engine, prompts[:2], [{**GREEDY, "extra_args": {"forbid": [16]}}] * 2)
    assert sum(stats(engine)["early_predictions"]) == 0
    texts(engine, prompts[:2], [GREEDY] * 2)
    assert sum(stats(engine)["early_predictions"]) > 0


@SEEDS
def test_a_seed_gives_plain_vllms_text(baseline: Any, prompts: list[str]) -> None:
    """By default too, where measured times say how many drafts the others have.

    Comes last: its engine takes the place of the one that the other tests share.
    """
    seeds = [(11, 1), (11, 1), (12, 1), (11, 3)]
    params = [
        SamplingParams(temperature=2.0, max_tokens=24, seed=seed, n=n)
        for seed, n in seeds
    ]
    params += [SamplingParams(temperature=0, max_tokens=40)] * 8
    batch = [prompts[0]] * len(seeds) + prompts[:8]

    def run(llm: Any) -> list[list[list[int]]]:
        outputs = llm.generate(batch, params, use_tqdm=False)
        return [
            [list(choice.token_ids) for choice in output.outputs] for output in outputs
        ]

    expected = run(baseline)
    assert expected[0] == expected[1] != expected[2]
    assert len({tuple(text) for text in expected[3]}) == 3
    with start_engine(**adadecode_options()) as llm:
        for _ in range(2):
            assert run(llm) == expected
        counted = stats(llm)
    assert sum(counted["accepted"]) + counted["ngram_accepted"] > 0
