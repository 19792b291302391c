# SPDX-License-Identifier: Apache-2.0
"""The proposer that ``speculative_config`` names, for Model Runner V1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from adadecode_vllm.config import engine_config
from adadecode_vllm.engine.adadecode import AdaDecode
from adadecode_vllm.engine.draft_cycle import DraftCycle, Sampled
from adadecode_vllm.engine.limits import processed_rows, stop_token_ids

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch


class AdaDecodeProposer:
    """Turns vLLM's state after sampling into a drafting cycle.

    vLLM creates it and calls :meth:`load_model` once the target model is loaded. The
    model runner calls :meth:`propose` after each step's bookkeeping.

    Attributes:
        adadecode: The method's parts; exists after :meth:`load_model`.
        cycle: Counts steps and drafts; exists after :meth:`load_model`.
    """

    adadecode: AdaDecode
    cycle: DraftCycle

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Read the options that start-up resolved.

        Args:
            vllm_config: The engine's configuration.
        """
        self.vllm_config = vllm_config
        config = engine_config(vllm_config)
        assert config is not None, "start-up named this class for AdaDecode only"
        self.config = config

    def load_model(self, target_model: nn.Module) -> None:
        """Assemble the method around the loaded model.

        Args:
            target_model: The model as vLLM loaded it.
        """
        self.adadecode = AdaDecode(target_model, self.config, self.vllm_config)
        self.adadecode.model.run_compiled(target_model)
        self.cycle = DraftCycle(
            self.adadecode, self.vllm_config.model_config.max_model_len
        )

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        input_batch: InputBatch,
        requests: Mapping[str, CachedRequestState],
        sample_hidden_states: torch.Tensor,
        scheduler_output: SchedulerOutput,
    ) -> list[list[int]]:
        """Predict early for every request that sampled a token.

        Args:
            sampled_token_ids: Tokens that this step yielded, per batch row; empty for
                rows whose prompt is not finished.
            input_batch: The runner's batch, after the step's bookkeeping.
            requests: Request id to the runner's state of it.
            sample_hidden_states: (n, d) the final norm's output of each row's verified
                drafts and of the token before them.
            scheduler_output: The step's schedule.

        Returns:
            Drafts per batch row.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows = np.array(
            [row for row, tokens in enumerate(sampled_token_ids) if tokens], np.int64
        )
        settings = self.adadecode.settings
        if settings.forbid_drafts(input_batch.req_ids):
            return drafts
        request_ids = [input_batch.req_ids[row] for row in rows]
        options = settings.options(request_ids)
        most = scheduler_output.num_spec_tokens_to_schedule
        caps = settings.caps(options, len(rows), most)
        if caps is None:
            return drafts
        states = [requests[request_id] for request_id in request_ids]
        positions = input_batch.num_tokens_no_spec[rows].astype(np.int64) - 1
        predicted = self.cycle.draft(
            Sampled(
                request_ids=request_ids,
                rows=rows,
                token_ids=input_batch.token_ids_cpu[rows, positions].astype(np.int64),
                positions=positions,
                caps=np.where(processed_rows(input_batch, rows), 0, caps),
                remaining=np.array([_remaining_tokens(state) for state in states]),
                stop_token_ids=[
                    stop_token_ids(state.sampling_params) for state in states
                ],
                final_states=sample_hidden_states,
                final_rows=_sampled_rows(
                    input_batch.req_ids, sampled_token_ids, scheduler_output
                )[rows]
                if self.adadecode.scorer.has_memory
                else None,
                options=options,
                token_table=input_batch.token_ids_cpu,
            )
        )
        for row, early in zip(rows, predicted, strict=True):
            drafts[row] = early
        return drafts


def _sampled_rows(
    request_ids: list[str],
    sampled_token_ids: list[list[int]],
    scheduler_output: SchedulerOutput,
) -> np.ndarray:
    """Which rows of a step's logits the newest tokens were sampled from.

    A request has a row for each of its drafts and one more.

    Returns:
        (B,) int64 by batch row; undefined where nothing was sampled.
    """
    drafts = scheduler_output.scheduled_spec_decode_tokens
    rows = [len(drafts.get(request_id, ())) + 1 for request_id in request_ids]
    sampled = [len(tokens) for tokens in sampled_token_ids]
    return np.cumsum(rows) - rows + sampled - 1


def _remaining_tokens(state: CachedRequestState) -> int:
    """Tokens that may follow while the same tokens may end the request.

    Below ``min_tokens`` vLLM forbids those that would end it, in the token that follows
    accepted drafts as well, whatever their number. So drafts stop short of the last
    token that must not end it.
    """
    params = state.sampling_params
    if params is None:
        return 1 << 30
    generated = len(state.output_token_ids)
    remaining = 1 << 30 if params.max_tokens is None else params.max_tokens - generated
    if generated < params.min_tokens:
        remaining = min(remaining, params.min_tokens - generated)
    return remaining
