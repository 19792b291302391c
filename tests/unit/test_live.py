# SPDX-License-Identifier: Apache-2.0
"""The live page: figures, routes and the page itself; a server in tests/server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from adadecode_vllm.config import CONFIG_KEY
from adadecode_vllm.engine.finished_requests import RecentRequests
from adadecode_vllm.engine.metric_loggers import AdaDecodeProm
from adadecode_vllm.engine.metric_names import COMPARED, TOTALS
from adadecode_vllm.engine.metric_samples import Counted
from adadecode_vllm.live import endpoint
from adadecode_vllm.live.endpoint import LiveEndpoint
from adadecode_vllm.live.figures import Lately, estimated_ratio, figures
from adadecode_vllm.method.ledger import REASONS
from adadecode_vllm.method.stats import Stats
from tests.exported_counters import EXITS, OPTIONS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "adadecode_vllm" / "live" / "page.html"


def counted(**totals: float) -> Counted:
    """Counters with one exit after layer 2; `early` counts there."""
    early = totals.pop("early", 0.0)
    exit_ = {
        "gates": 2 * early,
        "early_predictions": early,
        "accepted": 0.75 * early,
        "rejected": 0.25 * early,
    }
    return Counted(
        per_exit={2: exit_},
        totals={**dict.fromkeys([*TOTALS, *COMPARED], 0.0), **totals},
        dropped={"truncated": 3.0, "moved": 0.0},
    )


# Figures


def test_figures_of_a_minute() -> None:
    reported = figures(
        counted(early=80, request_steps=50, generated_tokens=110, ngram_drafts=5),
        20.0,
        host_times=False,
    )
    assert reported["tokens_per_forward"] == 2.2
    assert reported["tokens_per_second"] == 5.5
    assert reported["accepted_share"] == pytest.approx(60 / 110)
    assert reported["exits"] == [
        {
            "layer": 2,
            "asked": 160,
            "predicted": 80,
            "accepted": 60,
            "rejected": 20,
            "right": 0.75,
        }
    ]
    assert reported["ngram"]["drafted"] == 5
    assert reported["dropped"] == {"truncated": 3}
    assert reported["estimated_ratio"] is None  # a device's times are not the host's


def test_the_ratio_is_measured_where_the_engine_compared() -> None:
    own = counted(request_steps=5, compared_seconds=2.0, plain_seconds=3.0)
    assert figures(own, 9.0, host_times=False)["measured_ratio"] == 1.5
    assert figures(counted(), 9.0, host_times=True)["measured_ratio"] is None


def test_nothing_was_served_yet() -> None:
    reported = figures(counted(), None, host_times=True)
    empty = ("tokens_per_forward", "tokens_per_second", "accepted_share")
    assert [reported[name] for name in (*empty, "estimated_ratio")] == [None] * 4
    json.dumps(reported, allow_nan=False)


def test_the_estimate_without_drafts_is_plain_speed() -> None:
    assert estimated_ratio(counted(request_steps=9, generated_tokens=9)) == 1.0


@pytest.mark.parametrize(
    ("file", "case", "too_high"),
    [
        ("wide_problems_bfloat16", 1, 1.07),
        ("smollm2_gsm8k_float32", 1, 1.05),
        ("smollm2_gsm8k_float32", 2, 1.07),
        ("smollm2_gsm8k_float32", 3, 1.3),  # T = I, which does not pay
    ],
)
def test_the_estimate_beside_measurements(
    file: str, case: int, too_high: float
) -> None:
    """What docs/live.md says of it: a little too high on models that are not tiny."""
    path = ROOT / "benchmarks" / "results" / f"{file}.json"
    result = json.loads(path.read_text())["cases"][case]
    measured = result["figures"]["ratio"]["median"]
    for run in result["runs"]:
        stats = run["stats"]
        totals = {name: float(stats[name]) for name in TOTALS if name in stats}
        early = float(sum(stats["early_predictions"]))
        estimate = estimated_ratio(counted(early=early, **totals))
        assert estimate is not None
        assert 0.97 * measured < estimate < too_high * measured


def test_lately_is_the_last_minute() -> None:
    lately = Lately()
    assert lately.since(0.0, counted(generated_tokens=5)) is None
    seconds, added = lately.since(30.0, counted(generated_tokens=8)) or (0, counted())
    assert (seconds, added.totals["generated_tokens"]) == (30.0, 3.0)
    seconds, added = lately.since(70.0, counted(generated_tokens=10)) or (0, counted())
    assert (seconds, added.totals["generated_tokens"]) == (40.0, 2.0)


def test_counting_from_zero_again_begins_anew() -> None:
    lately = Lately()
    lately.since(0.0, counted(generated_tokens=5))
    assert lately.since(2.0, counted(generated_tokens=1)) is None
    seconds, added = lately.since(4.0, counted(generated_tokens=2)) or (0, counted())
    assert (seconds, added.totals["generated_tokens"]) == (2.0, 1.0)


# Routes


def client(options: dict[str, Any] | None) -> TestClient:
    """An application that has the plugin's routes, as vLLM attaches them."""
    plugin = LiveEndpoint()
    assert isinstance(plugin, EndpointPlugin)
    app = FastAPI()
    plugin.attach_router(app)
    engine: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(
            additional_config={} if options is None else {CONFIG_KEY: options},
            model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 16),
            parallel_config=SimpleNamespace(_api_process_count=2, data_parallel_size=1),
            device_config=SimpleNamespace(device_type="cpu"),
        )
    )
    args: Any = SimpleNamespace(served_model_name=None, model="some/model")
    asyncio.run(plugin.init_state(engine, app.state, args))
    return TestClient(app)


