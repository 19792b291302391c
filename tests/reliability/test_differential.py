# SPDX-License-Identifier: Apache-2.0
"""A share of the differential fuzzer, and that it says what is wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.reliability.differential import drive
from tests.reliability.differential.case import Engine, Request, literal
from tests.reliability.differential.compare import TOLERANCE, differences
from tests.reliability.differential.draw import (
    VOCABULARY,
    draw_engine,
    draw_stream,
    runner_of,
    stream_sizes,
)
from tests.reliability.differential.fuzz import Effort, Report, fuzz_engine, script
from tests.reliability.differential.host import last_words
from tests.reliability.differential.pair import Failure, Pair
from tests.reliability.differential.prove import prove
from tests.reliability.differential.shrink import shrink

SEEDS = range(300)
PLAIN = {"temperature": 0, "max_tokens": 8}
REQUESTS = [Request([number], PLAIN) for number in (5, 6, 7, 8, 9, 10)]
ANSWER: dict[str, Any] = {
    "error": None,
    "aborted": False,
    "prompt_logprobs": None,
    "outputs": {
        0: {
            "token_ids": [4, 5, 6],
            "text": "abc",
            "finish_reason": "length",
            "stop_reason": None,
            "logprobs": [{4: (-1.0, 1)}, {5: (-2.0, 1), 9: (-2.5, 2)}, {6: (-0.5, 1)}],
            "cumulative_logprob": -3.5,
        }
    },
}


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with closing(Pair()) as pair:
        yield pair


@pytest.mark.server
@pytest.mark.parametrize(
    ("seed", "runner", "requests"),
    [
        (2, "v1", 15),
        pytest.param(3, "v1", 15, marks=pytest.mark.slow),
        (5, "v1", 30),
        (23, "v2", 6),
    ],
)
def test_engines_answer_alike(
    pair: Pair, tmp_path: Path, seed: int, runner: str, requests: int
) -> None:
    effort = Effort(requests, shrink_seconds=60, scripts=tmp_path)
    report = fuzz_engine(pair, seed, runner, effort)
    assert report.failures == [], "\n".join(report.scripts)
    assert report.refused is None
    assert report.void == []
    assert report.cases == requests
    assert report.counts["draft_tokens"] > 0


@pytest.mark.server
@pytest.mark.parametrize(
    ("defect", "seed", "found"),
    [
        ("wrong token", 3, "mismatch: request"),
        ("nothing scheduled", 3, "hang: step"),
        pytest.param("block kept", 9, "books: ", marks=pytest.mark.slow),
        ("exception", 3, "death: RuntimeError: on purpose"),
    ],
)
def test_what_is_put_in_is_found(
    pair: Pair, defect: str, seed: int, found: str
) -> None:
    answer = prove(pair, defect, seed, engines=1, requests=12, runner="v1")
    assert answer["found"].startswith(found)
    assert answer["cases"] > 0


def test_draws_follow_the_seed() -> None:
    for seed in range(8):
        runner = runner_of(seed, "both")
        engine = draw_engine(seed, runner)
        assert engine == draw_engine(seed, runner)
        assert engine != draw_engine(seed + 1, runner)
        stream = draw_stream(seed, 0, engine, 10)
        assert stream == draw_stream(seed, 0, engine, 10)
        assert stream != draw_stream(seed, 1, engine, 10)
        assert sum(stream_sizes(seed, 50, runner)) == 50
    assert [runner_of(seed, "both") for seed in range(8)].count("v2") == 1


def test_draws_reach_every_corner() -> None:
    engines = [draw_engine(seed, "v1") for seed in SEEDS]
    for threshold in (0.0, 0.3, 0.75, 1.0):
        assert any(e.adadecode["threshold"] == threshold for e in engines)
    caps = {engine.adadecode["max_early_predictions"] for engine in engines}
    assert {1, 16} <= caps
    for name in (
        "enable_chunked_prefill",
        "hf_overrides",
        "logits_processors",
        "logprobs_mode",
        "long_prefill_token_threshold",
        "num_gpu_blocks_override",
        "reasoning_config",
        "scheduling_policy",
    ):
        share = sum(name in engine.arguments for engine in engines) / len(engines)
        assert 0.02 < share < 0.9, name
    # Budgets as small as a request's window, and KV caches as small as one request.
    assert any(
        engine.arguments["max_num_batched_tokens"]
        == engine.adadecode["max_early_predictions"]
        for engine in engines
    )
    streams = [
        request
        for seed, engine in enumerate(engines)
        for request in draw_stream(seed, 0, engine, 12)
    ]
    for name in (
        "allowed_token_ids",
        "bad_words",
        "extra_args",
        "frequency_penalty",
        "ignore_eos",
        "logit_bias",
        "logprob_token_ids",
        "logprobs",
        "min_p",
        "min_tokens",
        "n",
        "presence_penalty",
        "prompt_logprobs",
        "repetition_detection",
        "repetition_penalty",
        "seed",
        "stop",
        "stop_token_ids",
        "structured_outputs",
        "thinking_token_budget",
        "top_k",
    ):
        assert sum(name in request.params for request in streams) > 5, name
    assert any(request.chunks for request in streams)
    assert any(request.abort_after is not None for request in streams)
    assert any(request.priority for request in streams)
    lengths = {len(request.prompt) for request in streams}
    assert {1, 33, 65} <= lengths


def test_drawn_requests_fit_their_engine() -> None:
    for seed in SEEDS:
        engine = draw_engine(seed, "v1")
        length = engine.arguments["max_model_len"]
        for request in draw_stream(seed, 0, engine, 12):
            assert 1 <= len(request.prompt) < length
            assert all(0 <= token < VOCABULARY for token in request.prompt)
            most = request.params["max_tokens"]
            assert most is None or most >= request.params.get("min_tokens", 0)
            if request.chunks:
                pieces = [request.prompt, *(tokens for _, tokens in request.chunks)]
                assert sum(len(piece) + most for piece in pieces) <= length


def test_a_script_holds_the_case() -> None:
    engine = draw_engine(4, "v1")
    requests = draw_stream(4, 0, engine, 8)
    text = script(engine, requests, Failure("mismatch", ["a\nb"]))
    assert text.startswith("# mismatch: a b\n")
    names: dict[str, Any] = {"__name__": "read"}
    exec(text, names)
    assert names["ENGINE"] == engine
    assert names["REQUESTS"] == requests
    assert literal(Request([1], {})) == "Request(prompt=[1], params={})"


def _changed(**changes: Any) -> dict[str, Any]:
    output = {**ANSWER["outputs"][0], **changes}
    return {**ANSWER, "outputs": {0: output}}


@pytest.mark.parametrize(
    ("answer", "sentence", "token"),
    [
        (ANSWER, None, None),
        (
            _changed(token_ids=[4, 7, 6]),
            "completion 0 parts at token 1: [5, 6] and [7, 6]",
            (0, 1),
        ),
        (_changed(token_ids=[4, 5]), "parts at token 2: [6] and []", (0, 2)),
        (_changed(text="abd"), "text: 'abc' and 'abd'", None),
        (_changed(finish_reason="stop"), "finish_reason: 'length' and 'stop'", None),
        (_changed(stop_reason=6), "stop_reason: None and 6", None),
        (_changed(cumulative_logprob=-3.6), "cumulative_logprob: -3.5 and", None),
        (_changed(logprobs=None), "logprobs: 3 and None positions", None),
        (
            _changed(logprobs=[{4: (-1.1, 1)}, *ANSWER["outputs"][0]["logprobs"][1:]]),
            "logprobs at 0: token 4: -1.0 and -1.1",
            None,
        ),
        (
            _changed(
                logprobs=[{4: (-1.0, 1)}, {5: (-2.0, 1), 8: (-2.6, 2)}, {6: (-0.5, 1)}]
            ),
            "is only in one of them",
            None,
        ),
        ({**ANSWER, "error": "ValueError: no"}, "AdaDecode ValueError: no", None),
        ({**ANSWER, "outputs": {}}, "completion 0: {", None),
        (
            {**ANSWER, "prompt_logprobs": [None, {3: (-1.0, 1)}]},
            "prompt_logprobs: True and False",
            None,
        ),
    ],
)
def test_what_differs_is_said(
    answer: dict[str, Any], sentence: str | None, token: tuple[int, int] | None
) -> None:
    found = differences(REQUESTS[:1], [ANSWER], [answer])
    if sentence is None:
        assert found == []
        return
    assert len(found) == 1
    assert sentence in found[0].sentence
    assert found[0].token == token


def test_what_may_differ_is_let_pass() -> None:
    logprobs = [
        {token: (value + TOLERANCE / 2, rank) for token, (value, rank) in entry.items()}
        for entry in ANSWER["outputs"][0]["logprobs"]
    ]
    # The last place of a ranking, shared by two tokens.
    logprobs[1][8] = (logprobs[1].pop(9)[0], 2)
    for answer in (
        _changed(logprobs=logprobs),
        {**_changed(token_ids=[4, 5], logprobs=logprobs[:2]), "aborted": True},
    ):
        assert differences(REQUESTS[:1], [ANSWER], [answer]) == []
    refused = {**ANSWER, "error": "ValueError: no"}
    assert differences(REQUESTS[:1], [refused], [refused]) == []
    aborted = {**_changed(token_ids=[4, 7], logprobs=logprobs[:2]), "aborted": True}
    assert len(differences(REQUESTS[:1], [ANSWER], [aborted])) == 1


def test_a_failure_shrinks_to_what_it_needs() -> None:
    """Here: two requests of a prompt, one of them penalized, and a cap above 2."""
    engine = Engine(
        arguments={"max_model_len": 96, "block_size": 32, "max_num_seqs": 8},
        adadecode={"threshold": 0.0, "max_early_predictions": 12},
    )
    requests = [
        Request(
            [7] * 40,
            {**PLAIN, "repetition_penalty": 1.2, "stop": ["a"], "logprobs": 2},
            arrives=number,
            priority=number,
            abort_after=5,
        )
        for number in range(12)
    ]
    tried = 0

    def fails(engine: Engine, requests: list[Request]) -> bool:
        nonlocal tried
        tried += 1
        return (
            engine.adadecode.get("max_early_predictions", 5) > 2
            and len(requests) > 1
            and any("repetition_penalty" in one.params for one in requests)
            and all(len(one.prompt) > 32 for one in requests)
        )

    smaller, few = shrink(engine, requests, fails, seconds=60)
    assert smaller.arguments == {"max_model_len": 96, "block_size": 32}
    assert smaller.adadecode == {}
    assert len(few) == 2
    assert {len(request.prompt) for request in few} == {33}
    assert sum(len(request.params) for request in few) == 5
    assert not any(one.arrives or one.priority or one.abort_after for one in few)
    assert all(request.params["max_tokens"] == 1 for request in few)
    assert tried < 200


def test_shrinking_stops_in_time() -> None:
    begun = time.monotonic()

    def slow(engine: Engine, requests: list[Request]) -> bool:
        time.sleep(0.05)
        return True

    shrink(Engine(), REQUESTS * 20, slow, seconds=0.2)
    assert time.monotonic() - begun < 2


class _StuckCore:
    """An engine with a request that is never scheduled."""

    def __init__(self, tokens: int) -> None:
        self.scheduler = SimpleNamespace(
            schedule=lambda: SimpleNamespace(total_num_scheduled_tokens=tokens),
            get_request_counts=lambda: (0, 1),
            requests={},
        )
        self.engine_core = SimpleNamespace(
            engine_core=SimpleNamespace(scheduler=self.scheduler)
        )

    def reset_prefix_cache(self) -> None:
        pass

    def add_request(self, *args: Any, **kwargs: Any) -> None:
        pass

    def has_unfinished_requests(self) -> bool:
        return True

    def step(self) -> list[Any]:
        self.scheduler.schedule()
        return []


@pytest.mark.parametrize(
    ("tokens", "steps"), [(0, drive.IDLE_STEPS), (3, drive.TOKENLESS_STEPS)]
)
def test_a_hang_is_noticed(
    tokens: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = SimpleNamespace(open=lambda: None, counts={})
    monkeypatch.setattr(drive, "Books", lambda llm: books)
    driver = drive.Driver(SimpleNamespace(llm_engine=_StuckCore(tokens)))
    found = driver.run(REQUESTS[:1])
    kind, sentence = found["failure"]
    assert kind == "hang", sentence
    assert "running and waiting: (0, 1)" in sentence
    assert found["counts"]["steps"] == steps + 1


def test_a_grammar_that_nobody_looks_at_is_a_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drive, "GRAMMAR_SECONDS", 0.05)
    core = _StuckCore(0)
    waits = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    core.scheduler.requests["1"] = SimpleNamespace(status=waits)
    books = SimpleNamespace(open=lambda: None, counts={})
    monkeypatch.setattr(drive, "Books", lambda llm: books)
    found = drive.Driver(SimpleNamespace(llm_engine=core)).run(REQUESTS[:1])
    assert found["failure"][0] == "hang"


def test_a_report_tells_what_happened() -> None:
    report = Report(3, Engine(), cases=20)
    report.counts.update(draft_tokens=9, accepted=4, preemptions=1)
    assert report.line() == (
        "seed 3 v1: 20 cases, 0 mismatches, 0 hangs, 0 deaths; 9 drafts, 4 accepted, "
        "1 preemptions, 0 s"
    )
    report.failures.append((0, Failure("hang", ["h"])))
    report.ties = 1
    assert "20 cases, 0 mismatches, 1 hangs, 0 deaths, 1 ties;" in report.line()
    assert report.to_dict()["failures"] == [
        {"stream": 0, "kind": "hang", "found": ["h"]}
    ]
    assert replace(report, refused="no").line() == "seed 3 v1: refused: no"


def test_a_crash_is_told_by_its_stack() -> None:
    log = (
        "noise\nfree(): invalid size\nFatal Python error: Aborted\n\nThread 1:\n"
        "  File x\n\nExtension modules: numpy and many more\n"
    )
    assert last_words(log) == (
        "free(): invalid size\nFatal Python error: Aborted\n\nThread 1:\n  File x\n\n"
    )
    assert last_words("x" * 3000) == "x" * 1000
