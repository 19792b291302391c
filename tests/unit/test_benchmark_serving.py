# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark without servers: what the client found, turns, failures."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from adadecode_vllm.errors import AdaDecodeError
from benchmarks import benchmark_serving
from benchmarks import server as server_module
from benchmarks.benchmark_serving import ServingSession, reason_not_to_serve
from benchmarks.client import Client, Load, read_client
from benchmarks.process import VariantError, log_reason
from benchmarks.result_files import read_results
from benchmarks.server import Server
from benchmarks.serving_figures import compare_texts, serving_table, summarize
from benchmarks.variants import EngineSettings, Variant, parse_variants
from tests.harness import HEADS, MODEL, ROOT
from tests.serving_benchmark import SETTINGS, WORKLOAD


def client_result(**changes: Any) -> dict[str, Any]:
    """What vLLM's client returns for three requests."""
    return {
        "duration": 2.0,
        "completed": 3,
        "failed": 0,
        "total_output_tokens": 17,
        "output_throughput": 8.5,
        "request_throughput": 1.5,
        "output_lens": [8, 1, 8],
        "ttfts": [0.2, 0.1, 0.3],
        "latencies": [0.9, 0.1, 1.7],
        "generated_texts": ["a b", "", "c"],
        "errors": ["", "", ""],
        "p50_ttft_ms": 200.0,
        **changes,
    }


def run(speed: float = 8.5, **changes: Any) -> dict[str, Any]:
    return read_client(client_result(output_throughput=speed, **changes))


class TestClientResult:
    def test_figures_by_request(self) -> None:
        found = run(spec_decode_draft_tokens=6, spec_decode_accepted_tokens=5)
        assert found["ttft_s"] == [0.2, 0.1, 0.3]
        assert found["tpot_s"] == pytest.approx([0.1, None, 0.2])
        assert found["e2el_s"] == [0.9, 0.1, 1.7]
        assert found["texts"] == ["a b", "", "c"]
        assert found["speculation"] == {"drafts": 0, "draft_tokens": 6, "accepted": 5}
        assert found["client"] == {"p50_ttft_ms": 200.0}

    def test_failed_requests_count_nowhere_but_as_failed(self) -> None:
        trace = "Traceback (most recent call last):\n  ...\nOSError: refused\n"
        found = run(
            completed=1,
            failed=2,
            ttfts=[0.2, 0.0, 0.3],
            output_lens=[8, 0, 0],
            errors=["", "", trace],
        )
        assert found["texts"] == ["a b", None, None]
        assert found["ttft_s"] == [0.2]
        assert found["tpot_s"] == pytest.approx([0.1])
        assert found["errors"] == ["OSError: refused"]
        figures = summarize([found], [run()])
        assert (figures["failed_requests"], figures["requests"]) == (2, 3)

    def test_texts_are_compared_where_both_requests_succeeded(self) -> None:
        texts = compare_texts(["a", "b", None, "d"], ["a", "x", "c", None])
        assert texts == {"same": 1, "different": 1}

    def test_ratios_are_taken_repeat_by_repeat(self) -> None:
        counts = {"spec_decode_draft_tokens": 10, "spec_decode_accepted_tokens": 8}
        runs = [run(12.0, **counts), run(30.0, **counts)]
        baseline = [run(10.0), run(20.0)]
        figures = summarize(runs, baseline)
        assert figures["ratio"] == pytest.approx(
            {"median": 1.35, "min": 1.2, "max": 1.5}
        )
        drafts = figures["drafts"]
        assert drafts["rate"] == pytest.approx(20 / 34)
        assert drafts["coverage"] == pytest.approx(16 / 34)
        assert figures["acceptance"] == drafts["acceptance"] == pytest.approx(0.8)
        assert "early_predictions" not in figures, "lookup's drafts are counted too"
        assert summarize(baseline, baseline)["drafts"] is None


class TestReason:
    def test_the_engines_own_error_and_not_the_servers(self) -> None:
        log = (
            "ValueError: No available memory for the cache blocks.\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n"
            "\n"
        )
        assert (
            log_reason(log) == "ValueError: No available memory for the cache blocks."
        )

    def test_a_refused_flag(self) -> None:
        log = "usage: vllm serve\nvllm: error: --enable-lora: not with AdaDecode\n"
        assert log_reason(log) == "vllm: error: --enable-lora: not with AdaDecode"

    def test_without_an_error_the_last_lines(self) -> None:
        lines = [f"line {number}" for number in range(30)]
        assert log_reason("\n".join(lines)) == "\n".join(lines[-20:])


