# SPDX-License-Identifier: Apache-2.0
"""Extensions of vLLM's loggers, in Prometheus and in the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import Counter
from vllm.distributed.ec_transfer.ec_connector.metrics import (
    ECConnectorLogging,
    ECConnectorProm,
)
from vllm.logger import init_logger

from adadecode_vllm.config import CONFIG_KEY, AdaDecodeConfig, engine_config
from adadecode_vllm.engine.counter_report import COMPARED_KEY, split_counters
from adadecode_vllm.engine.finished_requests import FINISHED_KEY, RECENT
from adadecode_vllm.engine.metric_names import (
    COMPARED,
    CONFIG_INFO,
    DROPPED,
    PER_EXIT,
    PREFIX,
    TOTALS,
)
from adadecode_vllm.method.ledger import REASONS
from adadecode_vllm.method.stats import REPORTED, REPORTED_PER_EXIT

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.loggers import PrometheusStatLogger

logger = init_logger("vllm.adadecode")

_OURS = {CONFIG_KEY, COMPARED_KEY, FINISHED_KEY}


class AdaDecodeProm(ECConnectorProm):
    """Counters in Prometheus; does nothing for engines without AdaDecode."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        stat_logger: type[PrometheusStatLogger],
    ) -> None:
        """Register the metrics; see vLLM.

        Args:
            vllm_config: The engine's configuration.
            labelnames: vLLM's labels.
            per_engine_labelvalues: Their values, by engine.
            stat_logger: The logger that asks; Ray's has metrics of its own kinds.
        """
        self._gauge_cls = stat_logger._gauge_cls
        self._counter_cls = stat_logger._counter_cls
        self._histogram_cls = stat_logger._histogram_cls
        super().__init__(vllm_config, labelnames, per_engine_labelvalues)
        # By engine and key of a step's statistics, in their order.
        self._counters: dict[int, dict[str, list[Counter]]] = {}
        config = engine_config(vllm_config)
        if config is not None:
            self._register(config, labelnames, per_engine_labelvalues)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what a step's statistics say, ours or those of vLLM's own use."""
        if not _OURS & transfer_stats_data.keys():
            super().observe(transfer_stats_data, engine_idx)
            return
        RECENT.add(transfer_stats_data.get(FINISHED_KEY, []))
        for key, counters in self._counters[engine_idx].items():
            added = transfer_stats_data.get(key)
            if added is None:
                continue
            for counter, value in zip(counters, added, strict=True):
                if value:
                    counter.inc(value)

    def _register(
        self,
        config: AdaDecodeConfig,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        assert config.exit_layers is not None, "resolved at start-up"
        exits = [str(layer) for layer in config.exit_layers]
        # In the order in which worker and scheduler report them.
        families: list[tuple[str, tuple[str, str], str | None, Sequence[str]]] = [
            *(
                (CONFIG_KEY, PER_EXIT[name], "exit_layer", exits)
                for name in REPORTED_PER_EXIT
            ),
            *((CONFIG_KEY, TOTALS[name], None, [""]) for name in REPORTED),
            (CONFIG_KEY, DROPPED, "reason", REASONS),
            *((COMPARED_KEY, name, None, [""]) for name in COMPARED.values()),
        ]
        self._counters = {
            engine: {CONFIG_KEY: [], COMPARED_KEY: []}
            for engine in per_engine_labelvalues
        }
        for key, (name, help_text), label, values in families:
            names = [*labelnames, label] if label else labelnames
            family = self._counter_cls(PREFIX + name, help_text, labelnames=names)
            for engine, labelvalues in per_engine_labelvalues.items():
                self._counters[engine][key] += [
                    family.labels(*labelvalues, *([value] if label else []))
                    for value in values
                ]
        info = self._options(config)
        gauge = self._gauge_cls(
            PREFIX + CONFIG_INFO[0],
            CONFIG_INFO[1],
            labelnames=[*labelnames, *info],
            multiprocess_mode="mostrecent",
        )
        for labelvalues in per_engine_labelvalues.values():
            gauge.labels(*labelvalues, *info.values()).set(1)

    @staticmethod
    def _options(config: AdaDecodeConfig) -> dict[str, str]:
        options = config.model_dump(mode="json")
        options["exit_layers"] = ",".join(map(str, options["exit_layers"]))
        return {name: str(value) for name, value in options.items()}


class AdaDecodeLogging(ECConnectorLogging):
    """The line of vLLM's periodic log."""

    def reset(self) -> None:
        """Start an interval."""
        super().reset()
        self._added: np.ndarray | None = None

    def observe(self, transfer_stats_data: dict[str, Any]) -> None:
        """Add what a step's statistics say, ours or those of vLLM's own use."""
        if not _OURS & transfer_stats_data.keys():
            super().observe(transfer_stats_data)
            return
        added = transfer_stats_data.get(CONFIG_KEY)
        if added is None:
            return
        if self._added is None:
            self._added = np.array(added)
        else:
            self._added += added

    def log(self, log_fn: Any = logger.info) -> None:
        """Log the interval, if there is anything to say."""
        super().log(log_fn)
        if self._added is None:
            return
        per_exit, totals, dropped = split_counters(self._added)
        forwards = totals["request_steps"]
        log_fn(
            "AdaDecode metrics: Tokens per target forward: %.2f, Early predictions: "
            "%d tokens, Accepted: %d tokens, Rejected: %d tokens, Dropped while "
            "pending: %d tokens, Drafting: %.2f s, Verifying: %.2f s",
            totals["generated_tokens"] / forwards if forwards else float("nan"),
            sum(per_exit["early_predictions"]),
            sum(per_exit["accepted"]),
            sum(per_exit["rejected"]),
            sum(dropped.values()),
            totals["drafting_seconds"],
            totals["verifying_seconds"],
        )
        self.reset()
