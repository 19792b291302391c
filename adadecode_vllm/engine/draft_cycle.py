# SPDX-License-Identifier: Apache-2.0
"""What both model runners do around a step: one drafting cycle after another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from adadecode_vllm.engine.limits import draft_limits
from adadecode_vllm.engine.ngram import contexts_of
from adadecode_vllm.engine.outcomes import (
    ADMISSION,
    BY_COSTS,
    COUNTERS,
    EXIT_COSTS,
    EXIT_SECONDS,
    EXIT_SECONDS_EVERY,
    UNUSED_DRAFTS,
)
from adadecode_vllm.engine.placeholder_drafts import fill_placeholders
from adadecode_vllm.method.admission import Admission
from adadecode_vllm.method.cycle import DraftRequests

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.sched.output import SchedulerOutput

    from adadecode_vllm.engine.adadecode import AdaDecode
    from adadecode_vllm.request_options import RequestOptions


@dataclass(frozen=True)
class Sampled:
    """R requests that have just sampled a token, as a model runner sees them.

    Attributes:
        request_ids: R request ids.
        rows: (R,) int64, rows in the block tables.
        token_ids: (R,) int64, the newest tokens.
        positions: (R,) int64, their positions.
        caps: (R,) int64, most drafts that each asks for and the step allows.
        remaining: (R,) int64, tokens that each may still generate.
        stop_token_ids: R collections of tokens after which nothing will be kept.
        final_states: (N, d) what the final norm returned in this step.
        final_rows: (R,) int64, the rows that the newest tokens were sampled from; None
            where no head has memory.
        options: R requests' own options; None where all leave them to the engine.
        token_table: (max_requests, max_model_len) int32, all tokens by row, for n-gram
            lookup; None where the host does not have them.
        alone: Whether the step held these requests only.
    """

    request_ids: Sequence[str]
    rows: np.ndarray
    token_ids: np.ndarray
    positions: np.ndarray
    caps: np.ndarray
    remaining: np.ndarray
    stop_token_ids: list[Collection[int]]
    final_states: torch.Tensor
    final_rows: np.ndarray | None
    options: Sequence[RequestOptions] | None = None
    token_table: np.ndarray | None = None
    alone: bool = False


class DraftCycle:
    """Counts steps, admits requests, drafts and counts what became of the drafts.

    Attributes:
        adadecode: The method's parts.
        step: Number of the current engine step.
        max_model_len: Most tokens of a request.
    """

    def __init__(self, adadecode: AdaDecode, max_model_len: int) -> None:
        """Start before the first step.

        Args:
            adadecode: The method's parts.
            max_model_len: The model's length.
        """
        self.adadecode = adadecode
        self.step = 0
        self._admission: float | None = None
        self._exit_costs: Sequence[float] = ()
        self.max_model_len = max_model_len

    def begin(
        self,
        scheduler_output: SchedulerOutput,
        gone: Collection[str],
        drafts: Mapping[str, Sequence[int]] | None = None,
    ) -> tuple[SchedulerOutput, dict[str, int]]:
        """Take a step's schedule in.

        Args:
            scheduler_output: What the scheduler asks for; is left as it is.
            gone: Requests to forget.
            drafts: Request id to drafts, where the schedule has only placeholders;
                None where it names them itself.

        Returns:
            The same with the drafts that there are and that the step may have, and
            request id to drafts removed.
        """
        self.step += 1
        self._admission = getattr(scheduler_output, ADMISSION, None)
        self._exit_costs = getattr(scheduler_output, EXIT_COSTS, ())
        self.adadecode.forget(gone)
        settings = self.adadecode.settings
        for request in scheduler_output.scheduled_new_reqs:
            settings.admit(request.req_id, request.sampling_params)
        if settings.forbid_drafts(scheduler_output.num_scheduled_tokens):
            drafts = {}
        if drafts is None:
            return scheduler_output, {}
        return fill_placeholders(scheduler_output, drafts)

    def report(self, outcome: Any, unused: Mapping[str, int]) -> None:
        """Let the scheduler know with a step's outcome what it reads there.

        The runners do this and not the workers, which Ray's first executor bypasses.

        Args:
            outcome: What vLLM's runner returned. With asynchronous scheduling it is
                wrapped in a copy under way; where nothing was sampled there is none.
            unused: Request id to draft slots that stayed empty.
        """
        found = getattr(outcome, "model_runner_output", outcome)
        # What all empty steps share would show old counters in a later one.
        if (
            not isinstance(found, ModelRunnerOutput)
            or found is EMPTY_MODEL_RUNNER_OUTPUT
        ):
            return
        setattr(found, COUNTERS, self.adadecode.counters())
        if self.step % EXIT_SECONDS_EVERY == 0:
            setattr(found, EXIT_SECONDS, self.adadecode.stats.exit_seconds())
        setattr(found, BY_COSTS, self.adadecode.settings.by_costs)
        if unused:
            setattr(found, UNUSED_DRAFTS, unused)

    def record_acceptance(
        self,
        request_ids: Sequence[str],
        sampled: Sequence[int],
        scheduler_output: SchedulerOutput,
    ) -> None:
        """Count what the step's verification said.

        Args:
            request_ids: The step's requests.
            sampled: Tokens that the step yielded for each.
            scheduler_output: The step's schedule, with the drafts that there were.
        """
        drafts = scheduler_output.scheduled_spec_decode_tokens
        self.adadecode.record_acceptance(
            {
                request_id: tokens
                for request_id, tokens in zip(request_ids, sampled, strict=True)
                if tokens
            },
            {request_id: len(tokens) for request_id, tokens in drafts.items()},
        )

    def draft(self, sampled: Sampled) -> list[list[int]]:
        """Predict early for requests that sampled a token.

        Args:
            sampled: The requests.

        Returns:
            R lists of drafts.
        """
        settings = self.adadecode.settings
        rows, positions = sampled.rows, sampled.positions
        contexts = ways = None
        lookups = settings.lookups(sampled.options, len(rows))
        if lookups is not None and sampled.token_table is not None:
            contexts = contexts_of(lookups, sampled.token_table, rows, positions)
            ways = lookups
        owned_slots = self.adadecode.executor.backend.batcher.owned_slots(rows)
        return self.adadecode.draft(
            self.step,
            sampled.request_ids,
            DraftRequests(
                rows=rows,
                token_ids=sampled.token_ids,
                positions=positions,
                limits=draft_limits(
                    cap=sampled.caps,
                    positions=positions,
                    owned_slots=owned_slots,
                    max_model_len=self.max_model_len,
                    remaining=sampled.remaining,
                ),
                stop_token_ids=sampled.stop_token_ids,
                slots_left=owned_slots - positions,
                thresholds=settings.thresholds(sampled.options),
                alone=sampled.alone,
                contexts=contexts,
                ways=ways,
                final_states=sampled.final_states,
                final_rows=sampled.final_rows,
                admission=self._admit(sampled),
            ),
        )

    def _admit(self, sampled: Sampled) -> Admission | None:
        """What drafts must promise, where the scheduler knows what they cost."""
        if self._admission is None or not self.adadecode.settings.by_costs:
            return None
        least = np.full(len(sampled.rows), self._admission)
        for index, own in enumerate(sampled.options or ()):
            if own.threshold is not None:
                least[index] = np.nan
        return self.adadecode.record.admission(
            sampled.request_ids, least, self._exit_costs
        )
