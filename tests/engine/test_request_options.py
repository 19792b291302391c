# SPDX-License-Identifier: Apache-2.0
"""Options of single requests within one batch; the texts stay the same (I6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from tests.harness import (
    OUTPUT_TOKENS,
    Reference,
    adadecode_options,
    configure,
    generate,
    start_engine,
    stats,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine(reference: Reference) -> Iterator[Any]:
    with start_engine(**adadecode_options(threshold=0.5)) as llm:
        yield llm


def predictions(llm: Any, prompt: str, **options: Any) -> tuple[int, list[int]]:
    configure(llm)
    extra_args = {f"adadecode_{name}": value for name, value in options.items()}
    (text,) = generate(llm, [prompt], extra_args=extra_args or None)
    return sum(stats(llm)["early_predictions"]), text


def test_each_option(engine: Any, prompts: list[str], reference: Reference) -> None:
    prompt, expected = prompts[2], reference["texts"][2]
    usual, text = predictions(engine, prompt)
    assert text == expected
    assert usual > 0
    for off in ({"enabled": False}, {"threshold": 1.0}, {"max_early_predictions": 0}):
        assert predictions(engine, prompt, **off) == (0, expected)
    more, text = predictions(engine, prompt, threshold=0.0)
    assert text == expected
    assert more > usual
    _, text = predictions(engine, prompt, max_early_predictions=1)
    assert text == expected
    counted = stats(engine)
    assert counted["generated_tokens"] <= 2 * counted["request_steps"]


@pytest.mark.feature("options of a request", "supported")
def test_a_batch_of_all_kinds(
    engine: Any, prompts: list[str], reference: Reference
) -> None:
    from vllm import SamplingParams

    kinds: list[dict[str, Any] | None] = [
        None,
        {"adadecode_enabled": False},
        {"adadecode_threshold": 0.0},
        {"adadecode_threshold": 0.9, "adadecode_max_early_predictions": 2},
    ]
    params = [
        SamplingParams(
            temperature=0, max_tokens=OUTPUT_TOKENS, extra_args=kinds[index % 4]
        )
        for index in range(len(prompts))
    ]
    configure(engine)
    outputs = engine.generate(prompts, params, use_tqdm=False)
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    assert texts == reference["texts"]
    counted = stats(engine)
    assert sum(counted["accepted"]) > 0
    assert sum(counted["rejected"]) > 0


def test_a_request_may_ask_an_engine_that_never_predicts(
    engine: Any, prompts: list[str], reference: Reference
) -> None:
    configure(engine, threshold=1.0)
    (text,) = generate(engine, prompts[2:3], extra_args={"adadecode_threshold": 0.5})
    assert text == reference["texts"][2]
    assert sum(stats(engine)["accepted"]) > 0
    configure(engine, threshold=0.5)


def test_a_bad_option_is_refused_before_the_engine(
    engine: Any, prompts: list[str]
) -> None:
    with pytest.raises(VLLMValidationError, match="adadecode_threshold = 7 is refused"):
        generate(engine, prompts[:1], extra_args={"adadecode_threshold": 7})
    assert len(generate(engine, prompts[:1])) == 1
