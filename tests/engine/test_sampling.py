# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters that change what is sampled or returned, with and without drafts.

Steps without drafts go through vLLM's plain sampler, others through its rejection
sampler; both happen in these runs. Everything here is greedy or as good as that, so
plain vLLM's answers are the reference; test_distribution.py has the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.harness import (
    Reference,
    adadecode_options,
    set_policy,
    start_engine,
    stats,
)

pytestmark = pytest.mark.engine

PROMPTS = 5
MAX_TOKENS = 30
PARAMETERS: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": 3},
    "prompt logprobs": {"prompt_logprobs": 2},
    "repetition and presence": {"repetition_penalty": 1.3, "presence_penalty": 0.4},
    "frequency": {"frequency_penalty": 0.7},
    "bad words": {"bad_words": ["costs", "6 groups", "self"]},
    "stop strings": {"stop": ["multiply", ".pr"]},
    "kept stop strings": {"stop": ["are"], "include_stop_str_in_output": True},
    # What ends a text here is a token that texts are full of, and that drafts are.
    "stop token ids": {"stop_token_ids": "frequent"},
    "least and most": {"min_tokens": 20, "max_tokens": 24},
    "least of stops": {"min_tokens": 12, "stop_token_ids": "frequent"},
    "at most one": {"max_tokens": 1},
    "at most two": {"max_tokens": 2},
}


@dataclass
class Runs:
    """What an engine answers: by name of the parameters, and in one mixed batch."""

    alone: dict[str, list[Any]]
    mixed: list[Any]
    beams: list[list[tuple[list[int], float]]]
    parallel: list[list[list[int]]]


def frequent_token(texts: list[list[int]]) -> int:
    """The token that most texts contain, but do not begin with."""
    inner = [set(text[4:-1]) for text in texts]
    return max(set().union(*inner), key=lambda token: sum(token in t for t in inner))


def sampling_params(reference: Reference) -> dict[str, Any]:
    from vllm import SamplingParams

    stop = [frequent_token(reference["texts"][:PROMPTS])]
    found = {}
    for name, values in PARAMETERS.items():
        chosen = {"max_tokens": MAX_TOKENS, **values}
        if "stop_token_ids" in chosen:
            chosen["stop_token_ids"] = stop
        found[name] = SamplingParams(temperature=0, **chosen)
    return found


def run(llm: Any, prompts: list[str], reference: Reference) -> Runs:
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    prompts = prompts[:PROMPTS]
    params = sampling_params(reference)
    alone = {
        name: llm.generate(prompts, values, use_tqdm=False)
        for name, values in params.items()
    }
    # Each prompt with each of the parameters, neighbours with different ones.
    pairs = [(prompt, values) for prompt in prompts for values in params.values()]
    mixed = llm.generate(
        [prompt for prompt, _ in pairs],
        [values for _, values in pairs],
        use_tqdm=False,
    )
    beams = llm.beam_search(
        [{"prompt": prompt} for prompt in prompts[:3]],
        BeamSearchParams(beam_width=3, max_tokens=10),
    )
    # Sampled, but from a single token.
    several = SamplingParams(temperature=1, top_k=1, n=3, max_tokens=MAX_TOKENS)
    return Runs(
        alone,
        mixed,
        [
            [(beam.tokens, beam.cum_logprob) for beam in answer.sequences]
            for answer in beams
        ],
        [
            [list(choice.token_ids) for choice in output.outputs]
            for output in llm.generate(prompts, several, use_tqdm=False)
        ],
    )


@pytest.fixture(scope="module")
def baseline(prompts: list[str], reference: Reference) -> Runs:
    with start_engine() as llm:
        return run(llm, prompts, reference)


@pytest.fixture(scope="module")
def engine(baseline: Runs) -> Iterator[Any]:
    with start_engine(**adadecode_options(threshold=0.5)) as llm:
        yield llm


@pytest.fixture(scope="module", params=[0.5, 0.0])
def runs(
    request: Any, engine: Any, prompts: list[str], reference: Reference
) -> tuple[Runs, dict[str, Any]]:
    """AdaDecode's answers, and its counters."""
    set_policy(engine, request.param, 5)
    found = run(engine, prompts, reference)
    counted = stats(engine)
    set_policy(engine, 0.5, 5)
    return found, counted