class FakeProcess:
    """A server's process, which answers nothing itself."""

    pid = 0

    def __init__(self, *_: Any, env: dict[str, str], **__: Any) -> None:
        self.env = env

    def poll(self) -> None:
        """It runs."""

    def terminate(self) -> None:
        """It ends at once."""

    def wait(self, timeout: float | None = None) -> None:
        """It has ended."""


def start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    started = SimpleNamespace(**{**vars(subprocess), "Popen": FakeProcess})
    monkeypatch.setattr(server_module, "subprocess", started)
    monkeypatch.setattr(server_module.os, "killpg", lambda *_: None)


@contextmanager
def answering(worker_status: int) -> Iterator[tuple[int, list[Any]]]:
    """A server's routes: its port, and what was asked of its worker."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            asked.append((self.path, json.loads(self.rfile.read(length))))
            self.send_response(worker_status)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, asked
        server.shutdown()


@pytest.mark.parametrize(
    ("kind", "options", "forgets"),
    [
        ("adadecode", {"lookup": "suffix"}, True),
        ("adadecode", {}, False),
        ("baseline", {"lookup": "suffix"}, False),
    ],
)
def test_a_server_remembers_no_answers(
    monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any], forgets: bool
) -> None:
    start_nothing(monkeypatch)
    monkeypatch.delenv("VLLM_SERVER_DEV_MODE", raising=False)
    settings = replace(SETTINGS, adadecode=options)
    with answering(200) as (port, asked):
        monkeypatch.setattr(server_module, "_free_port", lambda: port)
        with Server(Variant(kind, kind), settings) as server:
            environment = server._process.env  # type: ignore[attr-defined]
    call = ("/collective_rpc", {"method": "adadecode_forget_answers"})
    assert asked == [call] * forgets
    assert ("VLLM_SERVER_DEV_MODE" in environment) is forgets


def test_a_server_that_keeps_its_answers_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_nothing(monkeypatch)
    settings = replace(SETTINGS, adadecode={"lookup": "suffix"})
    with answering(404) as (port, _):
        monkeypatch.setattr(server_module, "_free_port", lambda: port)
        with pytest.raises(VariantError, match="does not forget answers: it says 404"):
            Server(Variant("adadecode", "adadecode"), settings)


def test_variants_without_a_server_are_skipped_with_a_reason() -> None:
    reasons = {
        variant.name: reason_not_to_serve(variant, SETTINGS)
        for variant in parse_variants("baseline,adadecode,transformers,draft-model")
    }
    assert reasons["baseline"] is reasons["adadecode"] is None
    assert reasons["transformers"] == (
        "has no server; benchmark_throughput.py measures it"
    )
    assert "give --draft-model" in str(reasons["draft-model"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--variants", "adadecode"], "--variants: 'baseline' is missing"),
        (["--batch-sizes", "4"], "--batch-sizes: a server makes its batches itself"),
        (["--max-concurrency", "40"], "--num-prompts: 32 prompts are too few for 40"),
        (["--repeats", "0"], "--repeats 0: nothing would be measured"),
    ],
)
def test_mistakes_are_refused_before_a_server_starts(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_serving, "Server", FakeServer)
    FakeServer.started.clear()
    with pytest.raises(AdaDecodeError) as refused:
        benchmark_serving.main(
            [*("--model", MODEL, "--adadecode-heads", HEADS), *arguments]
        )
    assert str(refused.value).startswith(sentence)
    assert not FakeServer.started


class FakeServer:
    """A server that only knows whether it was ended."""

    started: list[FakeServer] = []  # noqa: RUF012 (cleared by each test)
    refusing: tuple[str, ...] = ()

    def __init__(self, variant: Variant, settings: EngineSettings) -> None:
        if variant.name in self.refusing:
            raise VariantError("the server ended: ValueError: no")
        self.url, self.flags, self.start_up_seconds = variant.name, ["--x"], 1.0
        self.ended = False
        self.started.append(self)

    def check(self) -> None:
        pass

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True


class Session:
    """A serving session on fake servers, with a client that a test scripts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, output: Path) -> None:
        self.answers: dict[str, list[dict[str, Any] | BaseException]] = {}
        self.output = output
        self.order: list[str] = []
        FakeServer.started.clear()
        monkeypatch.setattr(FakeServer, "refusing", ())
        monkeypatch.setattr(benchmark_serving, "Server", FakeServer)
        monkeypatch.setattr(Client, "warm_up", lambda *_: None)
        monkeypatch.setattr(Client, "run", lambda _, url, load: self.answer(url))

    def answer(self, variant: str) -> dict[str, Any]:
        self.order.append(variant)
        answers = self.answers.get(variant)
        answer = answers.pop(0) if answers else run()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def measure(self, variants: str, repeats: int = 2) -> dict[str, Any]:
        session = ServingSession(
            parse_variants(variants), SETTINGS, WORKLOAD, output=self.output
        )
        with session:
            session.measure(Load(2), repeats)
        return session.results

    @property
    def written(self) -> dict[str, Any]:
        return json.loads(self.output.read_text())


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Session:
    return Session(monkeypatch, tmp_path / "results.json")


