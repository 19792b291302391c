# SPDX-License-Identifier: Apache-2.0
"""Segments and exits on vLLM's layers, attention backends and KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.utils.torch_utils import async_tensor_h2d

from adadecode_vllm.engine.batch import AttentionBatcher
from adadecode_vllm.engine.host_copy import HostCopy
from adadecode_vllm.engine.piecewise import PiecewiseInputs
from adadecode_vllm.engine.split_model import SplitModel
from adadecode_vllm.method.executor import ExitAnswer, StepRunner, TokenSubset


@dataclass(frozen=True)
class Backend:
    """What exists once the KV cache does.

    Attributes:
        batcher: Builds attention metadata over the KV cache.
        steps: Runs whole steps in CUDA graphs, where there are any.
        piecewise: Inputs of the segments' piecewise CUDA graphs, where there are any.
    """

    batcher: AttentionBatcher
    steps: StepRunner | None = None
    piecewise: PiecewiseInputs | None = None


class VllmExecutor:
    """The :class:`~adadecode_vllm.method.executor.SegmentExecutor` of a vLLM worker.

    Attributes:
        model: The segments and the exit scorer.
        backend: What they run on.
    """

    def __init__(self, model: SplitModel, backend: Backend) -> None:
        """Wire the executor.

        Args:
            model: The segments and the exit scorer.
            backend: What they run on.
        """
        self.model = model
        self.backend = backend
        self._whole_batch: torch.Tensor | None = None
        max_requests = model.vllm_config.scheduler_config.max_num_seqs
        device = model.decoder.device
        self._answers = HostCopy(2 * max_requests, torch.float64, device)

    @property
    def steps(self) -> StepRunner | None:
        """Runs whole steps in CUDA graphs, where there are any."""
        return self.backend.steps

    @property
    def num_segments(self) -> int:
        """Segments with layers."""
        return self.model.num_segments

    @property
    def exits_at_embedding(self) -> int:
        """1 where the first exit reads the embedding, else 0."""
        return self.model.exits_at_embedding

    def to_device(self, values: np.ndarray) -> torch.Tensor:
        """Copy (n,) int64 values to the model's device without waiting."""
        return async_tensor_h2d(values, device=self.model.decoder.device)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embed (n,) token ids; (n, d)."""
        return self.model.embed(token_ids)

    @contextmanager
    def within_forward(self, positions: torch.Tensor) -> Iterator[None]:
        """Declare that vLLM's forward context for a whole batch is active.

        Segments that run every token of that batch then use its metadata instead of
        building the same again.

        Args:
            positions: (N,) positions of the batch's tokens.
        """
        shared = self.backend.batcher.shares_buffers
        self._whole_batch = None if shared else positions
        try:
            yield
        finally:
            self._whole_batch = None

    def run(
        self,
        segment: int,
        subset: TokenSubset,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run one segment; see the protocol."""
        positions = self._whole_batch
        if positions is not None and len(positions) == subset.num_tokens:
            return self.model.call(segment, positions, hidden, residual)
        batch = self.backend.batcher.build(subset)
        positions, num_tokens = batch.positions, len(batch.positions)
        size, context = num_tokens, dict[str, Any]()
        piecewise = self.backend.piecewise
        padded = piecewise.size(num_tokens) if piecewise else None
        if piecewise is not None and padded is not None:
            size, context = padded, piecewise.context(padded)
            positions, hidden, residual = piecewise.fill(
                padded, positions, hidden, residual
            )
        with set_forward_context(
            batch.metadata,
            self.model.vllm_config,
            num_tokens=size,
            slot_mapping=batch.slot_mapping,
            **context,
        ):
            hidden, residual = self.model.call(segment, positions, hidden, residual)
        if size > num_tokens:
            hidden = hidden[:num_tokens]
            residual = None if residual is None else residual[:num_tokens]
        return hidden, residual

    def score_exit(
        self,
        exit_index: int,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        memory: torch.Tensor | None,
    ) -> ExitAnswer:
        """Score with an exit head; see the protocol."""
        token, confidence, output = self.model.scorer(
            exit_index, hidden, residual, memory
        )
        output = None if memory is None else output
        if token.is_cpu:
            return ExitAnswer(token.numpy(), confidence.numpy(), output)
        # float64 holds every token id; one copy to the host instead of two.
        answer = self._answers(torch.stack((token.double(), confidence.double())))
        return ExitAnswer(
            answer[0].astype(np.int64), answer[1].astype(np.float32), output
        )