def check_same(found: list[Any], expected: list[Any]) -> None:
    """Texts, reasons to end and whatever logprobs there are."""
    for ours, theirs in zip(found, expected, strict=True):
        mine, other = ours.outputs[0], theirs.outputs[0]
        assert list(mine.token_ids) == list(other.token_ids)
        assert mine.text == other.text
        assert mine.finish_reason == other.finish_reason
        assert mine.stop_reason == other.stop_reason
        check_logprobs(mine.logprobs, other.logprobs)
        check_logprobs(ours.prompt_logprobs, theirs.prompt_logprobs)


def check_logprobs(found: Any, expected: Any) -> None:
    assert (found is None) == (expected is None)
    for mine, other in zip(found or (), expected or (), strict=True):
        assert (mine is None) == (other is None)  # nothing precedes the first token
        if other is None:
            continue
        assert mine.keys() == other.keys()
        for token, entry in other.items():
            assert mine[token].logprob == pytest.approx(entry.logprob, abs=1e-3)
            assert mine[token].rank == entry.rank


def _named(name: str, *features: str) -> Any:
    marks = [pytest.mark.feature(feature, "supported") for feature in features]
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize(
    "name",
    [
        _named("logprobs", "logprobs"),
        _named("prompt logprobs", "prompt logprobs"),
        _named("repetition and presence", "penalties"),
        _named("frequency", "penalties"),
        _named("bad words", "bad words"),
        _named("stop strings", "stop strings"),
        _named("kept stop strings", "stop strings"),
        _named("stop token ids", "stop token ids"),
        _named("least and most", "min and max tokens"),
        _named("least of stops", "min and max tokens", "stop token ids"),
        _named("at most one", "min and max tokens"),
        _named("at most two", "min and max tokens"),
    ],
)
def test_greedy_output_is_the_same(
    runs: tuple[Runs, dict[str, Any]], baseline: Runs, name: str
) -> None:
    found, counted = runs
    assert sum(counted["accepted"]) > 50
    assert sum(counted["rejected"]) > 20
    check_same(found.alone[name], baseline.alone[name])


def test_each_parameter_matters(baseline: Runs, reference: Reference) -> None:
    """Otherwise ignoring it would pass."""
    plain = [text[:MAX_TOKENS] for text in reference["texts"][:PROMPTS]]
    for name, outputs in baseline.alone.items():
        if name == "logprobs":
            assert outputs[0].outputs[0].logprobs
        elif name == "prompt logprobs":
            assert outputs[0].prompt_logprobs
        else:
            texts = [list(output.outputs[0].token_ids) for output in outputs]
            assert texts != plain, name
    reasons = {
        name: {output.outputs[0].stop_reason for output in outputs}
        for name, outputs in baseline.alone.items()
    }
    assert reasons["stop strings"] & {"multiply", ".pr"}
    assert reasons["kept stop strings"] & {"are"}
    assert any(isinstance(reason, int) for reason in reasons["stop token ids"])
    assert any(isinstance(reason, int) for reason in reasons["least of stops"])


def test_parameters_of_all_kinds_in_one_batch(
    runs: tuple[Runs, dict[str, Any]], baseline: Runs
) -> None:
    """Those of one request do not reach its neighbours' drafts."""
    found, _ = runs
    check_same(found.mixed, baseline.mixed)
    separate = [
        outputs[index].outputs[0].token_ids
        for index in range(PROMPTS)
        for outputs in baseline.alone.values()
    ]
    assert [output.outputs[0].token_ids for output in found.mixed] == separate


@pytest.mark.feature(
    "beam search",
    "supported",
    "vLLM asks for one token at a time, so nothing is predicted early",
)
def test_beam_search(runs: tuple[Runs, dict[str, Any]], baseline: Runs) -> None:
    found, _ = runs
    for ours, theirs in zip(found.beams, baseline.beams, strict=True):
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
        for (_, mine), (_, other) in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, abs=1e-2)


@pytest.mark.feature("n > 1", "supported")
def test_several_answers_to_one_prompt(
    runs: tuple[Runs, dict[str, Any]], baseline: Runs, reference: Reference
) -> None:
    """With only the best token to sample from, each is the greedy text."""
    found, _ = runs
    greedy = [text[:MAX_TOKENS] for text in reference["texts"][:PROMPTS]]
    assert baseline.parallel == [[text] * 3 for text in greedy]
    assert found.parallel == baseline.parallel
