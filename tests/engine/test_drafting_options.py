# SPDX-License-Identifier: Apache-2.0
"""n-gram drafts, and drafting that adapts; the texts stay the same (I6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from adadecode_vllm.engine.adaptive import MANY
from tests.harness import (
    OUTPUT_TOKENS,
    Reference,
    adadecode_options,
    configure,
    drafts_of_requests,
    generate,
    metric,
    start_engine,
    stats,
)

pytestmark = pytest.mark.engine
NGRAM = pytest.mark.feature("n-gram drafts beside the exits'", "supported")


@pytest.fixture(scope="module")
def engine(reference: Reference) -> Iterator[Any]:
    options = adadecode_options(threshold=0.5, max_early_predictions=6, ngram="tail")
    with start_engine(**options) as llm:
        yield llm


@NGRAM
@pytest.mark.parametrize("ngram", ["tail", "first", "chain"])
@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.0])
def test_texts_are_the_same(
    engine: Any,
    prompts: list[str],
    reference: Reference,
    threshold: float,
    ngram: str,
) -> None:
    configure(engine, threshold=threshold, ngram=ngram)
    assert generate(engine, prompts) == reference["texts"]
    counted = stats(engine)
    assert counted["ngram_accepted"] > 0
    assert counted["ngram_rejected"] > 0
    assert (
        counted["ngram_accepted"] + counted["ngram_rejected"] <= counted["ngram_drafts"]
    )
    early = sum(counted["early_predictions"])
    assert (early == 0) is (threshold == 1.0)
    assert (counted["resumed_tokens"] == 0) is (threshold == 1.0)


def test_one_at_a_time_takes_fewer_steps(
    engine: Any, prompts: list[str], reference: Reference
) -> None:
    """And each step's tokens are what both kinds of drafts brought, and one more."""
    steps, early = {}, {}
    for ngram in ("off", "tail", "first", "chain"):
        configure(engine, threshold=0.9, ngram=ngram)
        for prompt, text in zip(prompts[:6], reference["texts"], strict=False):
            assert generate(engine, [prompt]) == [text]
        counted = stats(engine)
        steps[ngram] = counted["request_steps"]
        early[ngram] = sum(counted["early_predictions"])
        drafts = sum(counted["accepted"]) + counted["ngram_accepted"]
        assert counted["generated_tokens"] == counted["request_steps"] + drafts
    assert max(steps["tail"], steps["first"], steps["chain"]) < steps["off"]
    # No exit scores what the lookup finds.
    assert early["first"] < early["tail"]


def test_vllms_metrics_count_all_drafts(engine: Any, prompts: list[str]) -> None:
    configure(engine, threshold=0.5, ngram="tail")
    name = "vllm:spec_decode_num_accepted_tokens"
    before = metric(engine, name)
    generate(engine, prompts[:6])
    counted = stats(engine)
    accepted = sum(counted["accepted"]) + counted["ngram_accepted"]
    assert metric(engine, name) - before == accepted


@NGRAM
def test_requests_choose(engine: Any, prompts: list[str], reference: Reference) -> None:
    from vllm import SamplingParams

    kinds: list[dict[str, Any]] = [
        {"adadecode_ngram": "tail"},
        {"adadecode_ngram": "off"},
        {"adadecode_ngram": "first", "adadecode_threshold": 1.0},
        {"adadecode_ngram": "off", "adadecode_threshold": 1.0},
    ]
    configure(engine, threshold=0.5, ngram="off")
    params = [
        SamplingParams(
            temperature=0, max_tokens=OUTPUT_TOKENS, extra_args=kinds[index % 4]
        )
        for index in range(len(prompts))
    ]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    assert texts == reference["texts"]
    assert stats(engine)["ngram_drafts"] > 0
    for extra_args, drafts in zip(kinds, (True, False, True, False), strict=True):
        configure(engine, threshold=0.5, ngram="off")
        generate(engine, prompts[:2], extra_args=extra_args)
        counted = stats(engine)
        assert (counted["ngram_drafts"] > 0) is drafts
        early = extra_args.get("adadecode_threshold") != 1.0
        assert (sum(counted["early_predictions"]) > 0) is early


def test_with_preemption_and_chunked_prefill(
    prompts: list[str], reference: Reference
) -> None:
    with start_engine(
        **adadecode_options(threshold=0.5, ngram="tail"),
        enable_prefix_caching=False,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=9,
        max_num_seqs=6,
    ) as llm:
        assert generate(llm, prompts) == reference["texts"]
        assert metric(llm, "vllm:num_preemptions") > 0
        assert stats(llm)["ngram_accepted"] > 0


