# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of whole steps: a segment with everything around it.

A draft step runs a segment and its exit head; a step of a resumed forward runs a
segment only. Either is one graph, from the packed input to the pending states: the
host sends one copy and replays. After a draft step it waits for the answer, because
what runs next depends on it.

- One token a request, with the head: what most draft steps are.
- Any number up to the window a request, with the head: deferred layers that join in.
- The same without the head: resumed forwards.

The last two are as wide as :data:`MAX_TOKENS`; larger batches run piecewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
)

from adadecode_vllm.engine.step_buffers import StepBuffers
from adadecode_vllm.method.executor import TokenSubset

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from adadecode_vllm.engine.split_model import SplitModel

logger = init_logger("vllm.adadecode")

MAX_TOKENS = 128
"""Most tokens of a graph that takes several tokens a request."""


@dataclass(frozen=True)
class StepKind:
    """What a graph does.

    Attributes:
        segment: The segment; -1 for none, where the exit at the embedding scores.
        scores_exit: Whether the exit head behind it scores.
        max_query_len: Most tokens of a request.
    """

    segment: int
    scores_exit: bool
    max_query_len: int

    @property
    def name(self) -> str:
        """A name for an attribute."""
        form = "draft" if self.scores_exit else "resume"
        segment = "no_segment" if self.segment < 0 else f"segment_{self.segment}"
        return f"{segment}_{form}_{self.max_query_len}_graphs"


def step_kinds(
    num_segments: int, exits_at_embedding: int, window: int
) -> list[StepKind]:
    """All graphs of a model.

    Args:
        num_segments: Segments with layers.
        exits_at_embedding: 1 where an exit reads the embedding, else 0.
        window: Tokens of a request that may be pending, and one.
    """
    drafted = range(-exits_at_embedding, num_segments - 1)
    # A single segment is the whole model, which vLLM has graphs of.
    resumed = range(num_segments) if num_segments > 1 else ()
    # Without an exit before it, segment 0 runs for fronts only, one a request.
    alone = -1 if exits_at_embedding else 0
    return [
        *(StepKind(segment, True, 1) for segment in drafted),
        *(StepKind(segment, True, window) for segment in drafted if segment > alone),
        *(StepKind(segment, False, window) for segment in resumed),
    ]


