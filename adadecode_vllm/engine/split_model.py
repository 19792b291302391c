# SPDX-License-Identifier: Apache-2.0
"""A loaded model, split at its exits: what can be called before there is a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context

from adadecode_vllm.engine.exit_scorer import ExitScorer
from adadecode_vllm.engine.piecewise import PiecewiseInputs
from adadecode_vllm.engine.segments import Decoder


class SplitModel:
    """The segments and the exits between them.

    Attributes:
        decoder: The model's parts.
        segments: The segments, each with at least one layer.
        exits_at_embedding: 1 where the first exit reads the embedding, else 0.
        scorer: The exit heads over the LM head; see :meth:`ExitScorer.forward`.
    """

    def __init__(
        self,
        decoder: Decoder,
        segments: Sequence[nn.Module],
        scorer: ExitScorer,
        vllm_config: VllmConfig,
    ) -> None:
        """Put the parts together.

        Args:
            decoder: The model's parts.
            segments: The segments.
            scorer: The exit heads over the LM head, of as many exits as there are ends
                of segments before the last, or of one more, which reads the embedding.
            vllm_config: The engine's configuration.
        """
        self.decoder = decoder
        self.segments = list(segments)
        self.scorer = scorer
        self.exits_at_embedding = scorer.num_exits - (len(segments) - 1)
        self.vllm_config = vllm_config

    @property
    def num_segments(self) -> int:
        """Segments with layers."""
        return len(self.segments)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embed (n,) token ids; (n, d)."""
        return self.decoder.embed(token_ids)

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
            Hidden states and residual, (n, d) each, after the segment. The last segment
            returns the final norm's output and None.
        """
        module = self.segments[segment]
        arguments = (
            (positions, hidden) if segment == 0 else (positions, hidden, residual)
        )
        if segment == self.num_segments - 1:
            return module(*arguments), None
        return module(*arguments)

    def run_compiled(self, model: nn.Module) -> None:
        """Let a compiled model run as its segments, one after the other.

        Then its layers are compiled once instead of twice, and a forward without
        pending tokens runs the same code as one with them. A model that vLLM does not
        compile by itself, or that is a single segment, is left alone.

        Args:
            model: The model that was split, before its first forward.
        """
        inner: Any = model.model
        if self.num_segments == 1 or getattr(inner, "do_not_compile", True):
            return

        def forward(
            input_ids: torch.Tensor | None,
            positions: torch.Tensor,
            intermediate_tensors: None = None,
            inputs_embeds: torch.Tensor | None = None,
        ) -> torch.Tensor:
            if inputs_embeds is None:
                assert input_ids is not None, "tokens or their embeddings"
                inputs_embeds = self.embed(input_ids)
            hidden, residual = inputs_embeds, None
            for segment in range(self.num_segments):
                hidden, residual = self.call(segment, positions, hidden, residual)
            return hidden

        inner.do_not_compile = True
        inner.forward = forward

    @torch.inference_mode()
    def warm_up(self, num_tokens: int) -> None:
        """Compile the segments, outside of any request.

        A single segment is the whole model: it is never run here but by vLLM.

        Args:
            num_tokens: Size of the batch. At least two, because sizes 0 and 1 would be
                baked into the graphs; more where vLLM measures the memory of a step.
        """
        if self.num_segments == 1:
            return
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

    @torch.inference_mode()
    def capture_piecewise(self, inputs: PiecewiseInputs) -> None:
        """Capture the segments' pieces for every size that there are inputs for.

        To be called within vLLM's ``graph_capture``. The attention runs between the
        pieces and is given nothing to do.

        Args:
            inputs: What the graphs read.
        """
        for size in reversed(inputs.sizes):
            states = inputs.hidden.new_zeros((size, self.decoder.hidden_size))
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
