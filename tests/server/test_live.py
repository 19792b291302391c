# SPDX-License-Identifier: Apache-2.0
"""The page `/adadecode` of a real server, and what each response says of itself."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import open_page
from tests.harness import MODEL, demo_corpus
from tests.server_process import PLUGIN, Server, live_page, serve

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return demo_corpus().heldout_problems(6)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("live") / "log"
    with (
        live_page(),
        serve(
            log,
            *PLUGIN,
            '--adadecode-config={"threshold": 0.5}',
            "--per-request-spec-decode-metrics=summary",
        ) as server,
    ):
        yield server


def complete(server: Server, prompt: str, **options: Any) -> dict[str, Any]:
    """The whole answer; the OpenAI client would drop what it does not know."""
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 48}
    return _post(server, "/v1/completions", {**body, **options})


def _post(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server.url}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def listed(server: Server, response_id: str) -> dict[str, Any]:
    """A request on the page's list, found by the id in its response."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for request in server.get_json("/adadecode/stats")["requests"]:
            if request["id"].startswith(response_id):
                return request
        time.sleep(0.2)
    raise AssertionError(f"{response_id} is not listed")


@pytest.mark.feature("metrics of a request", "supported")
def test_a_response_tells_its_early_predictions(
    server: Server, prompts: list[str]
) -> None:
    """In vLLM's own place; the sum is what its counters say."""
    name = "vllm:spec_decode_num_accepted_tokens_total"
    before = server.metric(name)
    answers = [complete(server, prompt) for prompt in prompts]
    metrics = [answer["metrics"]["speculative_decoding"] for answer in answers]
    accepted = [own["num_accepted_draft_tokens"] for own in metrics]
    assert sum(accepted) == server.metric(name) - before > 0
    for answer, own in zip(answers, metrics, strict=True):
        tokens = answer["usage"]["completion_tokens"]
        # Each step yields what it accepted and one more token.
        assert 0 <= own["num_accepted_draft_tokens"] <= own["num_draft_tokens"]
        assert own["num_accepted_draft_tokens"] < tokens + own["num_spec_tokens"]


@pytest.mark.feature("metrics of a request", "supported")
def test_chat_and_streams_tell_it_as_well(server: Server) -> None:
    question = [{"role": "user", "content": "Tom has 3 apples and buys 4 apples."}]
    body = {"model": MODEL, "messages": question, "temperature": 0, "max_tokens": 24}
    answer = _post(server, "/v1/chat/completions", body)
    told = answer["metrics"]["speculative_decoding"]
    assert told["num_draft_tokens"] > 0
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(streamed).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as stream:
        lines = [line.decode() for line in stream if line.startswith(b"data: {")]
    last = json.loads(lines[-1].removeprefix("data: "))
    assert last["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]
    # Without the steps one by one, which are for `detailed`.
    given = {name: value for name, value in told.items() if value is not None}
    assert last["metrics"]["speculative_decoding"] == given


@pytest.mark.feature("live page", "supported")
def test_the_list_agrees_with_the_responses(server: Server, prompts: list[str]) -> None:
    answers = [complete(server, prompt) for prompt in prompts]
    off = {"vllm_xargs": {"adadecode_enabled": "false"}}
    answers.append(complete(server, prompts[0], **off))
    for answer in answers:
        request = listed(server, answer["id"])
        told = answer["metrics"]["speculative_decoding"]
        tokens = answer["usage"]["completion_tokens"]
        assert request["tokens"] == tokens
        assert request["prompt_tokens"] == answer["usage"]["prompt_tokens"]
        assert request["reason"] == answer["choices"][0]["finish_reason"]
        assert request["drafted"] == told["num_draft_tokens"]
        expected = min(told["num_accepted_draft_tokens"], tokens)
        assert request["accepted"] == expected
        assert request["accepted_share"] == pytest.approx(expected / tokens)
        assert 0 < request["seconds"] < 120
    assert listed(server, answers[0]["id"])["accepted"] > 0
    assert listed(server, answers[-1]["id"])["drafted"] == 0


@pytest.mark.feature("live page", "supported")
def test_the_figures_are_those_of_the_metrics(
    server: Server, prompts: list[str]
) -> None:
    server.get_json("/adadecode/stats")
    before = server.metric("vllm:adadecode_generated_tokens_total")
    time.sleep(0.6)  # readings that are kept lie that far apart
    complete(server, prompts[1])
    stats = server.get_json("/adadecode/stats")
    whole, lately = stats["since_start"], stats["lately"]

    def metric(name: str, **labels: str) -> float:
        return server.metric(f"vllm:adadecode_{name}_total", **labels)

    assert whole["generated_tokens"] == metric("generated_tokens")
    for exit_ in whole["exits"]:
        layer = str(exit_["layer"])
        assert exit_["accepted"] == metric("accepted_tokens", exit_layer=layer)
        assert exit_["asked"] == metric("gate_checks", exit_layer=layer)
    assert [exit_["layer"] for exit_ in whole["exits"]] == [2, 4, 8]
    assert lately["generated_tokens"] >= whole["generated_tokens"] - before > 0
    assert 0 < lately["seconds"] < 60
    assert 1 < lately["tokens_per_forward"] <= 9
    assert 0 < lately["estimated_ratio"] < lately["tokens_per_forward"]
    assert stats["options"]["threshold"] == 0.5
    assert (stats["api_servers"], stats["layers"], stats["model"]) == (1, 16, [MODEL])


@pytest.mark.feature("live page", "supported")
def test_the_page_in_a_browser(
    server: Server, prompts: list[str], tmp_path: Path
) -> None:
    """It draws what the server counted, and breaks none of its own rules."""
    server.get_json("/adadecode/stats")  # the first reading: what follows is lately
    evil = "<img src=x onerror=alert(1)>"
    name = complete(server, prompts[2], request_id=evil)["id"]
    assert evil in name
    complete(server, prompts[3])
    document, console = open_page(
        f"{server.url}/adadecode", tmp_path / "profile", milliseconds=5000
    )
    assert console == []
    stats = server.get_json("/adadecode/stats")
    main = re.search(r"<main.*?</main>", document, re.DOTALL)
    assert main is not None
    assert "hidden" not in main[0].split(">")[0]
    content = main[0]
    forward = stats["since_start"]["tokens_per_forward"]
    assert f"{forward:.2f} since the start" in content
    for exit_ in stats["since_start"]["exits"]:
        assert f"<td>{exit_['accepted']:,}</td>" in content
    rows = re.findall(r"<tr>", content[content.index('id="requests"') :])
    assert len(rows) == len(stats["requests"])
    # What a client sent is text, however it reads.
    assert "&lt;img src=x onerror=alert(1)&gt;" in content
    assert "<img" not in document
    # Two readings at least, so the curve has points.
    (points,) = re.findall(r'<polyline points="([^"]*)"', document)
    assert len(points.split()) >= 2


@pytest.mark.slow  # a server of its own for one sentence
def test_a_server_without_the_plugin_says_so(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    log = tmp_path_factory.mktemp("plain") / "log"
    with live_page(), serve(log) as server:
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.get_json("/adadecode/stats")
        assert caught.value.code == 404
        assert "started without --plugin adadecode" in caught.value.read().decode()
        document, _ = open_page(
            f"{server.url}/adadecode", tmp_path / "profile", milliseconds=3000
        )
    assert re.search(r'id="problem" role="alert">This server was started', document)
