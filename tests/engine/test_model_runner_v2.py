# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2: greedy texts equal plain vLLM's (I6), on the smallest set.

V2's kernels run in Triton's interpreter here. The references come from plain vLLM on
Model Runner V1, which is one more check.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import Reference, adadecode_options
from tests.interpreted.process import EngineProcess, start_engine

pytestmark = pytest.mark.engine

Case = tuple[list[str], list[list[int]]]
ASYNC = pytest.mark.parametrize("async_scheduling", [True, False])
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}
SAMPLED = {"temperature": 1.0, "max_tokens": 16, "n": 2}


@pytest.fixture(scope="module")
def some(prompts: list[str], reference: Reference) -> Case:
    """Four prompts of mixed lengths and plain vLLM's texts: interpreting is slow."""
    return prompts[:4], reference["texts"][:4]


@pytest.fixture(scope="module")
def seeded(some: Case) -> list[list[list[list[int]]]]:
    """Plain vLLM's texts of the seeds 1 and 2, on Model Runner V2."""
    with start_engine() as llm:
        assert llm.facts()["v2"]
        return [llm.sample(some[0][:3], seed=seed, **SAMPLED) for seed in (1, 2)]


def _scheduling(asynchronous: bool) -> dict[str, Any]:
    """vLLM schedules asynchronously by default."""
    return {} if asynchronous else {"async_scheduling": False}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(True, id="async"),
        # Its neighbour is test_chunked_prefill_and_preemption.
        pytest.param(False, id="sync", marks=pytest.mark.slow),
    ],
)
def engine(
    request: Any, some: Case, seeded: list[list[list[list[int]]]]
) -> Iterator[EngineProcess]:
    """With and without the next step being scheduled while the last one runs.

    Plain vLLM's engine has ended by then, so that they share a process.
    """
    options = adadecode_options(policy="threshold", max_early_predictions=5)
    with start_engine(
        **options,
        **_scheduling(request.param),
        per_request_spec_decode_metrics="detailed",
    ) as llm:
        facts = llm.facts()
        assert facts["v2"]
        assert facts["async_scheduling"] is request.param
        assert facts["runner"] == "AdaDecodeCPUModelRunnerV2"
        yield llm


@pytest.mark.feature("asynchronous scheduling", "supported", "in Model Runner V2")
@pytest.mark.parametrize(
    ("threshold", "cap"), [(0.0, 5), (0.5, 3), (0.75, 5), (1.0, 5)]
)
def test_thresholds_and_caps(
    engine: EngineProcess, some: Case, threshold: float, cap: int
) -> None:
    prompts, texts = some
    engine.configure(threshold=threshold, max_early_predictions=cap)
    assert engine.generate(prompts) == texts
    counted = engine.stats()
    if threshold == 1.0:
        assert sum(counted["early_predictions"]) == 0
        assert counted["resumed_tokens"] == 0
        return
    assert sum(counted["accepted"]) > 0
    assert counted["resumed_tokens"] > 0
    # With the next step scheduled before the last one ended, a request may run one step
    # past its end.
    assert counted["generated_tokens"] >= sum(len(text) for text in texts)
    if threshold == 0.0:
        assert sum(counted["rejected"]) > 5


@pytest.mark.parametrize(("threshold", "cap"), [(0.0, 5), (0.5, 4), (0.75, 5)])
def test_whole_steps(
    engine: EngineProcess, some: Case, threshold: float, cap: int
) -> None:
    """What CUDA graphs hold gives the same texts, and pads without a trace."""
    prompts, texts = some
    engine.configure(threshold=threshold, max_early_predictions=cap)
    engine.use_whole_steps(True)
    try:
        assert engine.generate(prompts) == texts
        assert engine.generate(prompts[:1]) == texts[:1]
        counted = engine.whole_steps()
    finally:
        engine.use_whole_steps(False)
    assert counted["one"] > 0
    assert counted["resumed"] > 0
    assert counted["prefetched"] > counted["finished"] > 0
    # Deferred layers join in where a later exit scores.
    assert (counted["several"] > 0) is (threshold > 0.0)
    assert sum(engine.stats()["accepted"]) > 0


@pytest.mark.feature("prefix caching", "supported")
def test_one_at_a_time_and_prefix_cache(engine: EngineProcess, some: Case) -> None:
    prompts, texts = some
    engine.configure(threshold=0.5, max_early_predictions=5)
    before = engine.metric("vllm:prefix_cache_hits")
    assert [engine.generate([prompt])[0] for prompt in prompts] == texts
    assert engine.metric("vllm:prefix_cache_hits") > before
    assert sum(engine.stats()["accepted"]) > 0


