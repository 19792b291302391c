# SPDX-License-Identifier: Apache-2.0
"""What only a server has: several processes, several engines, tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.harness import MODEL, demo_corpus
from tests.server_process import PLUGIN, Server, complete, live_page, serve

# Three servers. Metrics and refusals of one process are in test_server.py, texts that
# follow a schema in tests/engine/test_structured_output.py.
pytestmark = [pytest.mark.server, pytest.mark.slow]

TOOLS = [
    "--enable-auto-tool-choice",
    "--tool-call-parser=pythonic",
    # A model that was never taught tools would go on with blanks for ever.
    "--structured-outputs-config.backend=xgrammar",
    "--structured-outputs-config.disable_any_whitespace=true",
]
CONFIG = '--adadecode-config={"threshold": 0.3}'
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add_fruit",
        "description": "Adds fruit to the basket.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "fruit": {"type": "string", "enum": ["apples", "bananas", "cherries"]},
                "ripe": {"type": "boolean"},
            },
            "required": ["fruit", "ripe"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "add_fruit"}}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return demo_corpus().heldout_problems(16)


def _complete_all(server: Server, prompts: list[str]) -> list[str]:
    def one(prompt: str) -> str:
        # A client of its own opens a connection of its own, which may reach any of
        # the server's processes.
        with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return complete(client, prompt)

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts))


def _call_tool(server: Server, problem: str) -> list[tuple[str, str]]:
    answer = server.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": problem}],
        tools=[TOOL],  # type: ignore[list-item]
        tool_choice=NAMED,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=100,
    )
    calls = answer.choices[0].message.tool_calls or []
    return [(call.function.name, call.function.arguments) for call in calls]  # type: ignore[union-attr]


Expected = tuple[list[str], list[list[tuple[str, str]]]]


@pytest.fixture(scope="module")
def expected(prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """Texts and tool calls of an ordinary server."""
    with serve(tmp_path_factory.mktemp("plain") / "log", *TOOLS) as server:
        calls = [_call_tool(server, prompt) for prompt in prompts[:4]]
        return _complete_all(server, prompts), calls


@pytest.fixture(scope="module")
def two_processes(
    expected: Expected, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("processes") / "log"
    with (
        live_page(),
        serve(log, *PLUGIN, CONFIG, *TOOLS, "--api-server-count=2") as server,
    ):
        yield server


@pytest.mark.feature("several API processes", "supported")
def test_several_api_processes(
    two_processes: Server, prompts: list[str], expected: Expected
) -> None:
    assert _complete_all(two_processes, prompts) == expected[0]
    # Each process shows what it saw and what the others did.
    counts = [
        two_processes.metric(f"vllm:adadecode_{name}_tokens_total")
        for name in ("accepted", "rejected", "generated")
    ]
    assert min(counts) > 0
    assert counts[2] > sum(map(len, expected[0])) / 8
    log = two_processes.log.read_text()
    assert "ApiServer_0" in log
    assert "ApiServer_1" in log


@pytest.mark.feature("live page", "supported")
def test_the_live_page_of_several_processes(
    two_processes: Server, prompts: list[str], expected: Expected
) -> None:
    """Counters are of all processes, requests of the one that answers."""
    assert _complete_all(two_processes, prompts) == expected[0]
    requests: dict[int, list[str]] = {}
    for _ in range(40):  # each over a connection of its own
        stats = two_processes.get_json("/adadecode/stats")
        requests[stats["process"]] = [own["id"] for own in stats["requests"]]
        accepted = two_processes.metric("vllm:adadecode_accepted_tokens_total")
        assert stats["since_start"]["accepted"] == accepted
        assert stats["api_servers"] == 2
        if len(requests) == 2:
            break
    one, other = requests.values()
    assert not set(one) & set(other)
    assert len(one) + len(other) >= len(prompts)


@pytest.mark.feature("several API processes", "supported")
def test_every_process_refuses_a_bad_option(
    two_processes: Server, prompts: list[str], expected: Expected
) -> None:
    """Each validates, whichever a connection reaches."""
    bad = {"vllm_xargs": {"adadecode_threshold": 1.5}}
    for _ in range(12):
        with (
            OpenAI(base_url=f"{two_processes.url}/v1", api_key="none") as client,
            pytest.raises(BadRequestError, match="adadecode_threshold = 1"),
        ):
            complete(client, prompts[0], extra_body=bad)
    assert complete(two_processes.client, prompts[0]) == expected[0][0]


@pytest.mark.feature("tool calls", "supported")
def test_tool_calls(
    two_processes: Server, prompts: list[str], expected: Expected
) -> None:
    """Forced by the request, so that also this small model makes valid ones."""
    before = two_processes.metric("vllm:adadecode_accepted_tokens_total")
    calls = [_call_tool(two_processes, prompt) for prompt in prompts[:4]]
    assert calls == expected[1]
    assert two_processes.metric("vllm:adadecode_accepted_tokens_total") > before
    for ((name, arguments),) in calls:
        assert name == "add_fruit"
        assert json.loads(arguments).keys() == {"fruit", "ripe"}


@pytest.mark.feature("data parallel", "supported")
def test_data_parallel(
    prompts: list[str],
    expected: Expected,
    tmp_path_factory: pytest.TempPathFactory,
    a_core_each: None,
) -> None:
    """Every engine predicts early on its own and counts under its own label."""
    log = tmp_path_factory.mktemp("engines") / "log"
    with serve(log, *PLUGIN, CONFIG, "--data-parallel-size=2") as server:
        assert _complete_all(server, prompts) == expected[0]
        for engine in ("0", "1"):
            for name in ("accepted", "rejected"):
                metric = f"vllm:adadecode_{name}_tokens_total"
                assert server.metric(metric, engine=engine) > 0
