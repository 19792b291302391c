# SPDX-License-Identifier: Apache-2.0
"""Processes that are killed and clients that vanish, on a real server."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from openai import APIError, InternalServerError

from adadecode_vllm.compat import installed_version
from tests.harness import MODEL
from tests.reliability.load import log_errors, server_processes
from tests.server_process import Server, complete, serve

pytestmark = pytest.mark.server
DEAD = (
    "EngineCore encountered an issue"
    if installed_version().startswith("0.32.")
    else "The server had an error while"
)
"""What clients are told of an engine that died; vLLM 0.33 has other words."""

LONG = {"temperature": 0, "max_tokens": 200}
ENDLESS = {"ignore_eos": True}
# So many that the first is not through before the worker is suspended.
MANY = {"temperature": 1, "max_tokens": 200, "n": 8}


@pytest.mark.parametrize(
    "role", ["worker", pytest.param("engine", marks=pytest.mark.slow)]
)
def test_a_killed_process_ends_the_server(
    prompts: list[str],
    expected: list[str],
    arguments: list[str],
    tmp_path: Path,
    role: str,
) -> None:
    """What an ordinary server does: all clients get errors, and it exits with 0."""
    arguments = [*arguments, "--enable-server-load-tracking"]
    with serve(tmp_path / "log", *arguments, worker_process=True) as server:
        assert _texts(server, prompts) == expected
        processes = server_processes(server)
        _kill_while_they_wait(processes["worker"], processes[role], server, prompts)
        assert server.process.wait(timeout=60) == 0
        left = [process for name, process in processes.items() if name != "server"]
        _, alive = psutil.wait_procs(left, timeout=60)
        assert alive == [], "the server left processes behind"


@pytest.mark.parametrize("midway", [True, False])
def test_vanished_clients_disturb_nobody(
    server: Server, prompts: list[str], expected: list[str], midway: bool
) -> None:
    finished = server.metric("vllm:request_success_total")
    with ThreadPoolExecutor(16) as pool:
        gone = [pool.submit(_vanish, server, prompt, midway) for prompt in prompts]
        texts = pool.map(lambda prompt: complete(server.client, prompt), prompts)
        assert list(texts) == expected
        for future in gone:
            future.result()
    _wait_until_idle(server)
    # vLLM does not count aborted ones.
    others = server.metric("vllm:request_success_total") - finished
    assert others == len(prompts) + 1, "a request of a vanished client went on"
    assert _texts(server, prompts) == expected
    assert log_errors(server.log) == []


def _texts(server: Server, prompts: list[str]) -> list[str]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda p: complete(server.client, p), prompts))


def _kill_while_they_wait(
    worker: psutil.Process, process: psutil.Process, server: Server, prompts: list[str]
) -> None:
    """Kill a process while a stream flows and others wait; each client must be told."""
    flows = threading.Event()

    def read(prompt: str) -> None:
        for _ in server.client.completions.create(
            model=MODEL, prompt=prompt, stream=True, **MANY, extra_body=ENDLESS
        ):
            flows.set()

    def stream(prompt: str) -> None:
        with pytest.raises(APIError, match=DEAD):
            read(prompt)

    def wait(prompt: str) -> None:
        with pytest.raises(InternalServerError, match=DEAD):
            complete(server.client, prompt, **MANY, extra_body=ENDLESS)

    with ThreadPoolExecutor(len(prompts)) as pool:
        clients = [pool.submit(stream, prompts[0])]
        assert flows.wait(timeout=60), "a stream does not flow"
        # However slow this machine is, nobody is through before the kill.
        worker.suspend()
        clients += [pool.submit(wait, prompt) for prompt in prompts[1:3]]
        clients += [pool.submit(stream, prompt) for prompt in prompts[3:]]
        end = time.monotonic() + 60
        while server.get_json("/load")["server_load"] < len(prompts):
            assert time.monotonic() < end, "requests do not arrive"
            time.sleep(0.1)
        process.kill()
        if process != worker:
            worker.resume()
        for client in clients:
            client.result(timeout=60)


def _vanish(server: Server, prompt: str, midway: bool) -> None:
    """Ask for a stream and drop the connection without a word."""
    body = json.dumps(
        {"model": MODEL, "prompt": prompt, "stream": True, **LONG, **ENDLESS}
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        # Closing then resets the connection, as a client's crash or network does.
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.settimeout(60)
        connection.sendall(head.encode() + body)
        received = b""
        while (b"data:" if midway else b"200 OK") not in received:
            received += connection.recv(4096)


def _wait_until_idle(server: Server) -> None:
    # Gauges are as old as the last step; an abort in an idle engine takes none.
    complete(server.client, "Problem:", max_tokens=1)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    end = time.monotonic() + 60
    while any(server.metric(f"vllm:{name}") for name in names):
        assert time.monotonic() < end, "requests of vanished clients go on"
        time.sleep(0.2)