class Steps:
    """What the graphs hold, in plain calls."""

    def __init__(self, buffers: StepBuffers, model: SplitModel) -> None:
        """Wire the steps.

        Args:
            buffers: Inputs and outputs.
            model: The segments and heads.
        """
        self.buffers = buffers
        self.model = model

    def run(self, kind: StepKind, tokens: int) -> None:
        """Run a step's segment in the forward context that is set.

        :meth:`StepBuffers.refresh` came before it where the segment has layers.

        Args:
            kind: What to do.
            tokens: Number of tokens, padding included.
        """
        buffers, model = self.buffers, self.model
        states = buffers.states[:tokens]
        residual: torch.Tensor | None = None
        if kind.segment <= 0:
            hidden = model.embed(buffers.token_ids[:tokens])
        else:
            hidden, residual = buffers.pending.read(states)
        if kind.segment >= 0:
            hidden, residual = model.call(
                kind.segment, buffers.positions[:tokens], hidden, residual
            )
            if residual is None:
                buffers.normed[:tokens] = hidden
                return
            buffers.pending.write(states, hidden, residual)
        if kind.scores_exit:
            self._score_exit(
                kind.segment + model.exits_at_embedding, tokens, hidden, residual
            )

    def _score_exit(
        self,
        exit_index: int,
        tokens: int,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> None:
        """Score all tokens with an exit head; only the fronts' answers count."""
        buffers = self.buffers
        pending = buffers.pending
        states = buffers.states[:tokens]
        token, confidence, output = self.model.scorer(
            exit_index, hidden, residual, pending.read_memory(states)
        )
        buffers.answers[:tokens, 0] = token
        buffers.answers[:tokens, 1] = confidence
        if pending.memory is not None:
            fronts = torch.where(buffers.fronts(tokens), states, pending.padding_row)
            pending.write_memory(fronts, output)


class SegmentGraphs(CudaGraphManager):
    """The graphs of one kind of step, by number of tokens.

    vLLM knows the base class: graphs captured while it profiles memory are counted and
    dropped again with the speculator's other managers.
    """

    def __init__(
        self, kind: StepKind, vllm_config: VllmConfig, device: torch.device, full: bool
    ) -> None:
        """Plan the graphs.

        Args:
            kind: What they do.
            vllm_config: The engine's configuration.
            device: The device.
            full: Whether to capture anything at all.
        """
        several = kind.max_query_len > 1
        super().__init__(
            vllm_config,
            device,
            CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE,
            decode_query_len=kind.max_query_len,
            varlen_decode=several,
        )
        self.kind = kind
        if several:
            self._capture_descs = {
                mode: [desc for desc in descs if desc.num_tokens <= MAX_TOKENS]
                for mode, descs in self._capture_descs.items()
            }
            self._candidates = {
                key: [desc for desc in descs if desc.num_tokens <= MAX_TOKENS]
                for key, descs in self._candidates.items()
            }

    @property
    def largest(self) -> int:
        """Most tokens of a graph."""
        descs = self._capture_descs.get(CUDAGraphMode.FULL, [])
        return max((desc.num_tokens for desc in descs), default=0)

    def capture_steps(self, steps: Steps) -> None:
        """Capture the graphs on made-up requests that own no KV."""
        buffers = steps.buffers

        def create_forward_fn(
            desc: BatchExecutionDescriptor, warmup: bool
        ) -> Callable[[CUDAGraphMode], None]:
            tokens, requests = desc.num_tokens, desc.num_reqs
            assert requests is not None, "full graphs fix the number of requests"
            starts = np.linspace(0, tokens, requests + 1).astype(np.int64)
            count = np.diff(starts)
            # Rows of -1 read the first row's blocks and write nothing.
            nobody = TokenSubset(
                rows=np.full(requests, -1),
                first=np.zeros(requests, np.int64),
                count=count,
            )
            states = np.full(tokens, buffers.pending.padding_row)
            buffers.send(nobody, states, np.zeros(tokens, np.int64), tokens, requests)
            metadata = slots = None
            if self.kind.segment >= 0:
                metadata = buffers.metadata(
                    tokens,
                    requests,
                    self.kind.max_query_len,
                    starts,
                    for_capture=True,
                )
                slots = buffers.slots_by_layer(tokens)

            def forward(mode: CUDAGraphMode) -> None:
                if metadata is not None:
                    buffers.refresh(tokens, requests)
                    buffers.refresh_metadata(metadata)
                with set_forward_context(
                    metadata,
                    self.vllm_config,
                    num_tokens=tokens,
                    cudagraph_runtime_mode=mode,
                    slot_mapping=slots,
                ):
                    steps.run(self.kind, tokens)

            return forward

        self.capture(create_forward_fn, f"Capturing {self.kind.name}")

    def replay(
        self,
        buffers: StepBuffers,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray | torch.Tensor | None,
    ) -> bool:
        """Run a captured step, if there is one for the batch.

        Args:
            buffers: As captured.
            subset: The n tokens of r requests.
            states: (n,) int64, where their states are kept.
            token_ids: (n,) for segment 0, from the host or on the device.

        Returns:
            Whether it ran.
        """
        tokens, requests = len(states), len(subset.rows)
        uniform = 1 if self.kind.max_query_len == 1 else None
        desc = self.dispatch(
            requests,
            tokens,
            uniform_token_count=uniform,
            num_active_loras=0,
            max_query_len=1 if uniform else int(subset.count.max()),
        )
        if desc.cg_mode != CUDAGraphMode.FULL:
            return False
        assert desc.num_reqs is not None, "full graphs fix the number of requests"
        buffers.send(subset, states, token_ids, desc.num_tokens, desc.num_reqs)
        self.run_fullgraph(desc)
        return True


def graph_support(runner: GPUModelRunner) -> int:
    """Most tokens a request that graphs of steps may have: 0, 1, or 2 for any.

    A graph renews the attention metadata itself, which not all backends can; some can
    only where every request has one token.
    """
    groups = [group for groups in runner.attn_groups for group in groups]
    unable = sorted(
        {
            group.backend.get_name()
            for group in groups
            if not group.supports_draft_decode_metadata_update
        }
    )
    if unable:
        logger.info(
            "adadecode: %s cannot renew attention metadata within a CUDA graph; "
            "segments run in piecewise graphs.",
            ", ".join(unable),
        )
        return 0
    always = all(
        group.get_metadata_builder().get_cudagraph_support(
            runner.vllm_config, group.kv_cache_spec
        )
        == AttentionCGSupport.ALWAYS
        for group in groups
    )
    return 2 if always else 1


class GraphedSteps:
    """The :class:`~adadecode_vllm.method.executor.StepRunner` of CUDA graphs.

    Attributes:
        max_tokens: Most tokens of a resumed forward.
    """

    def __init__(
        self,
        buffers: StepBuffers,
        graphs: Mapping[StepKind, Callable[[], SegmentGraphs]],
        window: int,
        measure: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Wire the graphs.

        Args:
            buffers: As captured.
            graphs: Returns the captured graphs, by kind.
            window: Tokens of a request that may be pending, and one.
            measure: Lets a timer see a named part of the cycle.
        """
        self._measure = measure
        self._buffers = buffers
        self._graphs = graphs
        self._window = window
        resume = graphs.get(StepKind(0, False, window))
        self.max_tokens = 0 if resume is None else resume().largest

    def draft(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Run a draft step; see the protocol."""
        single = len(states) == len(subset.rows)
        graphs = self._graphs.get(
            StepKind(segment, True, 1 if single else self._window)
        )
        buffers = self._buffers
        if graphs is None:
            return None
        with self._measure("draft steps"):
            ran = graphs().replay(buffers, subset, states, token_ids)
        if not ran:
            return None
        answer = buffers.to_host(buffers.answers[: len(states)])
        if not single:
            answer = answer[np.cumsum(subset.count) - 1]
        return answer[:, 0].astype(np.int64), answer[:, 1].astype(np.float32)

    def prefetch_segment(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray,
    ) -> torch.Tensor:
        """Run a step of the next forward; see the protocol."""
        with self._measure("prefetched segments"):
            self._resume(segment, subset, states, token_ids if segment == 0 else None)
        return self._buffers.normed[: len(states)]

    def resume(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run a step of a resumed forward; see the protocol."""
        self._resume(segment, subset, states, token_ids)
        return self._buffers.normed[: len(states)]

    def _resume(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray | torch.Tensor | None,
    ) -> None:
        graphs = self._graphs[StepKind(segment, False, self._window)]()
        ran = graphs.replay(self._buffers, subset, states, token_ids)
        assert ran, "the caller keeps to max_tokens and to the window"
