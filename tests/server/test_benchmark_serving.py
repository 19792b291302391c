# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark with real servers and vLLM's own client."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from benchmarks.benchmark_serving import main
from tests.harness import HEADS, MODEL

pytestmark = pytest.mark.server


@pytest.mark.slow
def test_two_servers_under_load(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The engine's process has the worker in it: one import of vLLM less a server.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    output = tmp_path / "results.json"
    main(
        [
            *("--model", MODEL, "--adadecode-heads", HEADS),
            *("--adadecode-config", '{"threshold": 0.5}'),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
            *("--kv-cache-gib", "0.0625", "--variants", "baseline,adadecode"),
            *("--num-prompts", "4", "--output-len", "24", "--repeats", "1"),
            *("--max-concurrency", "2", "--output-json", str(output)),
        ]
    )
    results = json.loads(output.read_text())
    assert capsys.readouterr().out.strip() == results["table"]
    assert {
        name: variant["status"] for name, variant in results["variants"].items()
    } == {
        "baseline": "ran",
        "adadecode": "ran",
    }
    baseline, adadecode = results["cases"]
    for case in (baseline, adadecode):
        figures = case["figures"]
        assert (case["concurrency"], case["request_rate"]) == (2, None)
        assert (figures["requests"], figures["failed_requests"]) == (4, 0)
        assert figures["tokens_per_s"]["min"] > 0
        for latency in ("ttft_ms", "tpot_ms", "e2el_ms"):
            assert 0 < figures[latency]["p50"] <= figures[latency]["p99"]
        (run,) = case["runs"]
        # By request of the same numbers, as the client itself.
        assert figures["ttft_ms"]["p99"] == pytest.approx(run["client"]["p99_ttft_ms"])
        assert figures["tpot_ms"]["p50"] == pytest.approx(run["client"]["p50_tpot_ms"])
    assert baseline["figures"]["ratio"]["median"] == 1
    assert baseline["figures"]["acceptance"] is None
    assert adadecode["figures"]["texts"] == {"same": 4, "different": 0}
    drafts = adadecode["figures"]["drafts"]
    assert 0 < drafts["coverage"] <= drafts["rate"]
    assert 0 < drafts["acceptance"] <= 1
    servers = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE and "serve" in process.cmdline()
    ]
    assert not servers, "a server outlived the benchmark"
