# SPDX-License-Identifier: Apache-2.0
"""Model Runner V1 on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from adadecode_vllm.engine.adadecode import AdaDecode
from adadecode_vllm.engine.batch import AttentionBatcher, KVGroup
from adadecode_vllm.engine.greedy_verification import (
    only_largest_logits_count,
    verify_greedily,
)
from adadecode_vllm.engine.placeholder_drafts import trim_grammar
from adadecode_vllm.engine.proposer import AdaDecodeProposer
from adadecode_vllm.engine.vllm_executor import Backend
from adadecode_vllm.method.ledger import Resumable
from adadecode_vllm.method.resume import ScheduledBatch
from adadecode_vllm.patches import logits_processors

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds


class AdaDecodeCPUModelRunner(CPUModelRunner):
    """vLLM's runner, whose forward resumes pending tokens.

    Steps without a pending token run the model's own forward, segment by segment where
    there are several.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        """Create vLLM's runner; the proposer comes from ``speculative_config``.

        Args:
            vllm_config: The engine's configuration.
            device: The CPU.
        """
        with logits_processors.beside_drafts():
            super().__init__(vllm_config, device)
        self._scheduled: SchedulerOutput | None = None
        self._dropped: dict[str, int] = {}
        self._draft: Callable[[], list[list[int]]] | None = None
        self._keep_drafts_near_the_end()

    def update_max_model_len(self, max_model_len: int) -> None:
        """Take over the length for which the KV cache has room; see vLLM."""
        super().update_max_model_len(max_model_len)
        self._keep_drafts_near_the_end()

    def _keep_drafts_near_the_end(self) -> None:
        """Bound early predictions request by request.

        vLLM replaces all drafts of a batch by zeros once one request comes within
        num_speculative_tokens of the drafter's length.
        """
        self.effective_drafter_max_model_len = self.max_model_len + 2 * (
            self.num_spec_tokens + 1
        )

    @property
    def proposer(self) -> AdaDecodeProposer:
        """vLLM's ``drafter``, typed."""
        return cast(AdaDecodeProposer, self.drafter)

    @property
    def adadecode(self) -> AdaDecode:
        """The method's parts; exist once the model is loaded."""
        return self.proposer.adadecode

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Allocate the KV cache and tell the proposer about its groups."""
        super().initialize_kv_cache(*args, **kwargs)
        groups = range(len(self.kv_cache_config.kv_cache_groups))
        batcher = AttentionBatcher(
            [self._kv_group(index) for index in groups], self.device
        )
        self.adadecode.bind(Backend(batcher))
        holder = self.input_batch.thinking_budget_state_holder
        if holder is not None:
            # Requests with a budget run in steps without drafts, where vLLM would look
            # for their rows as if there were some.
            holder.in_spec_mode = False

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        """Sample; as plain vLLM does, which is cheaper, where that says the same."""
        if spec_decode_metadata is not None:
            if not spec_decode_metadata.max_spec_len:
                spec_decode_metadata = None
            elif only_largest_logits_count(self.input_batch.sampling_metadata):
                return verify_greedily(logits, spec_decode_metadata)
        return super()._sample(logits, spec_decode_metadata)

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Reload the weights, which the exit scorer then follows."""
        with self.adadecode.new_weights("weights_reloaded"):
            super().reload_weights(*args, **kwargs)

    def execute_model(
        self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None
    ) -> Any:
        """Run one engine step."""
        scheduler_output, self._dropped = self.proposer.cycle.begin(
            scheduler_output, scheduler_output.finished_req_ids
        )
        self._scheduled = scheduler_output
        return super().execute_model(scheduler_output, intermediate_tensors)

    def sample_tokens(self, grammar_output: Any) -> Any:  # type: ignore[override]
        """Sample and verify."""
        scheduled = self._scheduled
        if scheduled is not None:
            drafts = scheduled.scheduled_spec_decode_tokens
            grammar_output = trim_grammar(grammar_output, drafts, self._dropped)
        output = super().sample_tokens(grammar_output)
        self.proposer.cycle.report(output, self._dropped)
        return output

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Resume pending tokens where there are any; vLLM's override point."""
        num_reqs = self.input_batch.num_reqs
        count = np.diff(self.query_start_loc.np[: num_reqs + 1]).astype(np.int64)
        first = self.input_batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64)
        resumable = self._take_resumable(first, count)
        if resumable is None:
            return super()._model_forward(
                input_ids,
                positions,
                intermediate_tensors,
                inputs_embeds,
                **model_kwargs,
            )
        num_tokens = int(count.sum())
        batch = ScheduledBatch(
            rows=np.arange(num_reqs),
            first=first,
            count=count,
            token_ids=self.input_ids.gpu[:num_tokens],
            embeddings=None if inputs_embeds is None else inputs_embeds[:num_tokens],
        )
        return self.adadecode.forward(batch, resumable, self.positions[:num_tokens])

    def _take_resumable(self, first: np.ndarray, count: np.ndarray) -> Resumable | None:
        """Ask the ledger, offering only requests whose KV cache is still theirs."""
        ledger = self.adadecode.ledger
        scheduled = self._scheduled
        if not len(ledger) or scheduled is None:
            return None
        resumed = scheduled.scheduled_cached_reqs.resumed_req_ids
        rows = {
            request_id: self.input_batch.req_id_to_index[request_id]
            for request_id in scheduled.scheduled_cached_reqs.req_ids
            if request_id not in resumed
        }
        return ledger.take(
            self.proposer.cycle.step, rows, first, count, self.input_batch.token_ids_cpu
        )

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: Any,
        sampling_metadata: Any,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        *_: Any,
    ) -> list[list[int]]:
        """Count what was accepted, and draft once the step's tokens are on their way.

        Args:
            scheduler_output: The step's.
            sampled_token_ids: Tokens that the step yielded, per batch row.
            sampling_metadata: Unused.
            hidden_states: Unused.
            sample_hidden_states: (n, d) final states that the step's logits came from.

        Returns:
            No drafts per batch row; see :meth:`take_draft_token_ids`.
        """
        self.proposer.cycle.record_acceptance(
            self.input_batch.req_ids,
            [len(tokens) for tokens in sampled_token_ids],
            scheduler_output,
        )
        self._draft = partial(
            self.proposer.propose,
            sampled_token_ids,
            self.input_batch,
            self.requests,
            sample_hidden_states,
            scheduler_output,
        )
        return [[] for _ in sampled_token_ids]

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Predict early; the engine asks after it sent the step's tokens off.

        Returns:
            Early predictions per request.
        """
        draft, self._draft = self._draft, None
        if draft is not None:
            self._draft_token_ids = draft()
        return super().take_draft_token_ids()

    def _kv_group(self, index: int) -> KVGroup:
        def table() -> Any:
            return self.input_batch.block_table[index]

        return KVGroup(
            block_table=lambda: table().block_table.gpu,
            block_size=table().block_size,
            blocks_owned=lambda: table().num_blocks_per_row,
            layer_names=self.kv_cache_config.kv_cache_groups[index].layer_names,
            attention_groups=self.attn_groups[index],
        )
