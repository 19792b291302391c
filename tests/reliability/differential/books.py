# SPDX-License-Identifier: Apache-2.0
"""Whether counters agree with each other and nothing is left at the end of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adadecode_vllm.config import engine_config

_METRICS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
    "early_predictions": "vllm:adadecode_early_predictions",
    "accepted": "vllm:adadecode_accepted_tokens",
    "rejected": "vllm:adadecode_rejected_tokens",
    "preemptions": "vllm:num_preemptions",
}


class Books:
    """Watches one engine, with AdaDecode or without.

    Attributes:
        counts: What happened in the last stream, by name.
    """

    def __init__(self, llm: Any) -> None:
        """Watch what drafting predicts and what verification is asked to verify."""
        self._llm = llm
        self._core = llm.llm_engine
        self._engine = self._core.engine_core.engine_core
        config = self._core.vllm_config
        self._asynchronous = bool(config.scheduler_config.async_scheduling)
        self._ours = engine_config(config) is not None
        self.counts: dict[str, int] = {}
        self._before: dict[str, float] = {}
        self._predicted: dict[str, int] = {}
        self._verified = {"drafts": 0, "draft_tokens": 0}
        if self._ours:
            self._watch(self._adadecode)

    @property
    def _adadecode(self) -> Any:
        worker = self._core.model_executor.driver_worker.worker
        return worker.model_runner.adadecode

    def _watch(self, adadecode: Any) -> None:
        draft, record_acceptance = adadecode.draft, adadecode.record_acceptance

        def watched_draft(step: int, request_ids: Sequence[str], *args: Any) -> Any:
            drafts = draft(step, request_ids, *args)
            for request_id, tokens in zip(request_ids, drafts, strict=True):
                self._predicted[request_id] = len(tokens)
            return drafts

        def watched_acceptance(
            sampled: Mapping[str, int], scheduled: Mapping[str, int], *args: Any
        ) -> Any:
            for request_id, tokens in scheduled.items():
                real = min(tokens, self._predicted.pop(request_id, 0))
                if sampled.get(request_id) and real:
                    self._verified["drafts"] += 1
                    self._verified["draft_tokens"] += real
            return record_acceptance(sampled, scheduled, *args)

        adadecode.draft = watched_draft
        adadecode.record_acceptance = watched_acceptance

    def open(self) -> None:
        """A stream begins."""
        self._before = self._metrics()
        self._verified = {"drafts": 0, "draft_tokens": 0}
        if self._ours:
            self._adadecode.reset_counters()

    def close(self) -> list[str]:
        """A stream has ended and the engine has taken one more step.

        Returns:
            Sentences about what is not as it should be.
        """
        now = self._metrics()
        self.counts = {
            name: round(now[name] - self._before[name])
            for name in now
            if not name.startswith("adadecode")
        }
        if not self._ours:
            return []
        return [*self._what_is_left(), *self._what_disagrees()]

    def _metrics(self) -> dict[str, float]:
        found = dict.fromkeys(_METRICS, 0.0)
        names = {metric: name for name, metric in _METRICS.items()}
        for metric in self._llm.get_metrics():
            if metric.name in names:
                found[names[metric.name]] += metric.value
        return found

    def _what_is_left(self) -> list[str]:
        scheduler = self._engine.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        wrong = []
        # One block is vLLM's null block, which is never used.
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        if held:
            wrong.append(f"{held} KV blocks are still held")
        if scheduler.requests:
            wrong.append(
                f"{len(scheduler.requests)} requests are left in the scheduler"
            )
        adadecode = self._adadecode
        if len(adadecode.ledger):
            wrong.append(f"{len(adadecode.ledger)} requests are pending in the ledger")
        return wrong

    def _what_disagrees(self) -> list[str]:
        metrics, verified = self.counts, self._verified
        counted = self._adadecode.stats.to_dict()
        early, accepted, rejected = (
            sum(counted[name]) for name in ("early_predictions", "accepted", "rejected")
        )
        drafted, confirmed, contradicted = (
            exits + counted[f"ngram_{name}"]
            for exits, name in (
                (early, "drafts"),
                (accepted, "accepted"),
                (rejected, "rejected"),
            )
        )
        wrong = []
        # A request may end while a step with its drafts is under way, whose outcome the
        # scheduler does not take in.
        exact = not self._asynchronous
        for name in ("drafts", "draft_tokens"):
            if metrics[name] != verified[name] and (
                exact or metrics[name] > verified[name]
            ):
                wrong.append(
                    f"vLLM's metric {name} is {metrics[name]}, verified were "
                    f"{verified[name]}"
                )
        if metrics["accepted_tokens"] != confirmed and (
            exact or metrics["accepted_tokens"] > confirmed
        ):
            wrong.append(
                f"vLLM's metric accepted_tokens is {metrics['accepted_tokens']}, the "
                f"worker counted {confirmed}"
            )
        if not confirmed + contradicted <= verified["draft_tokens"] <= drafted:
            wrong.append(
                f"{confirmed} accepted + {contradicted} rejected <= "
                f"{verified['draft_tokens']} verified <= {drafted} drafted is false"
            )
        if contradicted > verified["drafts"]:
            wrong.append(
                f"{contradicted} rejected in {verified['drafts']} verifications"
            )
        for name, value in (
            ("early_predictions", early),
            ("accepted", accepted),
            ("rejected", rejected),
        ):
            if metrics[name] != value:
                wrong.append(
                    f"the metric {name} is {metrics[name]}, the worker counted {value}"
                )
        return wrong
