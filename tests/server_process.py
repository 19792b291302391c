# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` on the demo model, and its clients, for tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import DefaultHttpxClient, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.harness import HEADS, MODEL

VLLM = str(Path(sys.executable).with_name("vllm"))
PLUGIN = ["--plugin", "adadecode", "--adadecode-heads", HEADS]
ENGINE = [
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=256",
    "--kv-cache-memory-bytes=67108864",
]


class Server:
    """A server on a free port of this machine, with its output in a file.

    Each process imports vLLM, which takes longer than most tests. Unless all of vLLM's
    are asked for, the engine's process has the worker in it.
    """

    def __init__(
        self,
        log: Path,
        *arguments: str,
        model: str = MODEL,
        worker_process: bool = False,
    ) -> None:
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
                    model,
                    *ENGINE,
                    *arguments,
                    "--host=127.0.0.1",
                    f"--port={port}",
                ],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "VLLM_LOGGING_LEVEL": "INFO",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(worker_process)),
                },
                # A group of its own, so that no engine process outlives its server.
                start_new_session=True,
            )
        self.client = OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            timeout=120,
            max_retries=0,
            # A connection for each request: the server closes idle ones, now and then
            # just when the next request goes out.
            http_client=DefaultHttpxClient(
                limits=httpx.Limits(max_keepalive_connections=0)
            ),
        )

    def wait(self, seconds: float = 240) -> None:
        """Return once it answers."""
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

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        values = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert values, f"{name} {labels} is not among the metrics"
        return sum(values)

    def get_json(self, path: str) -> dict[str, Any]:
        """What it answers as JSON, over a connection of its own."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return json.load(answer)

    def stop(self) -> None:
        """End it, and whatever it left behind."""
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def live_page() -> Iterator[None]:
    """Servers that start meanwhile have the page `/adadecode`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "adadecode")
        yield


@contextmanager
def serve(log: Path, *arguments: str, **options: Any) -> Iterator[Server]:
    """A server that answers, ended afterwards; see `Server` for the options."""
    server = Server(log, *arguments, **options)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def complete(client: OpenAI, prompt: str, **options: Any) -> str:
    """A greedy text of the demo model."""
    answer = client.completions.create(
        **{
            "model": MODEL,
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": 64,
            **options,
        }
    )
    return answer.choices[0].text