def test_the_metrics_count_real_drafts(engine: EngineProcess, some: Case) -> None:
    """Not the placeholders that were scheduled for them."""
    names = ("num_draft_tokens", "num_accepted_tokens")
    before = [engine.metric(f"vllm:spec_decode_{name}") for name in names]
    engine.configure(threshold=0.75, last_guess=False)
    engine.generate(some[0])
    drafted, accepted = (
        engine.metric(f"vllm:spec_decode_{name}") - value
        for name, value in zip(names, before, strict=True)
    )
    counted = engine.stats()
    predicted = sum(counted["early_predictions"])
    found = engine.drafts_of_requests(some[0])
    assert sum(map(sum, found)) == drafted
    assert all(drafts > 0 for steps in found for drafts in steps)
    # What a finished request had drafted is never scheduled or not reported.
    assert 0.8 * predicted <= drafted <= predicted
    assert 0 < accepted <= sum(counted["accepted"])


@pytest.mark.feature("metrics", "supported")
def test_the_metrics_show_the_counters(engine: EngineProcess, some: Case) -> None:
    engine.configure(threshold=0.5)
    engine.generate(some[0][:1], max_tokens=1)  # takes the counters' reset in
    names = {
        "early_predictions": "early_predictions",
        "accepted": "accepted_tokens",
        "rejected": "rejected_tokens",
    }
    earlier = engine.stats()
    before = [engine.metric(f"vllm:adadecode_{name}") for name in names.values()]
    engine.generate(some[0])
    counted = engine.stats()
    after = [engine.metric(f"vllm:adadecode_{name}") for name in names.values()]
    for name, old, new in zip(names, before, after, strict=True):
        assert new - old == sum(counted[name]) - sum(earlier[name]) > 0
    ended = [own for own in engine.finished() if own[0] > 1][: len(some[0])]
    assert sorted(tokens for tokens, _, _ in ended) == sorted(map(len, some[1]))
    assert sum(accepted for _, _, accepted in ended) > 0
    assert all(accepted <= min(rest) for *rest, accepted in ended)


def test_requests_that_end_at_max_model_len(
    engine: EngineProcess, prompts: list[str], reference: Reference
) -> None:
    engine.configure(threshold=0.5, max_early_predictions=5)
    texts = engine.generate(prompts[:2], max_tokens=None, ignore_eos=True)
    assert texts == reference["full"][:2]
    assert sum(engine.stats()["accepted"]) > 0


@pytest.mark.feature("seeds", "supported", "sampled without drafts")
def test_a_seed_gives_plain_vllms_text(
    engine: EngineProcess, some: Case, seeded: list[list[list[list[int]]]]
) -> None:
    engine.configure(threshold=0.0, max_early_predictions=5)
    for seed, texts in enumerate(seeded, start=1):
        assert engine.sample(some[0][:3], seed=seed, **SAMPLED) == texts
    assert seeded[0] != seeded[1]
    assert sum(engine.stats()["early_predictions"]) == 0
    # Without a seed there are drafts.
    engine.sample(some[0][:3], **SAMPLED)
    assert sum(engine.stats()["accepted"]) > 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"repetition_penalty": 1.3, "frequency_penalty": 0.7},
            marks=pytest.mark.feature("penalties", "supported"),
        ),
        pytest.param(
            {"bad_words": ["costs", "6 groups", "self"]},
            marks=pytest.mark.feature("bad words", "supported"),
        ),
        pytest.param(
            {"min_tokens": 12, "stop_token_ids": "frequent"},
            marks=pytest.mark.feature("min and max tokens", "supported"),
        ),
    ],
)
def test_parameters_of_sampling(
    engine: EngineProcess, some: Case, options: dict[str, Any]
) -> None:
    """The same with and without early predictions, and not what it is without them."""
    prompts, texts = some
    options = {"max_tokens": 24, **options}
    if "stop_token_ids" in options:
        tokens = [set(text[4:12]) for text in texts]
        frequent = max(
            set.union(*tokens), key=lambda t: sum(t in own for own in tokens)
        )
        options["stop_token_ids"] = [frequent]
    engine.configure(threshold=1.0)
    expected = engine.generate(prompts, **options)
    assert expected != [text[:24] for text in texts]
    engine.configure(threshold=0.0)
    assert engine.generate(prompts, **options) == expected
    assert sum(engine.stats()["early_predictions"]) > 0


def test_what_is_served_without_drafts_beside_requests_with_drafts(
    engine: EngineProcess, some: Case
) -> None:
    chosen = [3, 17, 201]
    greedy = {"temperature": 0, "max_tokens": 16}
    options = [
        greedy,
        {"temperature": 1.0, "min_p": 1.0, "max_tokens": 12},
        {**greedy, "logit_bias": {16: 50.0, 201: 45.0}},
        {**greedy, "max_tokens": 5, "logprob_token_ids": chosen},
        {"temperature": 1.0, "seed": 1, "max_tokens": 16},
    ]
    prompts = [*some[0][:4], some[0][0]]
    engine.configure(threshold=1.0)
    expected = engine.mixed(prompts, options)
    assert all(set(chosen) <= set(tokens) for tokens in expected[3][1])
    engine.configure(threshold=0.0)
    assert engine.mixed(prompts, options) == expected
    assert sum(engine.stats()["accepted"]) > 0


