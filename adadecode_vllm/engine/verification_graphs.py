# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of vLLM's own forward, for steps that verify drafts.

Where all exits read the embedding, no draft has passed a layer, so nothing is resumed
and vLLM runs the forward itself. Its graphs hold one token a request, but drafts differ
in number. Graphs of any mix of lengths, which vLLM captures for its adaptive
verification only, join them here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import get_varlen_cudagraph_unsupported_backend
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from adadecode_vllm.compat import facts
from adadecode_vllm.engine.segment_graphs import MAX_TOKENS

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner


def add_verification_graphs(runner: GPUModelRunner, window: int) -> None:
    """Plan graphs of 1 to ``window`` tokens a request beside those of one.

    They are captured together with the others. Steps of one token a request keep the
    graphs they had, where there is one of their size; batches of more than
    ``MAX_TOKENS`` tokens run piecewise. Nothing is added where the attention backend
    cannot replay such a graph or is faster without, or where vLLM's own graphs take any
    batch.

    Args:
        runner: A runner whose KV cache exists and whose graphs are not captured yet.
        window: Most tokens of a request in one step.
    """
    manager = runner.cudagraph_manager
    assert manager is not None, "planned with the KV cache"
    mode = manager.cudagraph_mode
    full = CUDAGraphMode.FULL
    if mode.decode_mode() != full or not mode.separate_routine():
        return
    unable = get_varlen_cudagraph_unsupported_backend(
        runner.attn_groups, runner.vllm_config, window
    )
    if unable is not None or (
        # A graph would decide about that once for all lengths.
        facts().triton_splits_verification and _uses_triton(runner)
    ):
        return
    # Made only for its plan.
    varlen = CudaGraphManager(
        runner.vllm_config,
        runner.device,
        CUDAGraphMode.FULL_DECODE_ONLY,
        decode_query_len=window,
        varlen_decode=True,
    )
    # A single token is never a draft.
    sizes = range(2, MAX_TOKENS + 1)
    added = [
        desc for desc in varlen._capture_descs.get(full, []) if desc.num_tokens in sizes
    ]
    if not added:
        return
    # The largest first: its output decides the size of the buffer that all share.
    manager._capture_descs[full] = sorted(
        [*manager._capture_descs.get(full, []), *added],
        key=lambda desc: desc.num_tokens,
        reverse=True,
    )
    # By preference: one token a request, then any mix, then piecewise.
    for key, found in varlen._candidates.items():
        candidates = manager._candidates.setdefault(key, [])
        place = sum(desc.cg_mode == full for desc in candidates)
        candidates[place:place] = [desc for desc in found if desc in added]


def _uses_triton(runner: GPUModelRunner) -> bool:
    return any(
        group.backend.get_name() == "TRITON_ATTN"
        for groups in runner.attn_groups
        for group in groups
    )
