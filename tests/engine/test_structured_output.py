# SPDX-License-Identifier: Apache-2.0
"""Texts that a grammar constrains equal plain vLLM's (I6).

vLLM cuts early predictions that the grammar forbids before it schedules them, so a
request's pending tokens may be more than what the next step verifies. The model knows
nothing of these grammars, so that happens all the time here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import pytest

from tests.harness import adadecode_options, configure, start_engine, stats

pytestmark = pytest.mark.engine

PROMPTS = 4
THRESHOLDS = [0.5, 0.0]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Vera", "Fatima", "Max"]},
        "groups": {"type": "integer", "minimum": 0, "maximum": 999},
        "steps": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[a-z ]{4,12}$"},
            "minItems": 2,
            "maxItems": 2,
        },
    },
    "required": ["name", "groups", "steps"],
    "additionalProperties": False,
}
# The model's own style, with numbers of a length that it would not write.
REGEX = (
    r"1\. [A-Z][a-z]+ (buys|has|loses) [0-9]{3} [a-z]{3,9}\.\n2\. [A-Za-z0-9 ]{8,30}\."
)
GRAMMAR = """
root ::= "1. There are " number " " thing ".\\n2. " sum
sum ::= number " + " number " = " number
number ::= [1-9] [0-9] [0-9]
thing ::= "groups" | "candles" | "boxes"
"""
KINDS: dict[str, dict[str, Any] | None] = {
    "JSON schema": {"json": SCHEMA},
    "regex": {"regex": REGEX},
    "grammar": {"grammar": GRAMMAR},
    "free": None,
}


@dataclass
class Answers:
    """An engine's answers, by kind and all kinds in one batch, and our counters."""

    alone: dict[str, list[Any]]
    mixed: list[Any]
    counted: dict[str, dict[str, Any]]


def run(llm: Any, prompts: list[str], *, ours: bool = False) -> Answers:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def params(kind: str) -> SamplingParams:
        values = KINDS[kind]
        return SamplingParams(
            temperature=0,
            max_tokens=70,
            structured_outputs=values and StructuredOutputsParams(**values),
        )

    alone, counted = {}, {}
    for kind in KINDS:
        if ours:
            configure(llm)
        outputs = llm.generate(prompts, params(kind), use_tqdm=False)
        alone[kind] = [output.outputs[0] for output in outputs]
        if ours:
            counted[kind] = stats(llm)
    pairs = [(prompt, params(kind)) for prompt in prompts for kind in KINDS]
    outputs = llm.generate(
        [prompt for prompt, _ in pairs], [own for _, own in pairs], use_tqdm=False
    )
    return Answers(alone, [output.outputs[0] for output in outputs], counted)


@pytest.fixture(scope="module", params=["xgrammar", "guidance"])
def backend(request: Any) -> str:
    return str(request.param)


def _options(backend: str) -> dict[str, Any]:
    return {
        "structured_outputs_config": {
            "backend": backend,
            "disable_any_whitespace": True,
        }
    }


@pytest.fixture(scope="module")
def baseline(backend: str, prompts: list[str]) -> Answers:
    with start_engine(**_options(backend)) as llm:
        return run(llm, prompts[:PROMPTS])


@pytest.fixture(scope="module")
def answers(
    backend: str, baseline: Answers, prompts: list[str]
) -> dict[float, Answers]:
    """AdaDecode's, by threshold."""
    options = adadecode_options(threshold=0.5)
    with start_engine(**options, **_options(backend)) as llm:
        found = {}
        for threshold in THRESHOLDS:
            configure(llm, threshold=threshold)
            found[threshold] = run(llm, prompts[:PROMPTS], ours=True)
        return found


def _check(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.text == theirs.text
        assert list(ours.token_ids) == list(theirs.token_ids)
        assert ours.finish_reason == theirs.finish_reason


def _kind(name: str, feature: str) -> Any:
    mark = pytest.mark.feature(f"structured output: {feature}", "supported")
    return pytest.param(name, marks=mark)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(
    "kind",
    [
        _kind("JSON schema", "JSON schema"),
        _kind("regex", "regex"),
        _kind("grammar", "grammar"),
    ],
)
def test_constrained_texts_are_the_same(
    answers: dict[float, Answers], baseline: Answers, kind: str, threshold: float
) -> None:
    _check(answers[threshold].alone[kind], baseline.alone[kind])
    counted = answers[threshold].counted[kind]
    assert sum(counted["accepted"]) > 0
    assert sum(counted["rejected"]) > 0
    # Of what was pending, the grammar forbade some.
    assert counted["dropped"]["truncated"] > 0


def test_the_grammars_are_kept(baseline: Answers) -> None:
    """Otherwise an engine that ignores them would pass."""
    whole = [answer.text for answer in baseline.alone["JSON schema"]]
    for text in whole:
        assert set(json.loads(text)) == {"name", "groups", "steps"}
    for answer in baseline.alone["regex"]:
        assert re.fullmatch(REGEX, answer.text)
    sentence = r"1\. There are \d{3} \w+\.\n2\. \d{3} \+ \d{3} = \d{3}"
    for answer in baseline.alone["grammar"]:
        assert re.fullmatch(sentence, answer.text)


@pytest.mark.feature("structured output: JSON schema", "supported")
@pytest.mark.feature("structured output: regex", "supported")
@pytest.mark.feature("structured output: grammar", "supported")
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_constrained_and_free_requests_in_one_batch(
    answers: dict[float, Answers], baseline: Answers, threshold: float
) -> None:
    found = answers[threshold].mixed
    _check(found, baseline.mixed)
    one_by_one = [
        baseline.alone[kind][index].text for index in range(PROMPTS) for kind in KINDS
    ]
    assert [answer.text for answer in found] == one_by_one
