# SPDX-License-Identifier: Apache-2.0
"""The speculator that ``speculative_config`` names, for Model Runner V2.

V2 leaves sampled tokens on the device and, with asynchronous scheduling, learns the
next step's batch before it knows them. The host decides here after every exit whether a
request predicts early or goes deeper, so it also knows how many drafts there really
are: steps are scheduled with placeholders up to the cap, and empty ones are removed
when a step starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from adadecode_vllm.engine.draft_cycle import Sampled
from adadecode_vllm.engine.host_copy import HostCopy
from adadecode_vllm.engine.limits import stop_token_ids
from adadecode_vllm.engine.placeholder_drafts import trim_grammar
from adadecode_vllm.engine.speculator_setup import SpeculatorSetup
from adadecode_vllm.method.ledger import Resumable
from adadecode_vllm.method.resume import ScheduledBatch
from adadecode_vllm.request_options import RequestOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState


class AdaDecodeSpeculator(SpeculatorSetup):
    """Turns vLLM's state after sampling into a drafting cycle.

    A request's row in the block tables is its index in ``RequestState``.

    Attributes:
        drafts: Request id to early predictions that no step has verified yet.
        waited: Whether the host knows what the last step sampled.
    """

    # What the runner reads of a speculator.
    supports_mm_inputs = False
    draft_logits = None

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        """Read the options that start-up resolved and allocate the buffers.

        Args:
            vllm_config: The engine's configuration.
            device: The model's device.
            req_states: vLLM's request states.
        """
        super().__init__(vllm_config, device, req_states.max_model_len)
        self.drafts: dict[str, list[int]] = {}
        self.waited = False
        self._async = bool(vllm_config.scheduler_config.async_scheduling)
        self._states = req_states
        self._stops: dict[str, frozenset[int]] = {}
        # Verified tokens with KV, by row: exact, where vLLM's host copy is an upper
        # bound under asynchronous scheduling.
        self._computed = np.zeros(req_states.max_num_reqs, np.int64)
        self._draft_tokens = torch.zeros_like(req_states.draft_tokens)
        self._outcome = HostCopy(2 * req_states.max_num_reqs, torch.int64, device)
        self._scheduled: SchedulerOutput | None = None
        self._new: set[str] = set()
        self._empty: dict[str, int] = {}
        self._warming_up = False

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """While vLLM runs made-up requests, verify the drafts that it made up.

        The kernels of verification would otherwise be compiled on the first request.
        """
        self._warming_up = True
        try:
            yield
        finally:
            self._warming_up = False
            self.adadecode.reset_counters()

    def start_step(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        """Take a step's schedule in.

        Args:
            scheduler_output: What the scheduler asks for; is left as it is.

        Returns:
            The same, with no more drafts per request than were really predicted.
        """
        gone = scheduler_output.finished_req_ids | (
            scheduler_output.preempted_req_ids or set()
        )
        self._new = {request.req_id for request in scheduler_output.scheduled_new_reqs}
        for request_id in gone | self._new:
            self.drafts.pop(request_id, None)
            self._stops.pop(request_id, None)
        drafts = None if self._warming_up else self.drafts
        scheduler_output, self._empty = self.cycle.begin(scheduler_output, gone, drafts)
        self._scheduled = scheduler_output
        return scheduler_output

    @property
    def unused_drafts(self) -> dict[str, int]:
        """Request id to draft slots of this step that stayed empty."""
        return self._empty

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Remember what ends the new requests; their rows exist by now."""
        for request in scheduler_output.scheduled_new_reqs:
            row = self._states.req_id_to_index[request.req_id]
            self._computed[row] = request.num_computed_tokens
            params = request.sampling_params
            self._stops[request.req_id] = stop_token_ids(params)

    def may_resume(self, scheduler_output: SchedulerOutput) -> bool:
        """Whether the step has a request with pending tokens."""
        request_ids = self.adadecode.ledger.request_ids
        return any(
            request_id in scheduler_output.num_scheduled_tokens
            for request_id in request_ids
        )

    def resumable(
        self, input_batch: InputBatch
    ) -> tuple[ScheduledBatch, Resumable] | None:
        """Ask the ledger what of a batch has come some way already.

        Requests that are new to the runner, also those resumed after a preemption, have
        no KV that the ledger knows of.

        Args:
            input_batch: The step's batch, in its final order.

        Returns:
            The batch as the core sees it and what may be resumed of it, or None.
        """
        scheduled = self._scheduled
        if scheduled is None or not len(self.adadecode.ledger):
            return None
        rows = input_batch.idx_mapping_np.astype(np.int64)
        count = input_batch.num_scheduled_tokens.astype(np.int64)
        # Without asynchronous scheduling the scheduler's own count is exact, and
        # independent of ours.
        first = (
            self._computed[rows]
            if self._async
            else input_batch.num_computed_tokens_np.astype(np.int64)
        )
        resumable = self.adadecode.ledger.take(
            self.cycle.step,
            {
                request_id: index
                for index, request_id in enumerate(input_batch.req_ids)
                if request_id not in self._new
            },
            first,
            count,
            None,
        )
        if resumable is None:
            return None
        batch = ScheduledBatch(
            rows=rows,
            first=first,
            count=count,
            token_ids=input_batch.input_ids[: input_batch.num_tokens],
        )
        return batch, resumable

    def trim_grammar(self, grammar_output: GrammarOutput | None) -> Any:
        """Remove the grammar's rows for this step's empty placeholders."""
        scheduled = self._scheduled
        assert scheduled is not None, "called within a step"
        drafts = scheduled.scheduled_spec_decode_tokens
        return trim_grammar(grammar_output, drafts, self._empty)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Predict early for every request that sampled a token; see vLLM.

        Args:
            input_batch: The step's batch of R requests.
            attn_metadata: Unused, as are the other arguments that are not named here:
                drafting builds metadata of its own and samples nothing.
            slot_mappings: Unused.
            last_hidden_states: (N, d) the final norm's output.
            aux_hidden_states: Unused.
            num_sampled: (R,) int32, tokens that the step yielded.
            num_rejected: Unused.
            last_sampled: (max_requests, 1) int64, newest token by row.
            next_prefill_tokens: Unused.
            temperature: Unused.
            seeds: Unused.
            dp_sync_state: Unused.
            dummy_run: The batch is made up.
            skip_attn_for_dummy_run: Unused.
            mm_inputs: Unused.
            is_profile: vLLM measures the memory that a step takes.
            num_speculative_tokens: The scheduler's cap for this step.

        Returns:
            (R, k) int64 early predictions; what is beyond a request's is undefined.
        """
        num_reqs = input_batch.num_reqs
        if dummy_run:
            if is_profile:
                self.adadecode.model.warm_up(input_batch.num_tokens)
            return self._draft_tokens[:num_reqs]

        rows = input_batch.idx_mapping_np.astype(np.int64)
        drafted = input_batch.num_draft_tokens_per_req
        if drafted is None:
            drafted = np.zeros(num_reqs, np.int64)
        reached = self._computed[rows] + input_batch.num_scheduled_tokens
        settings = self.adadecode.settings
        options = settings.options(input_batch.req_ids)
        most = self._draft_tokens.shape[1]
        if num_speculative_tokens is not None:
            most = min(most, num_speculative_tokens)
        if settings.forbid_drafts(input_batch.req_ids):
            most = 0
        caps = settings.caps(options, num_reqs, most)
        tokens = None
        # A step that holds only parts of prompts samples nothing.
        samples = reached >= input_batch.prefill_len_np
        if not samples.any():
            caps = None
        self.waited = caps is not None or bool(input_batch.num_draft_tokens)
        if self.waited:
            outcome = torch.stack(
                (
                    num_sampled[:num_reqs].to(torch.int64),
                    last_sampled[input_batch.idx_mapping, 0],
                )
            )
            sampled, tokens = self._outcome(outcome).copy()
        else:
            # Nothing to wait for: a finished prompt yields one token.
            sampled = samples.astype(np.int64)
        self._computed[rows] = reached - np.where(sampled > 0, drafted + 1 - sampled, 0)
        assert self._scheduled is not None, "called within a step"
        self.cycle.record_acceptance(
            input_batch.req_ids, sampled.tolist(), self._scheduled
        )
        for request_id in input_batch.req_ids:
            self.drafts[request_id] = []
        if caps is None or tokens is None:
            return self._draft_tokens[:num_reqs]
        return self._predict(
            input_batch, rows, sampled, tokens, caps, options, last_hidden_states
        )

    def _predict(
        self,
        input_batch: InputBatch,
        rows: np.ndarray,
        sampled: np.ndarray,
        tokens: np.ndarray,
        caps: np.ndarray,
        options: list[RequestOptions] | None,
        final: torch.Tensor,
    ) -> torch.Tensor:
        active = np.flatnonzero(sampled > 0)
        answer = self._draft_tokens[: input_batch.num_reqs]
        if not len(active):
            return answer
        rows = rows[active]
        positions = self._computed[rows]
        request_ids = [input_batch.req_ids[index] for index in active]
        final_rows = None
        if self.adadecode.scorer.has_memory:
            # The logits of a request are those of its last tokens.
            logits = np.diff(input_batch.cu_num_logits_np)[active]
            ends = input_batch.query_start_loc_np[1:][active]
            final_rows = (ends - logits + sampled[active] - 1).astype(np.int64)
        predicted = self.cycle.draft(
            Sampled(
                request_ids=request_ids,
                rows=rows,
                token_ids=tokens[active],
                positions=positions,
                caps=caps[active],
                remaining=self._states.max_seq_len[rows] - positions - 1,
                stop_token_ids=[
                    self._stops.get(request_id, frozenset())
                    for request_id in request_ids
                ],
                final_states=final,
                final_rows=final_rows,
                options=options and [options[index] for index in active],
                token_table=_host_token_ids(self._states),
                alone=len(active) == input_batch.num_reqs,
            )
        )
        if not any(predicted):
            return answer
        table = np.zeros(answer.shape, np.int64)
        for index, request_id, early in zip(
            active, request_ids, predicted, strict=True
        ):
            self.drafts[request_id] = early
            table[index, : len(early)] = early
        return async_tensor_h2d(table, out=answer)


def _host_token_ids(states: RequestState) -> np.ndarray | None:
    """(max_requests, max_model_len) int32; None where only the device has them.

    vLLM keeps them in memory that host and device share. What a step sampled is there
    once its outcome, which is copied after that, has arrived.
    """
    table: Any = states.all_token_ids
    if table.gpu.device.type == "cpu":
        return table.gpu.numpy()
    shared = getattr(table, "_uva_buf", None)
    return None if shared is None else shared.np
