# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2, vLLM's default on CUDA."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from adadecode_vllm.engine.adadecode import AdaDecode
from adadecode_vllm.engine.speculator import AdaDecodeSpeculator
from adadecode_vllm.engine.verification_graphs import add_verification_graphs
from adadecode_vllm.patches import init_speculator

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import BatchReqState

    from adadecode_vllm.method.ledger import Resumable
    from adadecode_vllm.method.resume import ScheduledBatch


class AdaDecodeModelRunner(GPUModelRunner):
    """vLLM's runner, whose forward resumes pending tokens.

    Steps without a pending token run the model's unchanged forward, in vLLM's own
    CUDA graphs.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        """Create vLLM's runner; the speculator comes from ``speculative_config``.

        Args:
            vllm_config: The engine's configuration.
            device: The device.
        """
        self._resume: tuple[ScheduledBatch, Resumable] | None = None
        self._resumed: torch.Tensor | None = None
        self._batch_ids: list[str] = []
        with init_speculator.custom_class():
            super().__init__(vllm_config, device)

    @property
    def proposer(self) -> AdaDecodeSpeculator:
        """vLLM's ``speculator``, typed."""
        return cast(AdaDecodeSpeculator, self.speculator)

    @property
    def adadecode(self) -> AdaDecode:
        """The method's parts; exist once the model is loaded."""
        return self.proposer.adadecode

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then split it."""
        super().load_model(*args, **kwargs)
        self.proposer.load(self.model)
        self._intercept_forward()

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Allocate the KV cache and tell the speculator about its groups.

        vLLM captures whole-model graphs for 1 + k tokens a request, the batch that
        other methods verify. Here that batch resumes, segment by segment; what runs
        the whole model in one graph is one token a request, as without speculation,
        and, where no draft has passed a layer, any mix of lengths up to 1 + k.
        """
        decode_query_len = self.decode_query_len
        self.decode_query_len = self.model_state.num_new_sampled_tokens_per_step
        try:
            super().initialize_kv_cache(*args, **kwargs)
        finally:
            self.decode_query_len = decode_query_len
        if self.adadecode.model.num_segments == 1:
            add_verification_graphs(self, self.adadecode.states.window)
        self.proposer.bind(self)

    def execute_model(  # type: ignore[override]
        self,
        scheduler_output: SchedulerOutput,
        intermediate_tensors: Any = None,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run one engine step up to its hidden states."""
        if dummy_run:
            return super().execute_model(
                scheduler_output, intermediate_tensors, dummy_run=True, **kwargs
            )
        scheduler_output = self.proposer.start_step(scheduler_output)
        self._batch_ids = list(scheduler_output.num_scheduled_tokens)
        # In a real step `is_profile` says one thing only: call the model itself, on
        # exactly the scheduled tokens, not a graph of it on padded ones.
        kwargs["is_profile"] = self.proposer.may_resume(scheduler_output)
        return super().execute_model(scheduler_output, intermediate_tensors, **kwargs)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Take new requests in."""
        super().add_requests(scheduler_output)
        self.proposer.add_requests(scheduler_output)

    def prepare_inputs(
        self,
        scheduler_output: SchedulerOutput,
        batch_req_state: BatchReqState,
        batch_desc: BatchExecutionDescriptor,
        *args: Any,
        **kwargs: Any,
    ) -> InputBatch:
        """Put the batch together and find out what of it can be resumed.

        What runs in CUDA graphs of its own is launched here: the device works on it
        while vLLM prepares an attention that only its own forward would use.
        """
        input_batch = super().prepare_inputs(
            scheduler_output, batch_req_state, batch_desc, *args, **kwargs
        )
        # A graph of any mix of lengths promises its attention the longest.
        input_batch.max_query_len = batch_desc.max_query_len
        self._resume = self.proposer.resumable(input_batch)
        self._resumed = None
        if self._resume is not None and not self.uses_inputs_embeds:
            batch, resumable = self._resume
            if self.adadecode.runs_in_steps(batch):
                self._resumed = self.adadecode.forward(
                    batch, resumable, input_batch.positions
                )
        return input_batch

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """Sample, verify and draft."""
        output = super().sample_tokens(self.proposer.trim_grammar(grammar_output))
        self.proposer.cycle.report(output, self.proposer.unused_drafts)
        # What drafting has waited for need not be waited for elsewhere. A grammar sees
        # drafts only in steps that are scheduled before the outcome is known.
        waited = self.proposer.waited and grammar_output is None
        if waited and isinstance(output, AsyncOutput):
            return output.get_output()
        return output

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """The drafts of the last step, as many as there are for each request."""
        drafts = self.proposer.drafts
        return DraftTokenIds(
            self._batch_ids,
            [list(drafts.get(request_id, ())) for request_id in self._batch_ids],
        )

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Reload the weights, which the exit scorer then follows."""
        with self.adadecode.new_weights("weights_reloaded"):
            super().reload_weights(*args, **kwargs)

    def _intercept_forward(self) -> None:
        """Run a resumed forward where vLLM calls the model.

        V1 has ``_model_forward`` for that. V2 calls ``self.model(...)`` in the middle
        of ``execute_model``, under the batch's forward context, so the model's own
        ``forward`` is the narrowest place.
        """
        plain_forward = self.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            resume, self._resume = self._resume, None
            if resume is None:
                return plain_forward(*args, **kwargs)
            resumed, self._resumed = self._resumed, None
            if resumed is not None:
                return resumed
            batch, resumable = resume
            embeddings = kwargs.get("inputs_embeds")
            if embeddings is not None:
                batch = replace(batch, embeddings=embeddings)
            return self.adadecode.forward(batch, resumable, kwargs["positions"])

        self.model.forward = forward
