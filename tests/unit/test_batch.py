# SPDX-License-Identifier: Apache-2.0
"""Attention metadata of token subsets, against a loop over tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from adadecode_vllm.engine.batch import (
    AttentionBatch,
    AttentionBatcher,
    KVGroup,
    window_reach,
)
from adadecode_vllm.method.executor import TokenSubset

MAX_REQUESTS = 6
CPU = torch.device("cpu")


@dataclass
class FakeAttentionGroup:
    """An attention backend that only remembers what it was given."""

    layer_names: list[str]
    kernel_block_size: int | None = None
    seen: list[CommonAttentionMetadata] = field(default_factory=list)

    def build_metadata(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        self.seen.append(common_attn_metadata)
        return f"metadata of {self.layer_names[0]}"


@dataclass
class FakeGroup:
    """A KV cache group with a random block table."""

    table: torch.Tensor
    block_size: int
    owned: np.ndarray
    attention_groups: list[FakeAttentionGroup]
    window_reach: int | None = None

    def as_kv_group(self) -> KVGroup:
        return KVGroup(
            block_table=lambda: self.table,
            block_size=self.block_size,
            blocks_owned=lambda: self.owned,
            layer_names=[
                name for group in self.attention_groups for name in group.layer_names
            ],
            attention_groups=self.attention_groups,
            window_reach=self.window_reach,
        )


def make_group(index: int, block_size: int, length: int, backends: int) -> FakeGroup:
    """A group whose tables hold `length` tokens, with two layers per backend."""
    generator = np.random.default_rng(index)
    blocks = -(-length // block_size)
    table = 1 + generator.permutation(MAX_REQUESTS * blocks).astype(np.int32)
    return FakeGroup(
        torch.from_numpy(table).reshape(MAX_REQUESTS, blocks),
        block_size,
        generator.integers(0, blocks + 1, MAX_REQUESTS).astype(np.int32),
        [
            FakeAttentionGroup([f"group{index}.backend{backend}.{i}" for i in (0, 1)])
            for backend in range(backends)
        ],
    )


def build(
    groups: list[FakeGroup], rows: list[int], first: list[int], count: list[int]
) -> AttentionBatch:
    batcher = AttentionBatcher([group.as_kv_group() for group in groups], CPU)
    subset = TokenSubset(
        np.array(rows, np.int64), np.array(first, np.int64), np.array(count, np.int64)
    )
    return batcher.build(subset)


def check(
    groups: list[FakeGroup], rows: list[int], first: list[int], count: list[int]
) -> None:
    """Compare a subset's metadata with a naive construction of it."""
    batch = build(groups, rows, first, count)
    spans = list(zip(rows, first, count, strict=True))
    positions = [at for _, start, n in spans for at in range(start, start + n)]
    assert batch.positions.dtype == torch.int64
    assert batch.positions.tolist() == positions
    ends = [start + n for _, start, n in spans]
    names: set[str] = set()
    for group in groups:
        size = group.block_size
        slots = [
            int(group.table[row, at // size]) * size + at % size
            for row, start, n in spans
            for at in range(start, start + n)
        ]
        for attention_group in group.attention_groups:
            (common,) = attention_group.seen
            assert common.num_reqs == len(rows)
            assert common.num_actual_tokens == len(positions)
            assert common.max_query_len == max(count)
            assert common.max_seq_len == max(ends)
            assert common.causal is True
            starts = [sum(count[:i]) for i in range(len(count) + 1)]
            for query_start in (common.query_start_loc, common.query_start_loc_cpu):
                assert query_start.dtype == torch.int32
                assert query_start.tolist() == starts
            assert common.seq_lens.dtype == torch.int32
            assert common.seq_lens.tolist() == ends
            assert common.seq_lens_cpu_upper_bound is not None
            assert common.seq_lens_cpu_upper_bound.tolist() == ends
            assert common.slot_mapping.dtype == torch.int64
            assert common.slot_mapping.tolist() == slots
            assert common.positions is not None
            assert common.positions.tolist() == positions
            assert common.block_table_tensor.dtype == torch.int32
            assert torch.equal(common.block_table_tensor, group.table[rows])
            for name in attention_group.layer_names:
                names.add(name)
                assert batch.metadata[name] == (
                    f"metadata of {attention_group.layer_names[0]}"
                )
                assert batch.slot_mapping[name].tolist() == slots
    assert batch.metadata.keys() == batch.slot_mapping.keys() == names


def test_several_groups_with_different_block_sizes() -> None:
    groups = [make_group(0, 4, 32, 1), make_group(1, 16, 32, 2)]
    check(groups, [3, 0, 5], [7, 0, 15], [1, 5, 3])


def test_blocks_below_a_sliding_window_are_nobodys() -> None:
    """Nulled where no token of the request can read them; slots stay."""
    whole, windowed = make_group(0, 4, 32, 1), make_group(1, 4, 32, 1)
    windowed.window_reach = 6
    rows, first, count = [3, 0, 5], [17, 2, 30], [2, 5, 1]
    batch = build([whole, windowed], rows, first, count)
    (common,) = whole.attention_groups[0].seen
    assert torch.equal(common.block_table_tensor, whole.table[rows])
    (common,) = windowed.attention_groups[0].seen
    expected = windowed.table[rows].clone()
    expected[0, : (17 - 6) // 4] = 0
    expected[2, : (30 - 6) // 4] = 0
    assert torch.equal(common.block_table_tensor, expected)
    assert bool((windowed.table > 0).all()), "vLLM's own table is left alone"
    slots = batch.slot_mapping["group1.backend0.0"]
    assert slots[0] == windowed.table[3, 4] * 4 + 1


def test_the_reach_of_a_window_is_vllms() -> None:
    common: dict[str, Any] = {
        "block_size": 16,
        "num_kv_heads": 1,
        "head_size": 8,
        "dtype": torch.float32,
    }
    sliding = SlidingWindowSpec(**common, sliding_window=64)
    full = FullAttentionSpec(**common)
    assert window_reach(full) is None
    assert window_reach(sliding) == 63
    # vLLM has it as a property from 0.33 on.
    assert window_reach(sliding) == getattr(sliding, "num_retained_tokens", 63)
    several = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": sliding})
    assert window_reach(several) == 63


@pytest.mark.parametrize("first", [0, 3, 4, 7])
def test_one_token(first: int) -> None:
    check([make_group(0, 4, 8, 1)], [2], [first], [1])


def test_last_slot_of_the_table() -> None:
    check([make_group(0, 4, 12, 1)], [1, 4], [10, 0], [2, 12])


@st.composite
def subsets(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    requests = st.integers(0, MAX_REQUESTS - 1)
    rows = draw(st.lists(requests, min_size=1, max_size=MAX_REQUESTS, unique=True))
    length = draw(st.integers(1, 40))
    first = [draw(st.integers(0, length - 1)) for _ in rows]
    count = [draw(st.integers(1, length - start)) for start in first]
    return rows, first, count, length


@settings(deadline=None, max_examples=60)
@given(
    subset=subsets(),
    shapes=st.lists(
        st.tuples(st.integers(1, 17), st.integers(1, 2)), min_size=1, max_size=3
    ),
)
def test_any_subset(
    subset: tuple[list[int], list[int], list[int], int],
    shapes: list[tuple[int, int]],
) -> None:
    rows, first, count, length = subset
    groups = [
        make_group(index, block_size, length, backends)
        for index, (block_size, backends) in enumerate(shapes)
    ]
    check(groups, rows, first, count)


def test_tables_are_read_anew() -> None:
    """vLLM may replace its block tables between two builds."""
    group = make_group(0, 4, 8, 1)
    batcher = AttentionBatcher([group.as_kv_group()], CPU)
    one = np.ones(1, np.int64)
    subset = TokenSubset(one * 0, one * 5, one)
    group.table = group.table + 100
    slots = batcher.build(subset).slot_mapping["group0.backend0.0"]
    assert slots.tolist() == [int(group.table[0, 1]) * 4 + 1]


def test_metadata_does_not_alias_the_table() -> None:
    """Rows are copied, so that a later change of the table cannot reach a forward."""
    group = make_group(0, 4, 8, 1)
    build([group], [1], [0], [2])
    (common,) = group.attention_groups[0].seen
    before = common.block_table_tensor.clone()
    group.table.zero_()
    assert torch.equal(common.block_table_tensor, before)


def test_owned_slots_are_the_fewest_of_all_groups() -> None:
    groups = [make_group(0, 4, 64, 1), make_group(1, 16, 64, 1)]
    groups[0].owned[:] = [0, 1, 2, 8, 9, 16]
    groups[1].owned[:] = [1, 1, 1, 2, 2, 3]
    batcher = AttentionBatcher([group.as_kv_group() for group in groups], CPU)
    owned = batcher.owned_slots(np.array([5, 0, 1, 3, 4]))
    assert owned.dtype == np.int64
    assert owned.tolist() == [48, 0, 4, 32, 32]


@pytest.mark.parametrize("sizes", [(None, None), (None, 16), (16, None), (16, 32)])
def test_shares_buffers(sizes: tuple[int | None, int | None]) -> None:
    groups = [make_group(0, 16, 16, 1), make_group(1, 16, 16, 1)]
    for group, size in zip(groups, sizes, strict=True):
        group.attention_groups[0].kernel_block_size = size
    batcher = AttentionBatcher([group.as_kv_group() for group in groups], CPU)
    assert batcher.shares_buffers is (sizes != (None, None))
