# SPDX-License-Identifier: Apache-2.0
"""Persistent tensors that CUDA graphs of segments read and write.

A step's inputs travel to the device in one packed copy; block-table rows, slots and
lengths are worked out there, as part of the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.attn_utils import (
    build_attn_metadata,
    build_slot_mappings_by_layer,
)

from adadecode_vllm.engine.batch import null_below_window, window_reach
from adadecode_vllm.engine.host_copy import HostCopy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from adadecode_vllm.method.executor import TokenSubset
    from adadecode_vllm.method.states import PendingStates


class StepBuffers:
    """Inputs and outputs of one segment on T tokens of N requests.

    Steps run one after another, so the graphs of all segments share one set.

    Attributes:
        token_ids: (T,) int64.
        positions: (T,) int64.
        states: (T,) int64, where the tokens' hidden states are kept.
        answers: (T, 2) float64, token and probability by an exit head.
        normed: (T, d), what the last segment returns.
    """

    def __init__(
        self,
        runner: GPUModelRunner,
        pending: PendingStates,
        max_tokens: int,
        num_segments: int,
    ) -> None:
        """Allocate them.

        Args:
            runner: The model runner, with its KV cache.
            pending: The pending tokens' states.
            max_tokens: T, at least N = ``max_num_seqs``.
            num_segments: K + 1, the most steps of a forward.
        """
        device, requests = runner.device, runner.max_num_reqs
        self.runner = runner
        self.pending = pending
        self.max_tokens = max_tokens
        # Token ids, positions, states and rows by token; rows, lengths and first
        # tokens by request.
        self._bounds = np.cumsum(
            [0, *[max_tokens] * 4, requests, requests, requests + 1]
        )
        size = int(self._bounds[-1])
        # The host writes a step's inputs while the copies of earlier ones may still
        # be under way. Between two waits it sends at most a prefetched forward and
        # one beside it.
        self._hosts = [
            torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
            for _ in range(2 * num_segments + 1)
        ]
        self._arrays = [self._split(host.numpy()) for host in self._hosts]
        self._next = 0
        self._inputs = torch.zeros(size, dtype=torch.int64, device=device)
        (
            self.token_ids,
            self.positions,
            self.states,
            self._token_rows,
            self._rows,
            self._lengths,
            self._starts,
        ) = self._split(self._inputs)
        self._seq_lens = torch.zeros(requests, dtype=torch.int32, device=device)
        self._query_start = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        tables = runner.block_tables
        self._tables = [table.gpu for table in tables.block_tables]
        self._block_sizes = list(tables.block_sizes)
        self._block_tables = [torch.zeros_like(table) for table in self._tables]
        self._window_reaches = [
            window_reach(group.kv_cache_spec)
            for group in runner.kv_cache_config.kv_cache_groups
        ]
        self._slots = torch.full(
            (len(self._tables), max_tokens),
            PAD_SLOT_ID,
            dtype=torch.int64,
            device=device,
        )
        self.answers = torch.zeros((max_tokens, 2), dtype=torch.float64, device=device)
        self.normed = torch.zeros(
            (max_tokens, pending.hidden.shape[1]),
            dtype=pending.hidden.dtype,
            device=device,
        )
        self.to_host = HostCopy(2 * max_tokens, torch.float64, device)

    def _split(self, flat: Any) -> Sequence[Any]:
        return [
            flat[first:last]
            for first, last in zip(self._bounds[:-1], self._bounds[1:], strict=True)
        ]

    def send(
        self,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray | torch.Tensor | None,
        padded_tokens: int,
        padded_requests: int,
    ) -> None:
        """Copy a step's inputs to the device, asynchronously.

        Padded tokens write no KV and their states to a row of their own; padded
        requests have no token.

        Args:
            subset: The n tokens of r requests.
            states: (n,) int64, where their states are kept.
            token_ids: (n,) for segment 0, from the host or on the device.
            padded_tokens: Tokens that the graph was captured for.
            padded_requests: Requests that the graph was captured for.
        """
        host = self._hosts[self._next]
        ids, positions, kept, token_rows, rows, lengths, starts = self._arrays[
            self._next
        ]
        self._next = (self._next + 1) % len(self._hosts)
        count, requests = len(states), len(subset.rows)
        if count == requests:
            positions[:count] = subset.first
            token_rows[:count] = subset.rows
            starts[: count + 1] = np.arange(count + 1)
        else:
            starts[0] = 0
            np.cumsum(subset.count, out=starts[1 : requests + 1])
            offset = subset.first - starts[:requests]
            positions[:count] = np.repeat(offset, subset.count) + np.arange(count)
            token_rows[:count] = np.repeat(subset.rows, subset.count)
        if isinstance(token_ids, np.ndarray):
            ids[:count] = token_ids
        kept[:count] = states
        rows[:requests] = np.maximum(subset.rows, 0)
        lengths[:requests] = subset.first + subset.count
        if count < padded_tokens:
            ids[count:padded_tokens] = 0
            positions[count:padded_tokens] = 0
            kept[count:padded_tokens] = self.pending.padding_row
            token_rows[count:padded_tokens] = -1
        if requests < padded_requests:
            rows[requests:padded_requests] = 0
            lengths[requests:padded_requests] = 0
            starts[requests + 1 : padded_requests + 1] = count
        self._inputs.copy_(host, non_blocking=True)
        if isinstance(token_ids, torch.Tensor):
            self.token_ids[:count].copy_(token_ids)

    def refresh(self, tokens: int, requests: int) -> None:
        """Work out what attention needs; part of the graph."""
        self._seq_lens[:requests].copy_(self._lengths[:requests])
        self._query_start[: requests + 1].copy_(self._starts[: requests + 1])
        first = self._seq_lens[:requests] - self._query_start[: requests + 1].diff()
        positions, rows = self.positions[:tokens], self._token_rows[:tokens]
        used, known_rows = rows >= 0, rows.clamp(min=0)
        for group, (table, block_size) in enumerate(
            zip(self._tables, self._block_sizes, strict=True)
        ):
            blocks = self._block_tables[group][:requests]
            torch.index_select(table, 0, self._rows[:requests], out=blocks)
            block = torch.div(positions, block_size, rounding_mode="floor")
            slot = table[known_rows, block].to(torch.int64) * block_size
            self._slots[group, :tokens] = torch.where(
                used, slot + positions % block_size, PAD_SLOT_ID
            )
            reach = self._window_reaches[group]
            if reach is not None:
                null_below_window(blocks, first, block_size, reach)
            for attention_group in self.runner.attn_groups[group]:
                attention_group.map_to_kernel_block_table(blocks)

    def fronts(self, tokens: int) -> torch.Tensor:
        """(tokens,) bool, the last tokens of the requests; part of the graph."""
        rows = self._token_rows[:tokens]
        last = torch.ones_like(rows, dtype=torch.bool)
        torch.ne(rows[1:], rows[:-1], out=last[:-1])
        return last & (rows >= 0)

    def metadata(
        self,
        tokens: int,
        requests: int,
        max_query_len: int,
        starts: np.ndarray,
        *,
        for_capture: bool,
    ) -> dict[str, Any]:
        """Attention metadata over these buffers.

        Args:
            tokens: Tokens of the step, padding included.
            requests: Requests of the step, padding included.
            max_query_len: Most tokens of a request.
            starts: (requests + 1,) first tokens of the requests.
            for_capture: Make it valid for whatever a graph will be replayed on.
        """
        runner = self.runner
        return build_attn_metadata(
            attn_groups=runner.attn_groups,
            num_reqs=requests,
            num_tokens=tokens,
            query_start_loc_gpu=self._query_start[: requests + 1],
            query_start_loc_cpu=torch.from_numpy(starts.astype(np.int32)),
            max_query_len=max_query_len,
            seq_lens=self._seq_lens,
            max_seq_len=runner.max_model_len,
            block_tables=[table[:requests] for table in self._block_tables],
            slot_mappings=self._slots[:, :tokens],
            kv_cache_config=runner.kv_cache_config,
            seq_lens_cpu_upper_bound=torch.full(
                (requests,), runner.max_model_len, dtype=torch.int32
            ),
            positions=self.positions[:tokens],
            is_prefilling=torch.zeros(requests, dtype=torch.bool),
            for_cudagraph_capture=for_capture,
        )

    def refresh_metadata(self, metadata: dict[str, Any]) -> None:
        """Let backends renew what they derive from lengths; part of the graph."""
        for groups in self.runner.attn_groups:
            for attention_group in groups:
                attention_group.update_draft_decode_metadata(metadata)

    def slots_by_layer(self, tokens: int) -> dict[str, torch.Tensor]:
        """KV slots per layer name, views of these buffers."""
        return build_slot_mappings_by_layer(
            self._slots[:, :tokens], self.runner.kv_cache_config
        )
