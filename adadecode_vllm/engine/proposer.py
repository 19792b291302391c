# SPDX-License-Identifier: Apache-2.0
"""The proposer that ``speculative_config`` names, for Model Runner V1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from adadecode_vllm.config import engine_config
from adadecode_vllm.engine.adadecode import AdaDecode
from adadecode_vllm.engine.batch import AttentionBatcher, KVGroup
from adadecode_vllm.engine.limits import (
    draft_limits,
    processed_rows,
    stop_token_ids,
)
from adadecode_vllm.engine.ngram import contexts_of
from adadecode_vllm.method.drafting import DraftRequests

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch


class AdaDecodeProposer:
    """Turns vLLM's state after sampling into a drafting cycle.

    vLLM creates it and calls :meth:`load_model` once the target model is loaded. The
    model runner calls :meth:`bind`, and :meth:`propose` after each step's bookkeeping.

    Attributes:
        adadecode: The method's parts; exists after :meth:`load_model`.
    """

    adadecode: AdaDecode

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

    def bind(self, groups: Sequence[KVGroup], device: torch.device) -> None:
        """Learn the KV cache groups; called whenever they change.

        Args:
            groups: The runner's KV cache groups, in order.
            device: The model's device.
        """
        self.adadecode.executor.batcher = AttentionBatcher(groups, device)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        input_batch: InputBatch,
        requests: Mapping[str, CachedRequestState],
        *,
        step: int,
        most: int,
    ) -> list[list[int]]:
        """Predict early for every request that sampled a token.

        Args:
            sampled_token_ids: Tokens that this step yielded, per batch row; empty for
                rows whose prompt is not finished.
            input_batch: The runner's batch, after the step's bookkeeping.
            requests: Request id to the runner's state of it.
            step: Number of the current engine step.
            most: Early predictions per request that the scheduler allows in this step.

        Returns:
            Early predictions per batch row.
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
        caps = settings.caps(options, len(rows), most)
        if caps is None:
            return drafts
        states = [requests[request_id] for request_id in request_ids]
        caps = np.where(processed_rows(input_batch, rows), 0, caps)

        lookups = settings.lookups(options, len(rows))
        positions = input_batch.num_tokens_no_spec[rows].astype(np.int64) - 1
        contexts = lookup_first = None
        if lookups is not None:
            contexts, lookup_first = contexts_of(
                lookups, input_batch.token_ids_cpu, rows, positions
            )
        batcher = self.adadecode.executor.batcher
        assert batcher is not None, "bound when the KV cache was initialized"
        predicted = self.adadecode.draft(
            step,
            request_ids,
            DraftRequests(
                rows=rows,
                token_ids=input_batch.token_ids_cpu[rows, positions].astype(np.int64),
                positions=positions,
                limits=draft_limits(
                    cap=caps,
                    positions=positions,
                    owned_slots=batcher.owned_slots(rows),
                    max_model_len=self.vllm_config.model_config.max_model_len,
                    remaining=np.array([_remaining_tokens(state) for state in states]),
                ),
                stop_token_ids=[
                    stop_token_ids(state.sampling_params) for state in states
                ],
                thresholds=settings.thresholds(options),
                contexts=contexts,
                lookup_first=lookup_first,
            ),
        )
        for row, early in zip(rows, predicted, strict=True):
            drafts[row] = early
        return drafts


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
