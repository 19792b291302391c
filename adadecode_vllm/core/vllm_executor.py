# SPDX-License-Identifier: Apache-2.0
"""Segments and gates on vLLM's layers, attention backends and KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context

from adadecode_vllm.core.batch import AttentionBatcher
from adadecode_vllm.core.executor import TokenSubset
from adadecode_vllm.core.gate import Gate
from adadecode_vllm.core.segments import Decoder


class VllmExecutor:
    """The :class:`~adadecode_vllm.core.executor.SegmentExecutor` of a vLLM worker."""

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
        self._whole_batch: torch.Tensor | None = None

    @property
    def num_segments(self) -> int:
        """K + 1 for K exits."""
        return len(self.segments)

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
            return self._call(segment, positions, hidden, residual)
        assert self.batcher is not None, "the KV cache exists before any forward"
        batch = self.batcher.build(subset)
        with set_forward_context(
            batch.metadata,
            self.vllm_config,
            num_tokens=len(batch.positions),
            slot_mapping=batch.slot_mapping,
        ):
            return self._call(segment, batch.positions, hidden, residual)

    def gate(
        self, exit_index: int, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ask an exit head; see the protocol."""
        token, confidence = self._gate(exit_index, hidden, residual)
        # float64 holds every token id; one copy to the host instead of two.
        answer = torch.stack((token.double(), confidence.double())).cpu().numpy()
        return answer[0].astype(np.int64), answer[1].astype(np.float32)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the segments, outside of any request.

        Two tokens, because sizes 0 and 1 would be baked into the graphs.
        """
        decoder = self.decoder
        hidden = torch.zeros(
            (2, decoder.hidden_size), dtype=decoder.dtype, device=decoder.device
        )
        for segment in range(self.num_segments):
            positions = torch.zeros(2, dtype=torch.int64, device=decoder.device)
            with set_forward_context(None, self.vllm_config, num_tokens=2):
                residual = None if segment == 0 else hidden.clone()
                self._call(segment, positions, hidden.clone(), residual)

    def _call(
        self,
        segment: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        module = self.segments[segment]
        if segment == 0:
            return module(positions, hidden)
        if segment == self.num_segments - 1:
            return module(positions, hidden, residual), None
        return module(positions, hidden, residual)
