# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers, with placeholders for early predictions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics, SchedulerStats
from vllm.v1.request import Request, RequestStatus

from adadecode_vllm.config import CONFIG_KEY, engine_config
from adadecode_vllm.engine.adaptive import AdaptiveDrafting
from adadecode_vllm.engine.counter_report import (
    COMPARED_KEY,
    CounterReport,
    drafting_seconds,
)
from adadecode_vllm.engine.finished_requests import FINISHED_KEY, RequestLog
from adadecode_vllm.engine.outcomes import (
    ADMISSION,
    BY_COSTS,
    COUNTERS,
    EXIT_COSTS,
    EXIT_SECONDS,
    UNUSED_DRAFTS,
)
from adadecode_vllm.patches import finished_outcomes
from adadecode_vllm.request_options import max_draft_tokens


@dataclass
class _MetricsOfDrafts(RequestSpecDecodeMetrics):
    """A request's metrics without the steps whose placeholders stayed empty."""

    def observe(
        self, num_draft_tokens: int, num_accepted: int, detailed: bool = False
    ) -> None:
        if num_draft_tokens > 0:
            super().observe(num_draft_tokens, num_accepted, detailed)


class AdaDecodeScheduler(Scheduler):
    """Lets requests predict early where there is something to spare.

    They take two things: tokens of a step in which drafts are verified, and KV slots
    that drafting writes to (I3), up to ``max_early_predictions`` past the scheduled
    tokens; vLLM reserves none for ``custom_class`` proposers, which normally bring
    tokens only. Neither may be taken from what must run: drafts get what the token
    budget leaves, and where blocks are short what fits into blocks that their request
    has, rather than a request be preempted, or not admitted, for them.

    It also bounds early predictions by the load: at batch sizes where the model's
    weights are no longer what a step waits for, they cannot save anything.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Read the options that start-up resolved; see vLLM."""
        super().__init__(*args, **kwargs)
        config = engine_config(self.vllm_config)
        assert config is not None, "start-up named this class for AdaDecode only"
        self._config = config
        self._report = CounterReport()
        self._requests = RequestLog()
        most, limit = self.num_spec_tokens, config.disable_by_batch_size
        groups = self.kv_cache_config.kv_cache_groups
        self._groups = len(groups)
        self._smallest_block = min(group.kv_cache_spec.block_size for group in groups)
        self._adaptive = (
            AdaptiveDrafting(self.max_num_active_reqs)
            if config.policy == "cost"
            else None
        )
        self._by_costs = True
        # Drafts of a step by its number of requests, vLLM's dynamic speculation. Where
        # it is None, vLLM fills up requests that have one token left to compute with
        # drafts that nobody made, for the sake of uniform batches.
        self._most_by_requests = [
            0 if limit is not None and requests > limit else most
            for requests in range(self.max_num_active_reqs + 1)
        ]
        self.dynamic_sd_lookup = self._drafts_by_requests()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule one step; see vLLM."""
        most = self.num_spec_tokens
        self.num_lookahead_tokens = most if self._has_blocks_for(2 * most) else 0
        if not self.num_lookahead_tokens and not self._has_blocks_for(most):
            self._keep_to_own_blocks()
        self._bound_drafts(self._spare_tokens())
        output = super().schedule(*args, **kwargs)
        if self._adaptive is not None and (
            requests := len(output.num_scheduled_tokens)
        ):
            setattr(output, ADMISSION, self._adaptive.admission(requests))
            setattr(output, EXIT_COSTS, self._adaptive.exit_costs(requests))
        return output

    def add_request(self, request: Request) -> None:
        """Take a request in; see vLLM."""
        super().add_request(request)
        if request.spec_decode_metrics is not None:
            request.spec_decode_metrics = _MetricsOfDrafts.new(self.num_spec_tokens)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> Any:
        """Take a step's outcome in, and the worker's counters with it.

        An empty placeholder was never a draft, nor is what the worker dropped.
        """
        self._report.update(getattr(model_runner_output, COUNTERS, None))
        unused = getattr(model_runner_output, UNUSED_DRAFTS, None)
        if unused:
            # vLLM keeps what a grammar forbade out of its acceptance metrics with the
            # same dictionary. That count includes empty placeholders, but not the
            # drafts that the worker dropped.
            invalid = scheduler_output.num_invalid_spec_tokens or {}
            scheduler_output.num_invalid_spec_tokens = {
                request_id: max(unused.get(request_id, 0), invalid.get(request_id, 0))
                for request_id in {**unused, **invalid}
            }
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._adaptive is not None:
            self._adapt(self._adaptive, scheduler_output, model_runner_output)
        return outputs

    def _handle_stopped_request(self, request: Request) -> bool:
        """End a request, or one's turn; see vLLM.

        The next turn begins behind what was computed. Drafts that followed the turn's
        last token were, too, but are not of the text. vLLM 0.33 takes them back itself.
        """
        computed = request.num_tokens - 1 + request.num_output_placeholders
        request.num_computed_tokens = min(request.num_computed_tokens, computed)
        return super()._handle_stopped_request(request)

    def _adapt(
        self,
        adaptive: AdaptiveDrafting,
        scheduler_output: SchedulerOutput,
        model_runner_output: Any,
    ) -> None:
        """Let a step's time decide which of the next ones draft.

        Not while thresholds decide, which a running engine may be told.
        """
        by_costs = getattr(model_runner_output, BY_COSTS, self._by_costs)
        switched, self._by_costs = by_costs is not self._by_costs, by_costs
        if not by_costs:
            adaptive.pause()
            self.dynamic_sd_lookup = self._drafts_by_requests()
            return
        requests = len(scheduler_output.num_scheduled_tokens)
        placeholders = sum(
            map(len, scheduler_output.scheduled_spec_decode_tokens.values())
        )
        unused = getattr(model_runner_output, UNUSED_DRAFTS, None) or {}
        counters = getattr(model_runner_output, COUNTERS, None)
        changed = adaptive.step(
            requests=requests,
            drafted=scheduler_output.num_spec_tokens_to_schedule > 0,
            drafts=placeholders - sum(unused.values()),
            tokens=sum(map(len, model_runner_output.sampled_token_ids)),
            decodes=scheduler_output.total_num_scheduled_tokens
            == requests + placeholders,
            busy=bool(self.running),
            drafting_seconds=None if counters is None else drafting_seconds(counters),
            exit_seconds=getattr(model_runner_output, EXIT_SECONDS, None),
        )
        if changed or switched:
            self.dynamic_sd_lookup = self._drafts_by_requests()

    def _drafts_by_requests(self) -> list[int]:
        """Drafts of a step by its number of requests, from 0 on, as things stand."""
        adaptive = self._adaptive
        if adaptive is None or not self._by_costs:
            return self._most_by_requests
        return [
            most if not count or adaptive.drafts(count) else 0
            for count, most in enumerate(self._most_by_requests)
        ]

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
        if self.log_stats:
            drafted = num_draft_tokens - invalid
            self._requests.count(request_id, drafted, num_accepted_tokens)
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """A step's statistics, with what was counted and who ended since the last."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            ours: dict[str, Any] = {}
            if (added := self._report.take()) is not None:
                ours[CONFIG_KEY] = added
            if self._adaptive and (compared := self._adaptive.take_compared()):
                ours[COMPARED_KEY] = [compared.seconds, compared.plain_seconds]
            if ended := self._requests.take():
                ours[FINISHED_KEY] = ended
            if ours:
                stats.ec_connector_stats = ours
        return stats

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Let a request that ended go; see vLLM."""
        if self.log_stats:
            self._requests.end(request)
        return super()._free_request(request, *args, **kwargs)

    def _has_blocks_for(self, drafts: int) -> bool:
        """Whether every request may get so many tokens beyond what must run.

        Counted with one started block a request, and with the request that is admitted
        next.
        """
        requests = len(self.running) + 1
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()

        def fits(tokens: int) -> bool:
            tokens += drafts * requests
            blocks = tokens // self._smallest_block + requests
            return blocks * self._groups <= free

        # A prompt is admitted where there are blocks for all of it, though a step may
        # compute a part only.
        head = self._next_admitted()
        admitted = 0 if head is None else _due_tokens(head)
        # Most caches hold several steps, whatever these consist of.
        most = self.max_num_scheduled_tokens
        return fits(most + admitted) or fits(min(most, self._due_tokens()) + admitted)

    def _keep_to_own_blocks(self) -> None:
        """Take away the drafts that would need another block."""
        for request in self.running:
            drafts = request.spec_token_ids
            if not drafts:
                continue
            owned = min(
                len(blocks) * group.kv_cache_spec.block_size
                for blocks, group in zip(
                    self.kv_cache_manager.get_block_ids(request.request_id),
                    self.kv_cache_config.kv_cache_groups,
                    strict=True,
                )
            )
            taken = request.num_tokens + request.num_output_placeholders
            request.spec_token_ids = drafts[: max(owned - taken, 0)]

    def _due_tokens(self) -> int:
        """Tokens that the running requests have to compute, without any draft."""
        chunks = [request for request in self.running if request.is_prefill_chunk]
        return len(self.running) - len(chunks) + sum(map(_due_tokens, chunks))

    def _next_admitted(self) -> Request | None:
        """The request that vLLM admits next; None where it can admit none.

        Those that hold KV come first. A session between its turns is one of them, and
        wants nothing until the next turn is there.
        """
        taken = len(self.running) + self.num_waiting_for_streaming_input
        if taken >= self.max_num_active_reqs:
            return None
        for request in self.kv_holding_waiting:
            if request.status != RequestStatus.WAITING_FOR_STREAMING_REQ:
                return request
        return self.waiting.peek_request() if self.waiting else None

    def _spare_tokens(self) -> int:
        """Tokens of the step's budget that drafts may have.

        Half of what running requests leave, where another can be admitted, and no more
        than leave it its whole prompt, where that is not cut and fits.
        """
        spare = self.max_num_scheduled_tokens - self._due_tokens()
        head = self._next_admitted()
        if head is None:
            return spare
        left = spare - _due_tokens(head)
        if left < 0 or self.scheduler_config.enable_chunked_prefill:
            return spare // 2
        return min(spare // 2, left)

    def _bound_drafts(self, spare: int) -> None:
        """Take drafts away from the requests that are scheduled last.

        Args:
            spare: Tokens that drafts may have.
        """
        if spare >= len(self.running) * self.num_spec_tokens:
            return
        for request in self.running:
            drafts = request.spec_token_ids
            if len(drafts) > spare:
                # Not in place: requests share a list of placeholders.
                request.spec_token_ids = drafts = drafts[: max(spare, 0)]
            spare -= len(drafts)


class AdaDecodeAsyncScheduler(AdaDecodeScheduler, AsyncScheduler):
    """The same while the previous step still runs, for Model Runner V2.

    The drafts are not known yet then: every request is scheduled with placeholders for
    all that it may get, and the worker fills as many as it predicted early.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Read the options that start-up resolved; see vLLM."""
        super().__init__(*args, **kwargs)
        # By request id, found once.
        self._caps: dict[str, int] = {}
        self._nothing_more = False
        finished_outcomes.install()

    def has_requests(self) -> bool:
        """Whether there is something to schedule; see vLLM."""
        return not self._nothing_more and super().has_requests()

    @contextmanager
    def nothing_more(self) -> Iterator[None]:
        """While the engine takes an outcome in, let it schedule nothing."""
        self._nothing_more = True
        try:
            yield
        finally:
            self._nothing_more = False

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Keep the next step's placeholders to what this one may predict early."""
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            self._caps.pop(request_id, None)
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[request_id]
            cap = self._cap(request)
            if len(request.spec_token_ids) > cap:
                request.spec_token_ids = request.spec_token_ids[:cap]

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        """Go on with a request's next turn, which has parameters of its own."""
        super()._update_request_as_session(session, update)
        self._caps.pop(session.request_id, None)

    def _cap(self, request: Request) -> int:
        cap = self._caps.get(request.request_id)
        if cap is None:
            params = request.sampling_params
            cap = max_draft_tokens(params, self._config)
            self._caps[request.request_id] = cap
        return cap


def _due_tokens(request: Request) -> int:
    return (
        request.num_tokens
        + request.num_output_placeholders
        - request.num_computed_tokens
    )