def test_stats(
    prom: Callable[..., AdaDecodeProm], monkeypatch: pytest.MonkeyPatch
) -> None:
    recent = RecentRequests()
    monkeypatch.setattr(endpoint, "RECENT", recent)
    evil = "cmpl-<script>alert(1)</script>"
    recent.add([(evil, 1.0, 2.0, "stop", 7, 10, 8, 5)])
    stats = Stats(EXITS, 16)
    stats.early_predictions[:] = [6, 4]
    stats.accepted[:] = [5, 3]
    stats.request_steps, stats.generated_tokens = 4, 12
    added = [*stats.reported().tolist(), *[0.0] * len(REASONS)]
    prom(OPTIONS).observe({CONFIG_KEY: added})
    answer = client(OPTIONS).get("/adadecode/stats")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    reported = answer.json()
    assert (reported["model"], reported["layers"]) == (["some/model"], 16)
    assert (reported["api_servers"], reported["device"]) == (2, "cpu")
    assert reported["options"]["threshold"] == 0.5
    assert reported["lately"] is None
    assert reported["since_start"]["accepted"] == 8
    assert reported["since_start"]["tokens_per_forward"] == 3.0
    (request,) = reported["requests"]
    assert request == {
        "id": evil,
        "ended": 1.0,
        "seconds": 2.0,
        "reason": "stop",
        "prompt_tokens": 7,
        "tokens": 10,
        "drafted": 8,
        "accepted": 5,
        "accepted_share": 0.5,
    }


def test_readings_are_compared_in_the_order_in_which_they_were_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An older one after a newer one would look like a server that began anew."""
    first_taken, second_compared = Event(), Event()
    readings = iter((5.0, 8.0))
    compared: list[float] = []

    def take() -> Counted:
        tokens = next(readings)
        if tokens == 5.0:
            first_taken.set()
            second_compared.wait(0.5)  # it has every chance to overtake
        return counted(generated_tokens=tokens)

    def since(self: Lately, now: float, found: Counted) -> None:
        compared.append(found.totals["generated_tokens"])
        if compared[-1] == 8.0:
            second_compared.set()

    monkeypatch.setattr(endpoint, "counted_here", take)
    monkeypatch.setattr(Lately, "since", since)
    asking = client(OPTIONS)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(asking.get, "/adadecode/stats")]
        assert first_taken.wait(30)
        answers.append(pool.submit(asking.get, "/adadecode/stats"))
    assert [answer.result().status_code for answer in answers] == [200, 200]
    assert compared == [5.0, 8.0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (None, "started without --plugin adadecode"),
        ({**OPTIONS, "enabled": False}, "started without --plugin adadecode"),
        (OPTIONS, "started with --disable-log-stats"),
    ],
)
def test_there_is_nothing_to_show(
    options: dict[str, Any] | None, sentence: str
) -> None:
    unregister_vllm_metrics()
    answer = client(options).get("/adadecode/stats")
    assert answer.status_code == 404
    assert sentence in answer.json()["error"]


# The page


def test_the_page_may_run_nothing_but_itself() -> None:
    answer = client(OPTIONS).get("/adadecode")
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.text == PAGE.read_text(encoding="utf-8")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_loads_nothing_from_afar_and_writes_text_only() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"https?://|//\w+\.", text)
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,"]
    for dangerous in ("innerHTML", "outerHTML", "insertAdjacent", "eval(", "write("):
        assert dangerous not in text
    assert not re.findall(r'\s(?:on\w+|style)="', text)
