# SPDX-License-Identifier: Apache-2.0
"""Counters from the worker to `/metrics`, the log and the documents."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.distributed.ec_transfer.ec_connector.metrics import (
    ECConnectorLogging,
    ECConnectorProm,
)
from vllm.v1.metrics import loggers

from adadecode_vllm.config import CONFIG_KEY
from adadecode_vllm.engine import metric_loggers
from adadecode_vllm.engine.counter_report import (
    COMPARED_KEY,
    CounterReport,
    split_counters,
)
from adadecode_vllm.engine.finished_requests import (
    FINISHED_KEY,
    RecentRequests,
    RequestLog,
)
from adadecode_vllm.engine.metric_loggers import AdaDecodeLogging, AdaDecodeProm
from adadecode_vllm.engine.metric_names import (
    COMPARED,
    CONFIG_INFO,
    DROPPED,
    PER_EXIT,
    PREFIX,
    TOTALS,
)
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.method.ledger import REASONS
from adadecode_vllm.method.stats import REPORTED, REPORTED_PER_EXIT, Stats
from adadecode_vllm.patches import stat_loggers
from adadecode_vllm.toolkit.stats.snapshot import parse
from tests.exported_counters import EXITS, OPTIONS, engine_with, exported

ROOT = Path(__file__).parents[2]
NUMBERS = 2 * len(REPORTED_PER_EXIT) + len(REPORTED) + len(REASONS)


def test_the_order_of_a_report() -> None:
    stats = Stats(EXITS, 8)
    for number, name in enumerate(REPORTED_PER_EXIT):
        getattr(stats, name)[:] = [10 * number + 1, 10 * number + 2]
    for number, name in enumerate(REPORTED):
        setattr(stats, name, 100 + number)
    dropped = np.arange(len(REASONS)) + 200
    per_exit, totals, reasons = split_counters([*stats.reported(), *dropped])
    assert per_exit == {
        name: [10 * number + 1, 10 * number + 2]
        for number, name in enumerate(REPORTED_PER_EXIT)
    }
    assert totals == {name: 100 + number for number, name in enumerate(REPORTED)}
    assert reasons == {name: 200 + number for number, name in enumerate(REASONS)}


def test_every_reported_counter_has_a_name_and_every_name_a_counter() -> None:
    assert tuple(PER_EXIT) == REPORTED_PER_EXIT
    assert tuple(TOTALS) == REPORTED


def test_only_what_was_added_is_sent() -> None:
    report = CounterReport()
    assert report.take() is None
    report.update(np.array([1.0, 2.0]))
    assert report.take() == [1.0, 2.0]
    assert report.take() is None
    report.update(None)  # a step without counters
    assert report.take() is None
    report.update(np.array([1.0, 2.0]))  # a step that counted nothing
    assert report.take() is None
    report.update(np.array([2.0, 2.0]))
    report.update(np.array([4.0, 7.0]))
    assert report.take() == [3.0, 5.0]


def test_a_steps_counters_are_not_kept() -> None:
    """Ray's first executor may use their memory again."""
    report = CounterReport()
    counters = np.array([1.0, 2.0])
    report.update(counters)
    counters += 5
    assert report.take() == [1.0, 2.0]


def test_counting_from_zero_again_loses_nothing() -> None:
    report = CounterReport()
    report.update(np.array([5.0, 2.0]))
    report.take()
    report.update(np.array([1.0, 2.0]))
    assert report.take() == [1.0, 2.0]


def test_prometheus_adds_up_by_engine(prom: Callable[..., AdaDecodeProm]) -> None:
    reader = prom(OPTIONS, engines=2)
    added = [float(number) for number in range(NUMBERS)]
    reader.observe({CONFIG_KEY: added}, 0)
    reader.observe({CONFIG_KEY: added}, 1)
    reader.observe({CONFIG_KEY: added, COMPARED_KEY: [2.0, 3.0]}, 1)
    reader.observe({COMPARED_KEY: [0.5, 0.5]}, 0)
    snapshot = parse(exported(), 0.0, "here").counted
    per_exit, totals, dropped = split_counters(added)
    assert snapshot.per_exit == {
        layer: {name: 3 * per_exit[name][index] for name in per_exit}
        for index, layer in enumerate(EXITS)
    }
    expected = {name: 3 * value for name, value in totals.items()}
    compared = {"compared_seconds": 2.5, "plain_seconds": 3.5}
    assert snapshot.totals == expected | compared
    assert snapshot.dropped == {name: 3 * value for name, value in dropped.items()}
    assert snapshot.options["threshold"] == "0.5"
    assert snapshot.options["exit_layers"] == "2,4"
    line = 'accepted_tokens_total{engine="1",exit_layer="4",model_name="m"} '
    assert f"{PREFIX}{line}{2 * per_exit['accepted'][1]}" in exported()


