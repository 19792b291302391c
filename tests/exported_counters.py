# SPDX-License-Identifier: Apache-2.0
"""Counters as an engine exports them to Prometheus, without an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from prometheus_client import REGISTRY, generate_latest
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from adadecode_vllm.config import CONFIG_KEY
from adadecode_vllm.engine.metric_loggers import AdaDecodeProm
from adadecode_vllm.engine.metric_names import PREFIX

EXITS = (2, 4)
OPTIONS = {"heads": "some/heads", "exit_layers": list(EXITS), "threshold": 0.5}


def exported() -> str:
    """What `/metrics` would answer."""
    return generate_latest(REGISTRY).decode()


@contextmanager
def make_readers() -> Iterator[Callable[..., AdaDecodeProm]]:
    """Make readers of an engine's counters, and unregister what they registered."""

    def make(options: dict[str, Any] | None, engines: int = 1) -> AdaDecodeProm:
        values: dict[int, list[object]] = {i: ["m", str(i)] for i in range(engines)}
        labels = ["model_name", "engine"]
        return AdaDecodeProm(engine_with(options), labels, values, PrometheusStatLogger)

    unregister_vllm_metrics()
    yield make
    unregister_vllm_metrics()
    assert PREFIX not in exported()


def engine_with(options: dict[str, Any] | None) -> Any:
    """As much of an engine's configuration as the readers look at."""
    additional_config = {} if options is None else {CONFIG_KEY: options}
    return SimpleNamespace(additional_config=additional_config, ec_transfer_config=None)
