# SPDX-License-Identifier: Apache-2.0
"""`adadecode stats`: addresses, counters in the terminal, and no answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import BaseRequestHandler, TCPServer
from threading import Thread
from typing import Any

import pytest

from adadecode_vllm.config import CONFIG_KEY
from adadecode_vllm.engine.metric_loggers import AdaDecodeProm
from adadecode_vllm.engine.metric_names import PREFIX
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.method.ledger import REASONS
from adadecode_vllm.method.stats import Stats
from adadecode_vllm.toolkit.stats.snapshot import metrics_url, parse
from tests.command import run
from tests.exported_counters import EXITS, OPTIONS, exported


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("localhost:8000", "http://localhost:8000/metrics"),
        ("http://localhost:8000/", "http://localhost:8000/metrics"),
        ("http://localhost:8000/metrics", "http://localhost:8000/metrics"),
        ("https://host/behind/v1", "https://host/behind/metrics"),
        ("http://[::1]:80/?q=1#f", "http://[::1]:80/metrics"),
    ],
)
def test_addresses(given: str, address: str) -> None:
    assert metrics_url(given) == address


@pytest.mark.parametrize(
    "given", ["", "file:///etc/passwd", "ftp://host", "http://", "http://[::1:8000"]
)
def test_no_addresses(given: str) -> None:
    with pytest.raises(AdaDecodeError, match="not the address of a server"):
        metrics_url(given)


@pytest.fixture
def answering() -> Iterator[Callable[[int, str], str]]:
    """Start a server that always answers the same; returns its address."""
    servers: list[HTTPServer] = []

    def start(status: int, text: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_stats_of_an_engine_that_drafts_by_costs(
    prom: Callable[..., AdaDecodeProm],
    answering: Callable[[int, str], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader = prom({**OPTIONS, "policy": "cost", "ngram": "chain"})
    reader.observe({CONFIG_KEY: [*Stats(EXITS, 8).reported(), *(0.0 for _ in REASONS)]})
    assert run("stats", answering(200, exported()), "--once") == 0
    output = capsys.readouterr().out
    assert "policy cost, ngram chain, max_early_predictions " in output
    assert "threshold" not in output


def test_stats_once(
    prom: Callable[..., AdaDecodeProm],
    answering: Callable[[int, str], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader = prom({**OPTIONS, "max_early_predictions": 4})
    stats = Stats(EXITS, 8)
    stats.gates[:] = [2000, 500]
    stats.early_predictions[:] = [1500, 100]
    stats.accepted[:] = [1330, 50]
    stats.rejected[:] = [70, 50]
    stats.request_steps, stats.generated_tokens = 1000, 2380
    stats.drafting_seconds = 1.25
    dropped = [12.0 if reason == "not_scheduled" else 0.0 for reason in REASONS]
    reader.observe({CONFIG_KEY: [*stats.reported().tolist(), *dropped]})
    assert run("stats", answering(200, exported()), "--once") == 0
    output = capsys.readouterr().out
    rows = [re.findall(r"[\d.,]+(?: %)?", line) for line in output.splitlines()]
    assert ["2", "2,000", "1,500", "75.0 %", "1,330", "70", "95.0 %"] in rows
    assert ["4", "500", "100", "20.0 %", "50", "50", "50.0 %"] in rows
    assert "threshold 0.5, gate " in output
    assert "max_early_predictions 4" in output
    assert re.search(r"tokens per target forward +2\.38", output)
    assert re.search(r"drafting +1\.2 s", output)
    assert re.search(r"dropped, not scheduled +12 tokens", output)
    assert "skipped step" not in output


@pytest.mark.parametrize(
    ("status", "text", "sentence"),
    [
        (404, "", "the server answers 404"),
        (200, "# HELP x y\nx 1\n", "AdaDecode's metrics are not there"),
        (200, "<html>hello</html>", "not in Prometheus's text format"),
    ],
)
def test_stats_of_something_else(
    answering: Callable[[int, str], str],
    capsys: pytest.CaptureFixture[str],
    status: int,
    text: str,
    sentence: str,
) -> None:
    assert run("stats", answering(status, text), "--once") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: URL http://127.0.0.1:")
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "BadStatusLine("),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nvllm", "IncompleteRead("),
    ],
)
def test_stats_of_what_is_not_a_whole_answer(
    capsys: pytest.CaptureFixture[str], answer: bytes, reason: str
) -> None:
    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(answer)

    with TCPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        assert run("stats", f"127.0.0.1:{server.server_address[1]}", "--once") == 2
        server.shutdown()
    error = capsys.readouterr().err
    assert f": no whole answer ({reason}" in error
    assert error.endswith("Start the server again, or correct the address.\n")
    assert error.count("\n") == 1


def test_stats_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats", "http://127.0.0.1:9", "--once") == 2
    assert "no answer" in capsys.readouterr().err


def test_a_server_that_restarted_is_noticed() -> None:
    def snapshot(time: float, steps: float) -> Any:
        text = (
            f'{PREFIX}accepted_tokens_total{{exit_layer="2"}} {steps}\n'
            f"{PREFIX}target_forwards_total {steps}\n"
        )
        return parse(text, time, "here")

    lately = snapshot(5.0, 8.0).since(snapshot(3.0, 6.0))
    assert (lately.time, lately.counted.totals["request_steps"]) == (2.0, 2.0)
    assert lately.counted.per_exit[2]["accepted"] == 2.0
    assert not lately.counted.restarted
    assert snapshot(5.0, 1.0).since(snapshot(3.0, 6.0)).counted.restarted