@pytest.mark.parametrize("options", [None, {**OPTIONS, "enabled": False}])
def test_other_engines_have_none_of_it(
    prom: Callable[..., AdaDecodeProm], options: dict[str, Any] | None
) -> None:
    reader = prom(options)
    assert PREFIX not in exported()
    reader.observe({"bytes": 3})  # what vLLM's own connectors would send
    with pytest.raises(AdaDecodeError, match="AdaDecode's metrics are not there"):
        parse(exported(), 0.0, "here")


def test_finished_requests_travel_beside_the_counters(
    prom: Callable[..., AdaDecodeProm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With counters or without; the newest are remembered, in either logger."""
    recent = RecentRequests(remembered=2)
    monkeypatch.setattr(metric_loggers, "RECENT", recent)
    log = RequestLog()
    log.count("a", 3, 2)
    log.count("a", 5, 5)
    for name, tokens in (("a", 9), ("b", 4), ("c", 0)):
        log.end(_ended(name, tokens))
    reader = prom(OPTIONS)
    reader.observe({FINISHED_KEY: log.take()})
    assert log.take() == []
    assert [request.request_id for request in recent.newest()] == ["c", "b"]
    assert PREFIX + "accepted_tokens_total" in exported()
    log.count("d", 8, 6)
    log.end(_ended("d", 5))
    sent = json.loads(json.dumps(log.take()))  # tuples arrive as lists
    reader.observe({CONFIG_KEY: [1.0] * NUMBERS, FINISHED_KEY: sent})
    newest = recent.newest()[0]
    # Of six accepted drafts at least one lies behind the end of a text of five tokens.
    assert (newest.request_id, newest.drafted, newest.accepted) == ("d", 8, 5)
    assert (newest.prompt_tokens, newest.tokens, newest.reason) == (7, 5, "stop")
    assert 0 < newest.seconds < 60
    assert parse(exported(), 0.0, "here").counted.totals["request_steps"] == 1
    lines: list[str] = []
    logging = AdaDecodeLogging(None)
    logging.observe({FINISHED_KEY: []})
    logging.log(lambda *line: lines.append(str(line)))
    assert lines == []


def _ended(name: str, tokens: int) -> Any:
    return SimpleNamespace(
        request_id=name,
        arrival_time=time.time() - 1,
        num_prompt_tokens=7,
        num_output_tokens=tokens,
        get_finished_reason=lambda: "stop",
    )


def test_the_log_sums_up_an_interval() -> None:
    lines: list[str] = []

    def log(text: str, *values: Any) -> None:
        lines.append(text % values)

    reader = AdaDecodeLogging(None)
    reader.log(log)
    assert not lines
    stats = Stats(EXITS, 8)
    stats.early_predictions[:] = [6, 4]
    stats.accepted[:] = [5, 3]
    stats.rejected[:] = [1, 0]
    stats.request_steps, stats.generated_tokens = 4, 12
    added = [*stats.reported().tolist(), *[1.0] * len(REASONS)]
    reader.observe({CONFIG_KEY: added})
    reader.observe({CONFIG_KEY: added})
    reader.log(log)
    (line,) = lines
    assert "Tokens per target forward: 3.00" in line
    assert "Early predictions: 20 tokens, Accepted: 16 tokens, Rejected: 2" in line
    assert f"Dropped while pending: {2 * len(REASONS)} tokens" in line
    reader.log(log)
    assert len(lines) == 1


@pytest.fixture
def vllms_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM has them, whatever this process has installed; so again afterwards."""
    monkeypatch.setattr(loggers, "ECConnectorLogging", ECConnectorLogging)
    monkeypatch.setattr(
        loggers.PrometheusStatLogger, "_ec_connector_cls", ECConnectorProm
    )


@pytest.mark.usefixtures("vllms_readers")
def test_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    stat_loggers.install()
    stat_loggers.install()
    assert loggers.ECConnectorLogging is AdaDecodeLogging
    monkeypatch.setattr(loggers, "ECConnectorLogging", object)
    with pytest.raises(RuntimeError, match="ec_connector_stats as in vLLM"):
        stat_loggers.install()


@pytest.mark.usefixtures("vllms_readers")
def test_metrics_are_of_the_loggers_kind() -> None:
    """As with vLLM's logger for Ray, whose metrics are not Prometheus's."""
    stat_loggers.install()
    counted: Counter[tuple[str, ...]] = Counter()

    class Metric:
        def __init__(self, name: str, text: str, labelnames: list[str], **_: Any):
            self.name = name

        def labels(self, *values: str) -> Any:
            add = partial(counted.update, [(self.name, *values)])
            return SimpleNamespace(inc=lambda _: add(), set=lambda _: add())

    class Logger(loggers.PrometheusStatLogger):
        _counter_cls = _gauge_cls = Metric  # type: ignore[assignment]

        def __init__(self) -> None:
            pass  # the other metrics

    reader = Logger()._ec_connector_cls(
        engine_with(OPTIONS), ["model_name", "engine"], {0: ["m", "0"]}
    )
    assert type(reader) is AdaDecodeProm
    reader.observe({CONFIG_KEY: [1.0] * NUMBERS}, 0)
    accepted = PREFIX + PER_EXIT["accepted"][0]
    assert [counted[accepted, "m", "0", str(layer)] for layer in EXITS] == [1, 1]
    assert sum(name == PREFIX + CONFIG_INFO[0] for name, *_ in counted) == 1
    assert PREFIX not in exported()


def test_vllm_still_has_no_field_for_a_methods_statistics() -> None:
    """Once it has, `patches/stat_loggers.py` can go."""
    fields = set(loggers.SchedulerStats.__dataclass_fields__)
    free = {name for name in fields if name.endswith("_stats")}
    assert free == {
        "prefix_cache_stats",
        "connector_prefix_cache_stats",
        "spec_decoding_stats",
        "kv_connector_stats",
        "ec_connector_stats",
        "cudagraph_stats",
        "perf_stats",
    }


# Documents


def _documented() -> set[str]:
    families = [*PER_EXIT.values(), *TOTALS.values(), *COMPARED.values(), DROPPED]
    names = {name for name, _ in families}
    return {f"{PREFIX}{name}_total" for name in names} | {PREFIX + CONFIG_INFO[0]}


def test_the_document_has_every_metric_with_its_help() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert f"All names begin with `{PREFIX}`" in text
    counters, reasons = text.split("The reasons for dropping a pending token:")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", counters, re.MULTILINE))
    helps = [*PER_EXIT.values(), *TOTALS.values(), *COMPARED.values(), DROPPED]
    assert rows == {f"{name}_total": text for name, text in helps} | {
        CONFIG_INFO[0]: CONFIG_INFO[1]
    }
    reasons = "\n".join(re.findall(r"^\| (`.*?) \|", reasons, re.MULTILINE))
    assert set(re.findall("`([a-z_]+)`", reasons)) == set(REASONS)


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    path = ROOT / "examples" / "grafana" / "adadecode.json"
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 8
    queried: set[str] = set()
    legends: list[str] = []
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        for target in panel["targets"]:
            queried.update(re.findall(r"vllm:\w+", target["expr"]))
            legends.append(target.get("legendFormat", ""))
    # Labels fill in the others; one that was copied names another panel's figure.
    own = [legend for legend in legends if legend and "{{" not in legend]
    assert len(set(own)) == len(own)
    ours = {name for name in queried if name.startswith(PREFIX)}
    assert ours <= _documented()
    # All but how often pending tokens are resumed.
    resumed = {f"{PREFIX}resumed_tokens_total", f"{PREFIX}resumed_forwards_total"}
    assert ours == _documented() - resumed
    known = Path(loggers.__file__).read_text(encoding="utf-8")
    for name in queried - ours:
        family = re.sub("_(total|bucket)$", "", name)
        assert f'"{family}"' in known, name