def test_suffix_trees_remember_answers(
    prompts: list[str], reference: Reference
) -> None:
    pytest.importorskip("arctic_inference", reason="arctic-inference is not installed")
    options = adadecode_options(threshold=1.0, ngram="chain", lookup="suffix")
    with start_engine(**options, enable_prefix_caching=False, max_num_seqs=4) as llm:
        steps = []
        for _ in range(2):
            assert generate(llm, prompts) == reference["texts"]
            counted = stats(llm)
            assert counted["ngram_accepted"] > 0
            steps.append(counted["request_steps"])
    # The second time the whole answers are known.
    assert steps[1] - steps[0] < steps[0] / 2


@pytest.mark.feature("drafting that adapts to its speed", "supported")
@pytest.mark.parametrize("slow", [True, False], ids=["drafts cost", "drafts pay"])
def test_drafting_stops_where_it_costs(
    prompts: list[str], reference: Reference, slow: bool
) -> None:
    """By a clock of our own; the texts stay the same whenever it stops and begins."""
    options = adadecode_options(threshold=0.0, ngram="tail", policy="cost")
    with start_engine(**options) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        begins = [most > 0 for most in scheduler.dynamic_sd_lookup[1:]]
        assert begins == [number < MANY for number in range(1, len(begins) + 1)]
        assert len(begins) >= MANY
        seconds = 0.0

        def clock() -> float:
            nonlocal seconds
            drafts = scheduler.dynamic_sd_lookup[1] > 0
            seconds += 10.0 if drafts is slow else 1.0
            return seconds

        scheduler._adaptive._clock = clock
        for prompt, text in zip(prompts[:8], reference["texts"], strict=False):
            assert generate(llm, [prompt]) == [text]
        assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 0
        configure(llm)
        for prompt, text in zip(prompts[:4], reference["texts"], strict=False):
            assert generate(llm, [prompt]) == [text]
        counted = stats(llm)
        share = sum(counted["early_predictions"]) / counted["request_steps"]
    assert (share < 0.5) if slow else (share > 0.5)


def test_a_threshold_ends_deciding_by_costs(prompts: list[str]) -> None:
    """Also in the scheduler, by whose clock drafts did not pay."""
    options = adadecode_options(threshold=0.0, ngram="tail", policy="cost")
    with start_engine(**options, per_request_spec_decode_metrics="detailed") as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        seconds = 0.0

        def clock() -> float:
            nonlocal seconds
            seconds += 10.0 if scheduler.dynamic_sd_lookup[1] > 0 else 1.0
            return seconds

        def decode_until_there_are_no_drafts() -> None:
            for prompt in prompts:
                generate(llm, [prompt])
                if not scheduler.dynamic_sd_lookup[1]:
                    return
            pytest.fail("drafting never stopped")

        scheduler._adaptive._clock = clock
        decode_until_there_are_no_drafts()
        configure(llm, threshold=0.0)
        generate(llm, prompts[:1], max_tokens=1)  # the scheduler learns of it
        for prompt in prompts[:3]:
            configure(llm)
            (drafts,) = drafts_of_requests(llm, [prompt])
            # All steps but the first, of the prompt, and perhaps the last.
            assert len(drafts) >= stats(llm)["request_steps"] - 2 > 0
        configure(llm, policy="cost")
        decode_until_there_are_no_drafts()


@pytest.mark.feature("drafts bounded by what they cost", "supported")
def test_drafts_promise_what_they_cost(
    prompts: list[str], reference: Reference
) -> None:
    """With made-up costs; a request's own threshold stands above them."""
    options = adadecode_options(
        threshold=0.75, policy="cost", ngram="tail", max_early_predictions=6
    )
    with start_engine(**options) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        adaptive = scheduler._adaptive
        adaptive.step = lambda **_: False  # no clock
        scheduler.dynamic_sd_lookup = scheduler._most_by_requests
        early, looked_up, accepted = [], [], []
        for least in (0.02, 0.3, 0.9):
            adaptive.admission = lambda requests, least=least: least
            configure(llm)
            assert generate(llm, prompts) == reference["texts"]
            counted = stats(llm)
            early.append(sum(counted["early_predictions"]))
            looked_up.append(counted["ngram_drafts"])
            accepted.append(sum(counted["accepted"]) / early[-1])
        assert early[0] > early[1] > early[2] > 0
        # Behind fewer early predictions more is still probable.
        assert looked_up[0] < looked_up[1]
        assert accepted[0] < accepted[1] < accepted[2]
        configure(llm)
        own = {"adadecode_threshold": 0.0, "adadecode_ngram": "off"}
        assert generate(llm, prompts, extra_args=own) == reference["texts"]
        counted = stats(llm)
        assert counted["ngram_drafts"] == 0
        assert sum(counted["early_predictions"]) > early[0]
