# SPDX-License-Identifier: Apache-2.0
"""Graphs for steps that verify drafts where nothing is resumed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.ops import triton_unified_attention
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
)

from adadecode_vllm.engine.verification_graphs import add_verification_graphs

WINDOW = 9
SIZES = [1, 2, 4, 8, 16, 64, 128, 256]


class Runner:
    """As much of vLLM's runner as plans graphs; nothing is captured."""

    device = torch.device("cpu")

    def __init__(
        self, mode: str, support: AttentionCGSupport, backend: str, sizes: list[int]
    ) -> None:
        self.vllm_config = VllmConfig()
        self.vllm_config.scheduler_config.max_num_seqs = 64
        compilation = self.vllm_config.compilation_config
        compilation.cudagraph_capture_sizes = list(sizes)
        compilation.max_cudagraph_capture_size = max(sizes)
        self.cudagraph_manager = CudaGraphManager(
            self.vllm_config, self.device, CUDAGraphMode[mode], decode_query_len=1
        )
        self.cudagraph_manager._graphs_captured = True
        builder = SimpleNamespace(
            get_cudagraph_support=lambda config, spec: support,
            get_varlen_cudagraph_max_query_len=lambda config, spec: None,
        )
        group = SimpleNamespace(
            backend=SimpleNamespace(get_name=lambda: backend, __name__=backend),
            kv_cache_spec=None,
            layer_names=["layer"],
            get_metadata_builder=lambda index: builder,
        )
        self.attn_groups = [[group]]

    def plan(self) -> None:
        """What the runner of the plugin does once the KV cache exists."""
        add_verification_graphs(self, WINDOW)  # type: ignore[arg-type]

    def chosen(
        self, counts: list[int], *, prefill: bool = False
    ) -> BatchExecutionDescriptor:
        """The graph of a step with these numbers of tokens."""
        uniform = len(set(counts)) == 1 and not prefill
        return self.cudagraph_manager.dispatch(
            len(counts),
            sum(counts),
            counts[0] if uniform else None,
            num_active_loras=0,
            max_query_len=None if prefill else max(counts),
        )


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cudagraph_utils,
        "get_pp_group",
        lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True),
    )
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)


def make_runner(
    mode: str = "FULL_AND_PIECEWISE",
    support: AttentionCGSupport = AttentionCGSupport.ALWAYS,
    backend: str = "FLASH_ATTN",
    sizes: list[int] = SIZES,
) -> Runner:
    return Runner(mode, support, backend, sizes)


def plans(runner: Runner) -> tuple[dict[Any, Any], dict[Any, Any]]:
    manager = runner.cudagraph_manager
    copied = {key: list(descs) for key, descs in manager._candidates.items()}
    return copied, {key: list(d) for key, d in manager._capture_descs.items()}


@pytest.mark.parametrize(
    ("counts", "size"), [([9], 16), ([2], 2), ([3, 1, 7], 16), ([2] * 64, 128)]
)
def test_any_mix_of_lengths_has_a_graph(counts: list[int], size: int) -> None:
    runner = make_runner()
    assert runner.chosen(counts).cg_mode == CUDAGraphMode.PIECEWISE
    runner.plan()
    desc = runner.chosen(counts)
    assert desc.cg_mode == CUDAGraphMode.FULL
    assert (desc.num_tokens, desc.max_query_len) == (size, WINDOW)
    assert desc.num_reqs is not None
    assert desc.num_reqs >= len(counts)
    assert desc in runner.cudagraph_manager._capture_descs[CUDAGraphMode.FULL]


@pytest.mark.parametrize("requests", [1, 3, 64])
def test_steps_without_drafts_keep_their_graph(requests: int) -> None:
    runner = make_runner()
    before = runner.chosen([1] * requests)
    runner.plan()
    assert runner.chosen([1] * requests) == before
    assert before.uniform_token_count == 1


def test_prompts_and_large_batches_run_piecewise() -> None:
    runner = make_runner()
    runner.plan()
    for desc in (
        runner.chosen([5, 2], prefill=True),
        runner.chosen([3] * 64),
        runner.chosen([WINDOW + 1, 1]),
    ):
        assert desc.cg_mode == CUDAGraphMode.PIECEWISE


def test_the_largest_graph_is_captured_first() -> None:
    """All share the buffer that the first one's output is given."""
    runner = make_runner()
    runner.plan()
    descs = runner.cudagraph_manager._capture_descs[CUDAGraphMode.FULL]
    sizes = [desc.num_tokens for desc in descs]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(descs)) == len(descs)


@pytest.mark.parametrize(
    ("mode", "support"),
    [
        ("FULL_AND_PIECEWISE", AttentionCGSupport.UNIFORM_BATCH),
        ("PIECEWISE", AttentionCGSupport.ALWAYS),
        # Its graphs take any batch as they are.
        ("FULL", AttentionCGSupport.ALWAYS),
        ("NONE", AttentionCGSupport.ALWAYS),
    ],
)
def test_nothing_is_added_where_it_cannot_serve(
    mode: str, support: AttentionCGSupport
) -> None:
    runner = make_runner(mode, support)
    before = plans(runner)
    runner.plan()
    assert plans(runner) == before


def test_nothing_is_added_where_no_size_serves() -> None:
    runner = make_runner(sizes=[1])
    before = plans(runner)
    runner.plan()
    assert plans(runner) == before


def test_triton_splits_keys_by_length() -> None:
    """From 0.33 on; a graph would keep what it decided when it was captured."""
    runner = make_runner(backend="TRITON_ATTN")
    runner.plan()
    splits = hasattr(triton_unified_attention, "MAX_3D_QUERY_LEN")
    mode = runner.chosen([3, 1]).cg_mode
    assert mode == (CUDAGraphMode.PIECEWISE if splits else CUDAGraphMode.FULL)
