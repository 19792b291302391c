# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers, with KV slots for early predictions."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats

from adadecode_vllm.config import CONFIG_KEY, engine_config
from adadecode_vllm.metrics.report import CounterReport

UNUSED_DRAFTS = "adadecode_unused_drafts"
"""Attribute of a model runner's output: request id to draft slots that stayed empty."""

COUNTERS = "adadecode_counters"
"""Attribute of a model runner's output: the worker's counters after the step."""


class AdaDecodeScheduler(Scheduler):
    """Reserves the slots that drafting writes to (I3).

    vLLM reserves none for ``custom_class`` proposers, which normally bring tokens only.
    Drafting writes KV of up to ``max_early_predictions`` tokens past the scheduled
    ones. When blocks are short the reservation is dropped rather than a request
    preempted for it; the worker then predicts no further than the blocks that a request
    owns.

    It also bounds early predictions by the load: at batch sizes where the model's
    weights are no longer what a step waits for, they cannot save anything.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Read the options that start-up resolved; see vLLM."""
        super().__init__(*args, **kwargs)
        config = engine_config(self.vllm_config)
        assert config is not None, "start-up named this class for AdaDecode only"
        self._most_requests = config.disable_by_batch_size
        self._report = CounterReport()

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Say how many drafts the step may make, before vLLM makes room for them."""
        requests = len(scheduler_output.num_scheduled_tokens)
        if self._most_requests is not None and requests > self._most_requests:
            scheduler_output.num_spec_tokens_to_schedule = 0
        super()._update_after_schedule(scheduler_output)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule one step; see vLLM."""
        self.num_lookahead_tokens = self._affordable_lookahead()
        return super().schedule(*args, **kwargs)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> Any:
        """Take a step's outcome in, and the worker's counters with it."""
        self._report.update(getattr(model_runner_output, COUNTERS, None))
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """A step's statistics, with what the worker counted since the last ones."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and (added := self._report.take()) is not None:
            stats.ec_connector_stats = {CONFIG_KEY: added}
        return stats

    def _affordable_lookahead(self) -> int:
        """The cap, or 0 if reserving might take a block that a request needs.

        In one step every running request may need blocks for its scheduled tokens (the
        sampled one and its drafts) and for the reservation.
        """
        tokens = 1 + 2 * self.num_spec_tokens
        blocks = -(-tokens // self.block_size) + 1
        needed = blocks * (len(self.running) + 1)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return self.num_spec_tokens if free >= needed else 0


class AdaDecodeAsyncScheduler(AdaDecodeScheduler, AsyncScheduler):
    """The same while the previous step still runs, for Model Runner V2.

    The drafts are not known yet then: every request is scheduled with room for all that
    it may get, and the worker fills as much of it as it predicted early.
    """

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> Any:
        """Take a step's outcome in; room that stayed empty was never a draft."""
        unused = getattr(model_runner_output, UNUSED_DRAFTS, None)
        if unused:
            # vLLM keeps what a grammar forbade out of its acceptance metrics with the
            # same dictionary; that count includes the room that stayed empty.
            scheduler_output.num_invalid_spec_tokens = {
                **unused,
                **(scheduler_output.num_invalid_spec_tokens or {}),
            }
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        """Count a request's drafts; without any it is no speculative step."""
        invalid = (num_invalid_spec_tokens or {}).get(request_id, 0)
        if num_draft_tokens <= invalid:
            return spec_decoding_stats
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )
