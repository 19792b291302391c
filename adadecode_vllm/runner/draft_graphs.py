# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of a draft step: one token a request through a segment and its gate.

One graph holds the step from the request's row to the gate's answer: block-table rows,
slots and lengths are worked out on the device, the segment runs under attention
metadata that the graph itself refreshes, hidden states go to the pending states and the
head's token and probability to one small tensor. The host sends one packed copy,
replays, and waits for the answer, because what runs next depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.attn_utils import (
    build_attn_metadata,
    build_slot_mappings_by_layer,
)
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
)

from adadecode_vllm.core.executor import FrontTokens
from adadecode_vllm.core.host_copy import HostCopy

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from adadecode_vllm.core.states import PendingStates
    from adadecode_vllm.core.vllm_executor import VllmExecutor
    from adadecode_vllm.runner.v2 import AdaDecodeModelRunner

logger = init_logger("vllm.adadecode")

# Rows of the packed input.
_ROW, _POSITION, _STATE, _TOKEN = range(4)


class DraftBuffers:
    """Persistent tensors that the graphs of all segments read and write.

    Sized for N = ``max_num_seqs`` requests. Draft steps run one after another, so one
    set is enough.
    """

    def __init__(self, runner: AdaDecodeModelRunner, states: PendingStates) -> None:
        """Allocate them.

        Args:
            runner: The model runner, with its KV cache.
            states: The pending tokens' states.
        """
        device, size = runner.device, runner.max_num_reqs
        self.runner = runner
        self.states = states
        pin = device.type == "cuda"
        self._host = torch.zeros((4, size), dtype=torch.int64, pin_memory=pin)
        self._host_np = self._host.numpy()
        self.inputs = torch.zeros((4, size), dtype=torch.int64, device=device)
        self.positions = torch.zeros(size, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(size, dtype=torch.int32, device=device)
        self._query_start_cpu = torch.arange(size + 1, dtype=torch.int32)
        self._query_start = self._query_start_cpu.to(device)
        tables = runner.block_tables
        self._tables = [table.gpu for table in tables.block_tables]
        self._block_sizes = list(tables.block_sizes)
        self.block_tables = [torch.zeros_like(table) for table in self._tables]
        self.slots = torch.full(
            (len(self._tables), size), PAD_SLOT_ID, dtype=torch.int64, device=device
        )
        self.answers = torch.zeros((size, 2), dtype=torch.float64, device=device)
        self.to_host = HostCopy(2 * size, torch.float64, device)

    def send(self, tokens: FrontTokens | None, padded: int) -> None:
        """Copy a step's inputs to the device, asynchronously.

        The previous step's answer was waited for, so its copy is done.

        Args:
            tokens: The R tokens; None for none.
            padded: Requests that the graph was captured for, at least R.
        """
        host = self._host_np
        count = 0
        if tokens is not None:
            count = len(tokens.rows)
            host[_ROW, :count] = tokens.rows
            host[_POSITION, :count] = tokens.positions
            host[_STATE, :count] = tokens.states
            host[_TOKEN, :count] = tokens.token_ids
        if count < padded:
            host[_ROW, count:padded] = -1
            host[_POSITION, count:padded] = 0
            host[_STATE, count:padded] = self.states.padding_row
            host[_TOKEN, count:padded] = 0
        self.inputs.copy_(self._host, non_blocking=True)

    def metadata(self, size: int) -> dict[str, Any]:
        """Attention metadata over these buffers, valid for any sequence length."""
        runner = self.runner
        return build_attn_metadata(
            attn_groups=runner.attn_groups,
            num_reqs=size,
            num_tokens=size,
            query_start_loc_gpu=self._query_start[: size + 1],
            query_start_loc_cpu=self._query_start_cpu[: size + 1],
            max_query_len=1,
            seq_lens=self.seq_lens,
            max_seq_len=runner.max_model_len,
            block_tables=[table[:size] for table in self.block_tables],
            slot_mappings=self.slots[:, :size],
            kv_cache_config=runner.kv_cache_config,
            seq_lens_cpu_upper_bound=torch.full(
                (size,), runner.max_model_len, dtype=torch.int32
            ),
            positions=self.positions[:size],
            is_prefilling=torch.zeros(size, dtype=torch.bool),
            for_cudagraph_capture=True,
        )

    def slots_by_layer(self, size: int) -> dict[str, torch.Tensor]:
        """KV slots per layer name, views of these buffers."""
        return build_slot_mappings_by_layer(
            self.slots[:, :size], self.runner.kv_cache_config
        )

    def refresh(self, size: int, metadata: dict[str, Any]) -> None:
        """Work out what the attention needs, on the device; part of the graph.

        Padding reads the first token of some row and writes nothing.
        """
        row = self.inputs[_ROW, :size]
        position = self.positions[:size]
        position.copy_(self.inputs[_POSITION, :size])
        used = row >= 0
        row = row.clamp(min=0)
        self.seq_lens[:size] = position + 1
        for group, (table, block_size) in enumerate(
            zip(self._tables, self._block_sizes, strict=True)
        ):
            blocks = self.block_tables[group][:size]
            torch.index_select(table, 0, row, out=blocks)
            block = torch.div(position, block_size, rounding_mode="floor")
            first = blocks.gather(1, block[:, None])[:, 0].to(torch.int64) * block_size
            self.slots[group, :size] = torch.where(
                used, first + position % block_size, PAD_SLOT_ID
            )
            for attention_group in self.runner.attn_groups[group]:
                attention_group.map_to_kernel_block_table(blocks)
        for groups in self.runner.attn_groups:
            for attention_group in groups:
                attention_group.update_draft_decode_metadata(metadata)


class SegmentGraphs(CudaGraphManager):
    """The graphs of one segment, by number of requests.

    vLLM knows the base class: graphs captured while it profiles memory are counted and
    dropped again with the speculator's other managers.
    """

    def __init__(
        self, segment: int, vllm_config: VllmConfig, device: torch.device, full: bool
    ) -> None:
        """Plan the graphs.

        Args:
            segment: The segment, 0 .. K - 1.
            vllm_config: The engine's configuration.
            device: The device.
            full: Whether to capture anything at all.
        """
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        super().__init__(vllm_config, device, mode, decode_query_len=1)
        self.segment = segment

    def capture_steps(self, buffers: DraftBuffers, executor: VllmExecutor) -> None:
        """Capture one graph for each of vLLM's sizes up to ``max_num_seqs``."""

        def create_forward_fn(
            desc: BatchExecutionDescriptor, warmup: bool
        ) -> Callable[[CUDAGraphMode], None]:
            size = desc.num_tokens
            buffers.send(None, size)
            metadata = buffers.metadata(size)
            slots = buffers.slots_by_layer(size)

            def forward(mode: CUDAGraphMode) -> None:
                with set_forward_context(
                    metadata,
                    self.vllm_config,
                    num_tokens=size,
                    cudagraph_runtime_mode=mode,
                    slot_mapping=slots,
                ):
                    self._step(buffers, executor, size, metadata)

            return forward

        self.capture(
            create_forward_fn, f"Capturing draft steps of segment {self.segment}"
        )

    def replay(
        self, buffers: DraftBuffers, tokens: FrontTokens
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Run a captured step.

        Args:
            buffers: As captured.
            tokens: One token for each of R requests.

        Returns:
            Tokens (R,) int64 and probabilities (R,) float32; None where no graph is
            large enough.
        """
        count = len(tokens.rows)
        desc = self.dispatch(count, count, uniform_token_count=1, num_active_loras=0)
        if desc.cg_mode != CUDAGraphMode.FULL:
            return None
        buffers.send(tokens, desc.num_tokens)
        self.run_fullgraph(desc)
        answer = buffers.to_host(buffers.answers[:count])
        return answer[:, 0].astype(np.int64), answer[:, 1].astype(np.float32)

    def _step(
        self,
        buffers: DraftBuffers,
        executor: VllmExecutor,
        size: int,
        metadata: dict[str, Any],
    ) -> None:
        buffers.refresh(size, metadata)
        state = buffers.inputs[_STATE, :size]
        if self.segment == 0:
            hidden = executor.embed(buffers.inputs[_TOKEN, :size])
            residual = None
        else:
            hidden, residual = buffers.states.read(state)
        hidden, residual = executor.call(
            self.segment, buffers.positions[:size], hidden, residual
        )
        assert residual is not None, "only the last segment ends the model"
        buffers.states.write(state, hidden, residual)
        token, confidence = executor.ask(self.segment, hidden, residual)
        buffers.answers[:size, 0] = token
        buffers.answers[:size, 1] = confidence


def supports_draft_graphs(runner: AdaDecodeModelRunner) -> bool:
    """Whether every attention backend can refresh its metadata within a graph."""
    unable = sorted(
        {
            group.backend.get_name()
            for groups in runner.attn_groups
            for group in groups
            if not group.supports_draft_decode_metadata_update
        }
    )
    if unable:
        logger.info(
            "adadecode: %s cannot refresh attention metadata within a CUDA graph; "
            "draft steps run in piecewise graphs.",
            ", ".join(unable),
        )
    return not unable
