# SPDX-License-Identifier: Apache-2.0
"""vLLM's loggers of metrics show the method's counters.

Symptom without it: ``/metrics`` and the periodic log know how many drafts were
accepted, not at which exit, nor what drafting cost. ``SchedulerStats``, which carries a
step's statistics to the API server, has no field for a speculative method's own. A
logger of ``vllm.stat_logger_plugins`` would see no more than that, is not loaded by
``LLM``, and switches statistics on for every server of the environment, also where
``--disable-log-stats`` was asked for.

``ec_connector_stats`` is a free dictionary that goes all the way. It belongs to
encoder-cache connectors, which serve multimodal models; AdaDecode refuses both. Its
readers are replaced by ones that know our key and leave everything else to vLLM's. The
one for Prometheus takes the kinds of metrics from the logger that makes it: vLLM's
logger for Ray has its own, but no reader of these statistics.

Upstream: ``SchedulerStats`` and ``LoggingStatLogger.__init__`` in
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/metrics/loggers.py
The change to propose there: a dictionary of a speculative method's own statistics.

Can go when vLLM has such a field.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adadecode_vllm.compat import SUPPORTED_NAMES

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    from adadecode_vllm.engine.metric_loggers import AdaDecodeProm


def install() -> None:
    """Replace the two readers; a second call does nothing.

    Raises:
        RuntimeError: If vLLM's loggers do not look as expected.
    """
    from vllm.logger import init_logger
    from vllm.v1.metrics import loggers

    from adadecode_vllm.engine.metric_loggers import AdaDecodeLogging, AdaDecodeProm

    prometheus = loggers.PrometheusStatLogger
    vllms = (AdaDecodeLogging.__base__, AdaDecodeProm.__base__)
    found = (
        getattr(loggers, "ECConnectorLogging", None),
        vars(prometheus).get("_ec_connector_cls"),
    )
    if found == (AdaDecodeLogging, _make_reader):
        return
    if found != vllms:
        raise RuntimeError(
            "adadecode: vllm.v1.metrics.loggers does not read ec_connector_stats as "
            f"in vLLM {SUPPORTED_NAMES}, for which this plugin was written. Install "
            "one of them."
        )
    loggers.ECConnectorLogging = AdaDecodeLogging  # type: ignore[misc]
    prometheus._ec_connector_cls = _make_reader  # type: ignore[assignment]
    init_logger("vllm.adadecode").debug("vLLM's metrics show adadecode's counters")


def _make_reader(
    stat_logger: PrometheusStatLogger,
    vllm_config: VllmConfig,
    labelnames: list[str],
    per_engine_labelvalues: dict[int, list[object]],
) -> AdaDecodeProm:
    """As vLLM calls the class that stands there, but bound to the logger."""
    from adadecode_vllm.engine.metric_loggers import AdaDecodeProm

    return AdaDecodeProm(
        vllm_config, labelnames, per_engine_labelvalues, type(stat_logger)
    )
