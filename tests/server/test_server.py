# SPDX-License-Identifier: Apache-2.0
"""A real server, a real client."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.harness import HEADS, MODEL, ROOT, baseline_texts, demo_corpus
from tests.server_process import ENGINE, PLUGIN, VLLM, Server, complete, serve

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return demo_corpus().heldout_problems(16)


def _complete_all(client: OpenAI, prompts: list[str]) -> list[str]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: complete(client, prompt), prompts))


@pytest.fixture(scope="module")
def expected(prompts: list[str]) -> list[str]:
    """Plain vLLM's texts."""
    return baseline_texts(prompts, max_tokens=64)


@pytest.fixture(scope="module")
def server(
    expected: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serve(
        tmp_path_factory.mktemp("adadecode") / "log",
        *PLUGIN,
        '--adadecode-config={"threshold": 0.5}',
    ) as server:
        yield server


def test_sixteen_concurrent_clients_get_baseline_texts(
    server: Server, prompts: list[str], expected: list[str]
) -> None:
    counters = [
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
    ]
    before = [server.metric(counter) for counter in counters]
    assert _complete_all(server.client, prompts) == expected
    after = [server.metric(counter) for counter in counters]
    assert all(new > old for new, old in zip(after, before, strict=True))
    accepted, drafted = after[2] - before[2], after[1] - before[1]
    assert accepted < drafted, "no early prediction was rejected"


@pytest.mark.feature("metrics", "supported")
def test_metrics_by_exit(server: Server, prompts: list[str]) -> None:
    """The server's own `/metrics` tells the exits apart, and agrees with vLLM's."""
    ours = [
        f"vllm:adadecode_{name}_total"
        for name in ("accepted_tokens", "rejected_tokens")
    ]
    theirs = "vllm:spec_decode_num_accepted_tokens_total"
    before = [server.metric(name) for name in (*ours, theirs)]
    _complete_all(server.client, prompts)
    accepted, rejected, counted = (
        server.metric(name) - value
        for name, value in zip((*ours, theirs), before, strict=True)
    )
    assert rejected > 0
    # vLLM does not count what follows the end of a text.
    assert 0 < counted <= accepted < 1.1 * counted
    for layer in ("2", "4", "8"):
        assert server.metric("vllm:adadecode_gate_checks_total", exit_layer=layer) > 0
    forwards = server.metric("vllm:adadecode_target_forwards_total")
    assert server.metric("vllm:adadecode_generated_tokens_total") > 1.5 * forwards
    assert server.metric("vllm:adadecode_draft_seconds_total") > 0
    assert server.metric("vllm:adadecode_config_info", threshold="0.5") == 1


def test_the_dashboard_finds_all_its_metrics(server: Server) -> None:
    dashboard = (ROOT / "examples" / "grafana" / "adadecode.json").read_text()
    queried = set(re.findall(r"vllm:\w+", dashboard))
    assert len(queried) > 10
    for name in queried:
        server.metric(name)  # fails where there is none


def test_stats_in_the_terminal(server: Server) -> None:
    command = [Path(sys.executable).with_name("adadecode"), "stats", server.url]
    table = subprocess.run(
        [*command, "--once"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert (
        "threshold 0.5, gate probability, ngram off, max_early_predictions 8" in table
    )
    accepted = server.metric("vllm:adadecode_accepted_tokens_total", exit_layer="2")
    assert re.search(rf"2 │.* {int(accepted):,} │", table), table
    ours, theirs = os.openpty()
    live = subprocess.Popen([*command, "--interval=0.2"], stdout=theirs)
    os.close(theirs)
    seen = b""
    while b"last 0." not in seen:  # the second reading
        seen += os.read(ours, 1 << 16)
    live.send_signal(signal.SIGINT)
    with suppress(OSError):  # a terminal that nobody writes to any longer
        while os.read(ours, 1 << 16):
            pass  # or it would wait for room to write its last table
    assert live.wait(timeout=30) == 0
    os.close(ours)


@pytest.mark.feature("streaming", "supported")
def test_streaming(server: Server, prompts: list[str], expected: list[str]) -> None:
    for prompt, text in zip(prompts[:4], expected, strict=False):
        chunks = server.client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=64, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == text


@pytest.mark.feature("chat", "supported")
def test_chat(server: Server) -> None:
    answer = server.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tom has 3 apples and buys 4 apples."}],
        temperature=0,
        max_tokens=24,
    )
    assert answer.choices[0].message.content


@pytest.mark.feature("options of a request", "supported")
def test_options_of_a_request(
    server: Server, prompts: list[str], expected: list[str]
) -> None:
    """Honoured per request; a bad one is answered 400 and touches no other."""
    accepted = "vllm:spec_decode_num_accepted_tokens_total"
    before = server.metric(accepted)
    off = {"vllm_xargs": {"adadecode_enabled": "false"}}
    assert complete(server.client, prompts[0], extra_body=off) == expected[0]
    assert server.metric(accepted) == before
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(complete, server.client, p) for p in prompts[1:4]]
        bad = {"vllm_xargs": {"adadecode_threshold": 1.5}}
        with pytest.raises(BadRequestError) as caught:
            complete(server.client, prompts[0], extra_body=bad)
        assert [future.result() for future in good] == expected[1:4]
    assert caught.value.status_code == 400
    assert "adadecode_threshold = 1.5 is refused" in str(caught.value)
    assert server.metric(accepted) > before


@pytest.mark.feature("options of a request", "supported")
def test_bad_options_of_a_streamed_request(server: Server) -> None:
    """The answer is HTTP 400, and not a stream with an error in it."""
    bad = {"vllm_xargs": {"adadecode_threshold": 1.5}}
    asked: Any = {"model": MODEL, "stream": True, "extra_body": bad}
    message = [{"role": "user", "content": "Tom has 3 apples."}]
    client, refused = server.client, r"adadecode_threshold = 1\.5 is refused"
    with pytest.raises(BadRequestError, match=refused):
        client.completions.create(prompt="Tom", **asked)
    with pytest.raises(BadRequestError, match=refused):
        client.chat.completions.create(messages=message, **asked)
    with pytest.raises(BadRequestError, match=refused):
        client.responses.create(input="Tom", **asked)


@pytest.mark.feature("request abort", "supported")
def test_aborted_streams_disturb_nobody(
    server: Server, prompts: list[str], expected: list[str]
) -> None:
    def abort(prompt: str) -> None:
        stream = server.client.completions.create(
            model=MODEL,
            prompt=prompt,
            temperature=0,
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()

    with ThreadPoolExecutor(16) as pool:
        aborted = [pool.submit(abort, prompt) for prompt in prompts[8:]]
        texts = list(
            pool.map(lambda prompt: complete(server.client, prompt), prompts[:8])
        )
        for future in aborted:
            future.result()
    assert texts == expected[:8]
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") > 0:
        assert time.monotonic() < end, "aborted requests go on running"
        time.sleep(0.2)
    assert complete(server.client, prompts[9]) == expected[9]


def test_bench_throughput() -> None:
    result = subprocess.run(
        [
            *(VLLM, "bench", "throughput", "--model", MODEL, *ENGINE, *PLUGIN),
            "--dataset-name=random",
            "--random-input-len=16",
            "--random-output-len=8",
            "--num-prompts=4",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={
            **os.environ,
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Throughput:" in result.stdout
    assert "AdaDecodeProposer" in result.stdout + result.stderr


def test_a_mistake_ends_the_process_with_one_sentence() -> None:
    result = subprocess.run(
        [VLLM, "serve", MODEL, *ENGINE, "--plugin", "adadecode"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    sentence = "--adadecode-heads: no exit heads given."
    assert f"vllm: error: {sentence}" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--adadecode-heads", HEADS], "--adadecode-heads: it has no effect without"),
        ([*PLUGIN, "--adadecode-config", "{"], "--adadecode-config: '{' is not JSON"),
        ([*PLUGIN, "--enable-lora"], "--enable-lora: not with AdaDecode"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same program, in this process, which has imported vLLM already."""
    from vllm.entrypoints.cli.main import main

    monkeypatch.setattr(sys, "argv", ["vllm", "serve", MODEL, *ENGINE, *arguments])
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # main sets it, too
    # vLLM logs to the output that was there when it was imported.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert f"vllm: error: {sentence}" in errors
    assert "Traceback" not in errors