@pytest.mark.feature("options of a request", "supported")
def test_options_of_a_request(engine: EngineProcess, some: Case) -> None:
    prompts, texts = some
    engine.configure(threshold=0.5, max_early_predictions=5)
    for off in ({"adadecode_enabled": False}, {"adadecode_threshold": 1}):
        assert engine.generate(prompts[:2], extra_args=off) == texts[:2]
        assert sum(engine.stats()["early_predictions"]) == 0
    engine.configure(threshold=1.0)
    extra_args = {"adadecode_threshold": 0.0, "adadecode_max_early_predictions": 2}
    assert engine.generate(prompts[:2], extra_args=extra_args) == texts[:2]
    assert sum(engine.stats()["accepted"]) > 0


@pytest.mark.parametrize(
    ("threshold", "ngram"), [(0.5, "tail"), (0.9, "first"), (0.9, "chain")]
)
def test_ngram_drafts_beside_the_exits(
    engine: EngineProcess, some: Case, threshold: float, ngram: str
) -> None:
    prompts, texts = some
    engine.configure(threshold=threshold, max_early_predictions=5, ngram=ngram)
    try:
        assert engine.generate(prompts) == texts
        counted = engine.stats()
    finally:
        engine.configure(ngram="off")
    assert counted["ngram_accepted"] > 0
    assert counted["ngram_rejected"] > 0
    assert sum(counted["accepted"]) > 0


@pytest.mark.feature("structured output: JSON schema", "supported")
def test_structured_output(engine: EngineProcess, some: Case) -> None:
    """The grammar sees the drafts that there are; what it forbids is not resumed."""
    engine.configure(threshold=1.0)
    baseline = engine.structured(some[0][:3], SCHEMA, max_tokens=24)
    for threshold in (0.0, 0.5):
        engine.configure(threshold=threshold, max_early_predictions=4)
        assert engine.structured(some[0][:3], SCHEMA, max_tokens=24) == baseline
        assert sum(engine.stats()["accepted"]) > 0
    mixed = engine.generate(some[0])
    assert mixed == some[1]


@pytest.mark.feature(
    "custom logits processors",
    "supported",
    "without drafts for the requests that they concern; on CUDA for all",
)
def test_custom_logits_processors(some: Case) -> None:
    processors = {"logits_processors": ["tests.interpreted.processors:Alternating"]}
    with start_engine(**processors) as llm:
        expected = llm.generate(some[0])
    assert expected != some[1]
    with start_engine(**adadecode_options(threshold=0.0), **processors) as llm:
        assert llm.generate(some[0]) == expected
        assert sum(llm.stats()["early_predictions"]) == 0


@ASYNC
@pytest.mark.feature("chunked prefill", "supported")
@pytest.mark.feature("preemption", "supported")
def test_chunked_prefill_and_preemption(
    prompts: list[str], reference: Reference, async_scheduling: bool
) -> None:
    prompts, texts = prompts[:6], reference["texts"][:6]
    with start_engine(
        **adadecode_options(threshold=0.5),
        **_scheduling(async_scheduling),
        enable_prefix_caching=False,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=9,
        max_num_seqs=6,
    ) as llm:
        assert llm.generate(prompts) == texts
        assert llm.metric("vllm:num_preemptions") > 0
        assert sum(llm.stats()["accepted"]) > 0
        assert sum(llm.stats()["rejected"]) > 0


@pytest.mark.feature("tensor parallel", "supported")
def test_tensor_parallel_2(some: Case, a_core_each: None) -> None:
    """Every rank counts drafts and decides alike (I7), in processes of their own."""
    prompts, texts = (both[:2] for both in some)
    with start_engine(
        **adadecode_options(threshold=0.3),
        multiprocessing=True,
        tensor_parallel_size=2,
    ) as llm:
        assert llm.generate(prompts) == texts
        ranks = llm.ranks()
    assert len(ranks) == 2
    for counter in ("early_predictions", "accepted", "rejected", "resumed_tokens"):
        assert ranks[0][counter] == ranks[1][counter]
    assert sum(ranks[0]["accepted"]) > 0
    assert sum(ranks[0]["rejected"]) > 0


def test_drafting_stops_above_a_batch_size(some: Case) -> None:
    """No placeholders are scheduled then, and the host waits for no outcome."""
    prompts, texts = some
    options = adadecode_options(threshold=0.5, disable_by_batch_size=2)
    with start_engine(**options) as llm:
        assert llm.generate(prompts) == texts
        assert llm.generate(prompts[:2]) == texts[:2]
        assert sum(llm.stats()["accepted"]) > 0
        llm.configure()
        llm.generate(prompts[:3], max_tokens=8, ignore_eos=True)
        assert sum(llm.stats()["early_predictions"]) == 0