class TestSession:
    def test_servers_take_turns_the_baseline_first(self, session: Session) -> None:
        results = session.measure("adadecode,ngram,baseline")
        assert session.order == ["baseline", "adadecode", "ngram"] * 2
        assert session.written == results
        assert [case["variant"] for case in results["cases"]] == session.order[:3]
        assert results["cases"][1]["figures"]["texts"] == {"same": 6, "different": 0}
        assert all(server.ended for server in FakeServer.started)

    def test_a_server_that_does_not_start_is_noted(
        self, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(FakeServer, "refusing", ("ngram",))
        results = session.measure("baseline,ngram,adadecode,transformers")
        assert [case["variant"] for case in results["cases"]] == [
            "baseline",
            "adadecode",
        ]
        assert results["variants"]["ngram"] == {
            "status": "failed",
            "reason": "the server ended: ValueError: no",
        }
        assert results["variants"]["transformers"]["status"] == "skipped"

    def test_a_server_that_fails_on_the_way_keeps_its_repeats(
        self, session: Session
    ) -> None:
        dead = run(completed=0, failed=3, errors=["OSError: x"] * 3)
        session.answers["adadecode"] = [run(17.0), dead]
        results = session.measure("baseline,adadecode,ngram", repeats=3)
        assert [len(case["runs"]) for case in results["cases"]] == [3, 1, 3]
        assert results["cases"][1]["figures"]["ratio"]["median"] == 2
        assert results["variants"]["adadecode"] == {
            "status": "failed",
            "reason": "no request of 2 at a time succeeded: OSError: x",
        }

    def test_without_the_baseline_nothing_can_be_said(
        self, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session.answers["baseline"] = [VariantError("gone")]
        with pytest.raises(VariantError, match="gone"):
            session.measure("baseline,adadecode")
        assert all(server.ended for server in FakeServer.started)
        monkeypatch.setattr(FakeServer, "refusing", ("baseline",))
        with pytest.raises(VariantError, match="the server ended"):
            session.measure("baseline,adadecode")

    def test_a_killed_run_keeps_finished_repeats_and_ends_its_servers(
        self, session: Session
    ) -> None:
        session.answers["adadecode"] = [run(17.0), KeyboardInterrupt()]
        with pytest.raises(KeyboardInterrupt):
            session.measure("baseline,adadecode")
        assert [len(case["runs"]) for case in session.written["cases"]] == [1, 1]
        assert all(server.ended for server in FakeServer.started)


def test_the_table_has_a_row_per_case_and_the_reasons(session: Session) -> None:
    session.answers["adadecode"] = [
        run(17.0, spec_decode_draft_tokens=10, spec_decode_accepted_tokens=9)
    ]
    results = session.measure("baseline,adadecode,transformers", repeats=1)
    lines = serving_table(results).splitlines()
    assert "| drafts per token | accepted |" in lines[0]
    assert lines[2].split(" | ")[:4] == [
        "| 2 at a time",
        "baseline",
        "8.50 (8.50-8.50)",
        "1.00 (1.00-1.00)",
    ]
    assert lines[3] == (
        "| 2 at a time | adadecode | 17.00 (17.00-17.00) | 2.00 (2.00-2.00) | 1.50 | "
        "200.0 / 298.0 | 150.0 / 199.0 | 0.59 | 90.0 % | 3/3 | 0/3 |"
    )
    assert lines[-1] == (
        "transformers skipped: it has no server; benchmark_throughput.py measures it."
    )
    assert len({line.count("|") for line in lines[:4]}) == 1


def test_files_with_the_names_of_before_are_read() -> None:
    """They call all drafts early predictions, and variants arms."""
    path = ROOT / "benchmarks" / "results" / "wide_serving_bfloat16.json"
    (found,) = read_results([path])
    lines = serving_table(found).splitlines()
    assert " | 0.76 | 98.8 % | " in lines[3]
    assert " | - | - | " in lines[2]
    assert found["table"].splitlines()[3] == lines[3]
