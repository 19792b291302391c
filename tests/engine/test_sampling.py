# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters that change what is sampled or returned, with and without drafts.

Steps without drafts go through vLLM's plain sampler, others through its rejection
sampler; both happen in these runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import adadecode_options, set_policy, start_engine, stats

pytestmark = pytest.mark.engine

PARAMETERS: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": 3},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4},
    "words": {"bad_words": ["has", "Total"]},
    "minimum": {"min_tokens": 20},
    "stops": {"stop": ["="]},
}


def run(llm: Any, prompts: list[str]) -> dict[str, list[Any]]:
    """By name of the parameters, what each prompt gave."""
    from vllm import SamplingParams

    found = {}
    for name, values in PARAMETERS.items():
        params = SamplingParams(temperature=0, max_tokens=30, **values)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found[name] = [output.outputs[0] for output in outputs]
    return found


@pytest.fixture(scope="module")
def ordinary(prompts: list[str]) -> Iterator[dict[str, list[Any]]]:
    with start_engine() as llm:
        yield run(llm, prompts[:8])


@pytest.mark.parametrize("threshold", [0.5, 0.0])
def test_greedy_output_is_the_same(
    prompts: list[str], ordinary: dict[str, list[Any]], threshold: float
) -> None:
    with start_engine(**adadecode_options(threshold=0.5)) as llm:
        set_policy(llm, threshold, 5)
        found = run(llm, prompts[:8])
        counters = stats(llm)
    assert sum(counters["accepted"]) > 50
    assert sum(counters["early_predictions"]) < counters["generated_tokens"] * 5
    if threshold == 0:
        assert sum(counters["rejected"]) > 50
    for name, expected in ordinary.items():
        for ours, theirs in zip(found[name], expected, strict=True):
            assert list(ours.token_ids) == list(theirs.token_ids), name
            assert ours.text == theirs.text
            assert ours.finish_reason == theirs.finish_reason
    for ours, theirs in zip(found["logprobs"], ordinary["logprobs"], strict=True):
        for mine, reference in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert mine.keys() == reference.keys()
            for token, value in reference.items():
                assert mine[token].logprob == pytest.approx(value.logprob, abs=1e-3)
