# SPDX-License-Identifier: Apache-2.0
"""The proposer that ``speculative_config`` names, for Model Runner V1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from adadecode_vllm.config import engine_config
from adadecode_vllm.core.adadecode import AdaDecode
from adadecode_vllm.core.batch import AttentionBatcher, KVGroup
from adadecode_vllm.core.drafting import DraftRequests
from adadecode_vllm.runner.limits import (
    draft_limits,
    processed_rows,
    stop_token_ids,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    from adadecode_vllm.runner.v1 import AdaDecodeCPUModelRunner


class AdaDecodeProposer:
    """Turns vLLM's state after sampling into a drafting cycle.

    vLLM creates it, calls :meth:`load_model` once the target model is loaded and
    :meth:`propose` after each step's bookkeeping. The model runner calls :meth:`bind`.

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
        self._runner: AdaDecodeCPUModelRunner | None = None

    def load_model(self, target_model: nn.Module) -> None:
        """Assemble the method around the loaded model.

        Args:
            target_model: The model as vLLM loaded it.
        """
        self.adadecode = AdaDecode(target_model, self.config, self.vllm_config)

    def bind(self, runner: AdaDecodeCPUModelRunner) -> None:
        """Learn the runner's KV cache groups; called whenever they change.

        Args:
            runner: The model runner.
        """
        self._runner = runner
        groups = [
            _kv_group(runner, index)
            for index in range(len(runner.kv_cache_config.kv_cache_groups))
        ]
        self.adadecode.executor.batcher = AttentionBatcher(groups, runner.device)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Predict early for every request that sampled a token.

        Args:
            sampled_token_ids: Tokens that this step yielded, per batch row; empty for
                rows whose prompt is not finished.
            num_tokens_no_spec: (max_requests,) verified tokens per row.
            token_ids_cpu: (max_requests, max_model_len) token ids.
            slot_mappings: Unused: drafting computes slots of its own.

        Returns:
            Early predictions per batch row.
        """
        runner = self._runner
        assert runner is not None, "bound when the KV cache was initialized"
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        runner.count_verdicts(sampled_token_ids)
        rows = np.array(
            [row for row, tokens in enumerate(sampled_token_ids) if tokens], np.int64
        )
        request_ids = [runner.input_batch.req_ids[row] for row in rows]
        states = [runner.requests[request_id] for request_id in request_ids]
        settings = self.adadecode.settings
        if settings.forbid_drafts(runner.input_batch.req_ids):
            return drafts
        options = settings.options(request_ids)
        caps = settings.caps(options, len(rows), runner.most_drafts)
        if caps is None:
            return drafts
        caps = np.where(processed_rows(runner.input_batch, rows), 0, caps)

        positions = num_tokens_no_spec[rows].astype(np.int64) - 1
        batcher = self.adadecode.executor.batcher
        assert batcher is not None, "bound when the KV cache was initialized"
        predicted = self.adadecode.draft(
            runner.step,
            request_ids,
            DraftRequests(
                rows=rows,
                token_ids=token_ids_cpu[rows, positions].astype(np.int64),
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


def _kv_group(runner: AdaDecodeCPUModelRunner, index: int) -> KVGroup:
    def table() -> Any:
        return runner.input_batch.block_table[index]

    return KVGroup(
        block_table=lambda: table().block_table.gpu,
        block_size=table().block_size,
        blocks_owned=lambda: table().num_blocks_per_row,
        layer_names=runner.kv_cache_config.kv_cache_groups[index].layer_names,
        attention_groups=runner.attn_groups[index],
    )
