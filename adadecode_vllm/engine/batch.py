# SPDX-License-Identifier: Apache-2.0
"""Attention metadata for token subsets over vLLM's paged KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import SlidingWindowSpec, UniformTypeKVCacheSpecs

from adadecode_vllm.method.executor import TokenSubset

NULL_BLOCK = 0
"""vLLM's block that nobody's KV is in."""


class AttentionGroup(Protocol):
    """The part of vLLM's attention group that is used here."""

    layer_names: list[str]
    kernel_block_size: int | None

    def build_metadata(
        self, common_attn_metadata: CommonAttentionMetadata, **options: Any
    ) -> Any:
        """Build one backend's metadata."""


@dataclass(frozen=True)
class KVGroup:
    """One KV cache group: layers that share a block table.

    Attributes:
        block_table: Returns the (max_requests, max_blocks) int32 table on the device.
            A function, because vLLM may replace its tables.
        block_size: Tokens per block.
        blocks_owned: Returns (max_requests,) int32, blocks per row.
        layer_names: Names of the group's attention layers.
        attention_groups: The group's attention backends.
        window_reach: Tokens below a request's first one that attention can still read;
            blocks below them may have been given away, and are replaced by the null
            block. None where attention reads everything.
    """

    block_table: Callable[[], torch.Tensor]
    block_size: int
    blocks_owned: Callable[[], np.ndarray]
    layer_names: Sequence[str]
    attention_groups: Sequence[AttentionGroup]
    window_reach: int | None = None


@dataclass(frozen=True)
class AttentionBatch:
    """Everything that running layers on a subset needs.

    Attributes:
        metadata: Attention metadata per layer name.
        slot_mapping: (n,) int64 KV slots per layer name.
        positions: (n,) int64.
    """

    metadata: dict[str, Any]
    slot_mapping: dict[str, torch.Tensor]
    positions: torch.Tensor


def null_below_window(
    blocks: torch.Tensor, first: torch.Tensor, block_size: int, reach: int
) -> None:
    """Let no request refer to blocks that a sliding window has left behind.

    vLLM gives them to others, whose KV may be NaN, and attention kernels load whole
    tiles: a masked NaN is a NaN still. vLLM's runner does so from version 0.33 on.

    Args:
        blocks: (r, max_blocks) int32 block ids, changed in place.
        first: (r,) positions of the requests' first tokens.
        block_size: Tokens per block.
        reach: Tokens below the first one that attention can still read.
    """
    left_behind = (first - reach).clamp_(min=0) // block_size
    columns = torch.arange(blocks.shape[1], device=blocks.device)
    blocks.masked_fill_(columns < left_behind[:, None], NULL_BLOCK)


def window_reach(spec: Any) -> int | None:
    """Tokens below a step's first one that a KV cache group's attention can read.

    Args:
        spec: The group's KV cache specification.

    Returns:
        The number; None without a sliding window.
    """
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = spec.first_spec
    if not isinstance(spec, SlidingWindowSpec):
        return None
    return spec.sliding_window - 1 + spec.extra_retained_tokens


class AttentionBatcher:
    """Builds :class:`AttentionBatch` objects for all KV cache groups."""

    def __init__(self, groups: Sequence[KVGroup], device: torch.device) -> None:
        """Remember the groups.

        Args:
            groups: The engine's KV cache groups, in order.
            device: The model's device.
        """
        self.groups = list(groups)
        self.device = device
        # Scheduling attention ahead of time does not pay for a few layers, and vLLM's
        # buffers for that belong to whole batches.
        self._options = {} if device.type == "cpu" else {"fast_build": True}

    @property
    def shares_buffers(self) -> bool:
        """Whether building metadata overwrites what was built before.

        vLLM maps block tables to kernel-sized blocks in one persistent buffer, and on
        CUDA backends keep what graphs read in buffers of their own.
        """
        return self.device.type != "cpu" or any(
            attention_group.kernel_block_size is not None
            for group in self.groups
            for attention_group in group.attention_groups
        )

    def owned_slots(self, rows: np.ndarray) -> np.ndarray:
        """KV slots that belong to requests, in every group (I3).

        Args:
            rows: (R,) block table rows.

        Returns:
            (R,) int64: positions below this may be written.
        """
        owned = [group.blocks_owned()[rows] * group.block_size for group in self.groups]
        return np.min(owned, axis=0).astype(np.int64)

    def build(self, subset: TokenSubset) -> AttentionBatch:
        """Build the metadata for a subset.

        Args:
            subset: Consecutive tokens of some requests. Their slots must belong to the
                requests and all earlier positions must hold valid KV.

        Returns:
            The metadata.
        """
        end = subset.first + subset.count
        num_requests = subset.num_requests
        query_start = np.zeros(num_requests + 1, np.int32)
        np.cumsum(subset.count, out=query_start[1:])
        num_tokens = int(query_start[-1])
        request = np.repeat(np.arange(num_requests), subset.count)
        within = np.arange(num_tokens) - query_start[request]
        query_start_cpu = torch.from_numpy(query_start)
        seq_lens_cpu = torch.from_numpy(end.astype(np.int32))
        # Two copies to the device, whatever the number of arrays.
        positions, token_requests, rows = async_tensor_h2d(
            np.concatenate((subset.first[request] + within, request, subset.rows)),
            device=self.device,
        ).split((num_tokens, num_tokens, num_requests))
        query_start_device, seq_lens = async_tensor_h2d(
            torch.cat((query_start_cpu, seq_lens_cpu)), device=self.device
        ).split((num_requests + 1, num_requests))

        metadata: dict[str, Any] = {}
        slot_mapping: dict[str, torch.Tensor] = {}
        for group in self.groups:
            block_table = group.block_table().index_select(0, rows)
            if group.window_reach is not None:
                first = seq_lens - query_start_device.diff()
                null_below_window(
                    block_table, first, group.block_size, group.window_reach
                )
            block = torch.div(positions, group.block_size, rounding_mode="floor")
            slots = (
                block_table[token_requests, block].to(torch.int64) * group.block_size
                + positions % group.block_size
            )
            common = CommonAttentionMetadata(
                query_start_loc=query_start_device,
                query_start_loc_cpu=query_start_cpu,
                seq_lens=seq_lens,
                seq_lens_cpu_upper_bound=seq_lens_cpu,
                num_reqs=num_requests,
                num_actual_tokens=num_tokens,
                max_query_len=int(subset.count.max()),
                max_seq_len=int(end.max()),
                block_table_tensor=block_table,
                slot_mapping=slots,
                causal=True,
                positions=positions,
            )
            for attention_group in group.attention_groups:
                built = attention_group.build_metadata(common, **self._options)
                metadata.update(dict.fromkeys(attention_group.layer_names, built))
            slot_mapping.update(dict.fromkeys(group.layer_names, slots))
        return AttentionBatch(metadata, slot_mapping, positions)
