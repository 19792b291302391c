# SPDX-License-Identifier: Apache-2.0
"""Segments and gates on vLLM's layers, attention backends and KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.utils.torch_utils import async_tensor_h2d

from adadecode_vllm.engine.batch import AttentionBatcher
from adadecode_vllm.engine.gate import Gate
from adadecode_vllm.engine.host_copy import HostCopy
from adadecode_vllm.engine.piecewise import PiecewiseInputs
from adadecode_vllm.engine.segments import Decoder
from adadecode_vllm.method.executor import StepRunner, TokenSubset


class VllmExecutor:
    """The :class:`~adadecode_vllm.method.executor.SegmentExecutor` of a vLLM worker.

    Attributes:
        batcher: Builds attention metadata; None until the KV cache exists.
        steps: Runs whole steps in CUDA graphs, where there are any.
        piecewise: Inputs of the segments' piecewise CUDA graphs, where there are any.
    """

    def __init__(
        self,
        decoder: Decoder,
        segments: Sequence[nn.Module],
        gate: Gate,
        vllm_config: VllmConfig,
    ) -> None:
        """Wire the executor; :attr:`batcher` is set once the KV cache exists.

        Args:
            decoder: The model's parts.
            segments: K + 1 segments.
            gate: The exit heads over the LM head.
            vllm_config: The engine's configuration.
        """
        self.decoder = decoder
        self.segments = list(segments)
        self._gate = gate
        self.vllm_config = vllm_config
        self.batcher: AttentionBatcher | None = None
        self.steps: StepRunner | None = None
        self.piecewise: PiecewiseInputs | None = None
        self._whole_batch: torch.Tensor | None = None
        max_requests = vllm_config.scheduler_config.max_num_seqs
        self._answers = HostCopy(2 * max_requests, torch.float64, decoder.device)

    @property
    def num_segments(self) -> int:
        """K + 1 for K exits."""
        return len(self.segments)

    def to_device(self, values: np.ndarray) -> torch.Tensor:
        """Copy (n,) int64 values to the model's device without waiting."""
        return async_tensor_h2d(values, device=self.decoder.device)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embed (n,) token ids; (n, d)."""
        return self.decoder.embed(token_ids)

    @contextmanager
    def within_forward(self, positions: torch.Tensor) -> Iterator[None]:
        """Declare that vLLM's forward context for a whole batch is active.

        Segments that run every token of that batch then use its metadata instead of
        building the same again.

        Args:
            positions: (N,) positions of the batch's tokens.
        """
        assert self.batcher is not None, "the KV cache exists before any forward"
        self._whole_batch = None if self.batcher.shares_buffers else positions
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
            return self.call(segment, positions, hidden, residual)
        assert self.batcher is not None, "the KV cache exists before any forward"
        batch = self.batcher.build(subset)
        positions, num_tokens = batch.positions, len(batch.positions)
        size, context = num_tokens, dict[str, Any]()
        padded = self.piecewise.size(num_tokens) if self.piecewise else None
        if self.piecewise is not None and padded is not None:
            size, context = padded, self.piecewise.context(padded)
            positions, hidden, residual = self.piecewise.fill(
                padded, positions, hidden, residual
            )
        with set_forward_context(
            batch.metadata,
            self.vllm_config,
            num_tokens=size,
            slot_mapping=batch.slot_mapping,
            **context,
        ):
            hidden, residual = self.call(segment, positions, hidden, residual)
        if size > num_tokens:
            hidden = hidden[:num_tokens]
            residual = None if residual is None else residual[:num_tokens]
        return hidden, residual

    def gate(
        self, exit_index: int, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ask an exit head; see the protocol."""
        token, confidence = self.ask(exit_index, hidden, residual)
        # float64 holds every token id; one copy to the host instead of two.
        answer = self._answers(torch.stack((token.double(), confidence.double())))
        return answer[0].astype(np.int64), answer[1].astype(np.float32)

    def ask(
        self, exit_index: int, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask an exit head and leave the answer on the device.

        Args:
            exit_index: Index of the exit, 0 .. K - 1.
            hidden: (n, d) hidden states at the exit.
            residual: (n, d) residual stream at the exit.

        Returns:
            Token ids (n,) int64 and their probabilities (n,) float32.
        """
        return self._gate(exit_index, hidden, residual)

    @torch.inference_mode()
    def capture_piecewise(self) -> None:
        """Capture the segments' pieces for every size of :attr:`piecewise`.

        To be called within vLLM's ``graph_capture``. The attention runs between the
        pieces and is given nothing to do.
        """
        inputs = self.piecewise
        assert inputs is not None, "made by the caller"
        hidden_size = self.decoder.hidden_size
        for size in reversed(inputs.sizes):
            states = inputs.hidden.new_zeros((size, hidden_size))
            positions = inputs.positions.new_zeros(size)
            for segment in range(self.num_segments):
                residual = None if segment == 0 else states
                arguments = inputs.fill(size, positions, states, residual)
                for graph in (False, True):  # the first run warms kernels up
                    with set_forward_context(
                        None,
                        self.vllm_config,
                        num_tokens=size,
                        **inputs.context(size, graph=graph),
                    ):
                        self.call(segment, *arguments)

    @torch.inference_mode()
    def warm_up(self, num_tokens: int = 2) -> None:
        """Compile the segments, outside of any request.

        Args:
            num_tokens: Size of the batch. At least two, because sizes 0 and 1 would be
                baked into the graphs; more where vLLM measures the memory of a step.
        """
        decoder = self.decoder
        num_tokens = max(num_tokens, 2)
        hidden = torch.zeros(
            (num_tokens, decoder.hidden_size),
            dtype=decoder.dtype,
            device=decoder.device,
        )
        positions = torch.zeros(num_tokens, dtype=torch.int64, device=decoder.device)
        for segment in range(self.num_segments):
            with set_forward_context(None, self.vllm_config, num_tokens=num_tokens):
                residual = None if segment == 0 else hidden.clone()
                self.call(segment, positions, hidden.clone(), residual)

    def call(
        self,
        segment: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a segment in the forward context that is set.

        Args:
            segment: Index j of the segment.
            positions: (n,) int64.
            hidden: (n, d) hidden states before the segment; may be overwritten.
            residual: (n, d) residual stream before the segment; None for segment 0.

        Returns:
            What :meth:`run` returns.
        """
        module = self.segments[segment]
        if segment == 0:
            return module(positions, hidden)
        if segment == self.num_segments - 1:
            return module(positions, hidden, residual), None
        return module(positions, hidden, residual)
