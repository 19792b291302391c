# SPDX-License-Identifier: Apache-2.0
"""A real server, a real client."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.harness import HEADS, MODEL, demo_corpus

VLLM = str(Path(sys.executable).with_name("vllm"))
PLUGIN = ["--plugin", "adadecode", "--adadecode-heads", HEADS]
ENGINE = [
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=256",
    "--kv-cache-memory-bytes=67108864",
]

pytestmark = pytest.mark.server


class Server:
    """`vllm serve` on a free port of this machine."""

    def __init__(self, log: Path, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [
                    VLLM,
                    "serve",
                    MODEL,
                    *ENGINE,
                    *arguments,
                    "--host=127.0.0.1",
                    f"--port={port}",
                ],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},
            )
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120)

    def wait(self, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                pytest.fail(f"the server ended:\n{self.log.read_text()[-4000:]}")
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
            except OSError:
                time.sleep(0.5)
            else:
                return
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        values = re.findall(rf"^{re.escape(name)}\{{.*\}} (\S+)$", text, re.MULTILINE)
        assert values, f"{name} is not among the metrics"
        return sum(map(float, values))

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return demo_corpus().heldout_problems(16)


def _complete(client: OpenAI, prompt: str, **options: Any) -> str:
    answer = client.completions.create(
        model=MODEL, prompt=prompt, temperature=0, max_tokens=64, **options
    )
    return answer.choices[0].text


def _complete_all(client: OpenAI, prompts: list[str]) -> list[str]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: _complete(client, prompt), prompts))


@pytest.fixture(scope="module")
def expected(prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Texts of an ordinary server: the plugin is installed but not asked for."""
    server = Server(tmp_path_factory.mktemp("ordinary") / "log")
    try:
        server.wait()
        return _complete_all(server.client, prompts)
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(
    expected: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    server = Server(
        tmp_path_factory.mktemp("adadecode") / "log",
        *PLUGIN,
        '--adadecode-config={"threshold": 0.5}',
    )
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def test_sixteen_concurrent_clients_get_ordinary_texts(
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


def test_streaming(server: Server, prompts: list[str], expected: list[str]) -> None:
    for prompt, text in zip(prompts[:4], expected, strict=False):
        chunks = server.client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=64, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_chat(server: Server) -> None:
    answer = server.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tom has 3 apples and buys 4 apples."}],
        temperature=0,
        max_tokens=24,
    )
    assert answer.choices[0].message.content


def test_options_of_a_request(
    server: Server, prompts: list[str], expected: list[str]
) -> None:
    """Honoured per request; a bad one is answered 400 and touches no other."""
    accepted = "vllm:spec_decode_num_accepted_tokens_total"
    before = server.metric(accepted)
    off = {"vllm_xargs": {"adadecode_enabled": "false"}}
    assert _complete(server.client, prompts[0], extra_body=off) == expected[0]
    assert server.metric(accepted) == before
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(_complete, server.client, p) for p in prompts[1:4]]
        bad = {"vllm_xargs": {"adadecode_threshold": 1.5}}
        with pytest.raises(BadRequestError) as caught:
            _complete(server.client, prompts[0], extra_body=bad)
        assert [future.result() for future in good] == expected[1:4]
    assert caught.value.status_code == 400
    assert "adadecode_threshold = 1.5 is refused" in str(caught.value)
    assert server.metric(accepted) > before


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
            pool.map(lambda prompt: _complete(server.client, prompt), prompts[:8])
        )
        for future in aborted:
            future.result()
    assert texts == expected[:8]
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") > 0:
        assert time.monotonic() < end, "aborted requests go on running"
        time.sleep(0.2)
    assert _complete(server.client, prompts[9]) == expected[9]


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
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Throughput:" in result.stdout
    assert "AdaDecodeProposer" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--plugin", "adadecode"], "--adadecode-heads: no exit heads given."),
        (["--adadecode-heads", HEADS], "--adadecode-heads: it has no effect without"),
        ([*PLUGIN, "--adadecode-config", "{"], "--adadecode-config: '{' is not JSON"),
        ([*PLUGIN, "--enable-lora"], "--enable-lora: not with AdaDecode"),
    ],
)
def test_a_mistake_ends_with_one_sentence(arguments: list[str], sentence: str) -> None:
    result = subprocess.run(
        [VLLM, "serve", MODEL, *ENGINE, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    assert f"vllm: error: {sentence}" in result.stderr
    assert "Traceback" not in result.stderr
