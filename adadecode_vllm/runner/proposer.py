# SPDX-License-Identifier: Apache-2.0
"""The proposer that ``speculative_config`` names, for Model Runner V1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from adadecode_vllm.config import CONFIG_KEY, parse_config
from adadecode_vllm.core.adadecode import AdaDecode
from adadecode_vllm.core.batch import AttentionBatcher, KVGroup
from adadecode_vllm.core.drafting import DraftRequests

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
        additional_config = vllm_config.additional_config
        assert isinstance(additional_config, dict), "start-up wrote the options there"
        self.config = parse_config(additional_config[CONFIG_KEY])
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
        if not self.adadecode.policy.can_predict:
            return drafts
        rows = np.array(
            [row for row, tokens in enumerate(sampled_token_ids) if tokens], np.int64
        )
        if not len(rows):
            return drafts

        positions = num_tokens_no_spec[rows].astype(np.int64) - 1
        tokens = token_ids_cpu[rows, positions].astype(np.int64)
        request_ids = [runner.input_batch.req_ids[row] for row in rows]
        states = [runner.requests[request_id] for request_id in request_ids]
        stops = [_stop_token_ids(state) for state in states]
        limits = self._limits(rows, positions, states)
        ended = [token in stop for token, stop in zip(tokens, stops, strict=True)]
        limits[ended] = 0

        drafting = np.flatnonzero(limits > 0)
        if not len(drafting):
            return drafts
        request_ids = [request_ids[request] for request in drafting]
        predicted = self.adadecode.draft(
            runner.step,
            request_ids,
            DraftRequests(
                rows=rows[drafting],
                token_ids=tokens[drafting],
                positions=positions[drafting],
                limits=limits[drafting],
                stop_token_ids=[stops[request] for request in drafting],
            ),
        )
        for row, early in zip(rows[drafting], predicted, strict=True):
            drafts[row] = early
        return drafts

    def _limits(
        self,
        rows: np.ndarray,
        positions: np.ndarray,
        states: list[CachedRequestState],
    ) -> np.ndarray:
        """Most early predictions per request.

        Bounded by the cap, by the KV slots that the request owns (I3), by the model's
        length (vLLM schedules no token that leaves no room for a sampled one) and by
        what the request may still generate.
        """
        batcher = self.adadecode.executor.batcher
        assert batcher is not None, "bound when the KV cache was initialized"
        max_model_len = self.vllm_config.model_config.max_model_len
        remaining = np.fromiter(
            (_remaining_tokens(state) for state in states), np.int64, len(states)
        )
        bounds = (
            np.full(len(rows), self.adadecode.policy.max_early_predictions),
            batcher.owned_slots(rows) - positions,
            max_model_len - 2 - positions,
            remaining - 1,
        )
        return np.maximum(np.min(bounds, axis=0), 0)


def _remaining_tokens(state: CachedRequestState) -> int:
    params = state.sampling_params
    if params is None or params.max_tokens is None:
        return 1 << 30
    return params.max_tokens - len(state.output_token_ids)


def _stop_token_ids(state: CachedRequestState) -> set[int]:
    """Tokens that end the request, so that nothing after them is kept."""
    params = state.sampling_params
    if params is None:
        return set()
    stops = set(params.stop_token_ids or ())
    if params.eos_token_id is not None:
        stops.add(params.eos_token_id)
    return stops


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
