# SPDX-License-Identifier: Apache-2.0
"""vLLM's piecewise CUDA graphs for segments on batches of any shape."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

# Larger batches keep the device busy longer than the host needs to launch them.
_MAX_TOKENS = 512


class PiecewiseInputs:
    """Persistent inputs, which graphs need, padded to the sizes that were captured.

    The compiled segments split themselves at the attention and capture the pieces in
    between, once a forward context names a size and the piecewise mode.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate the inputs.

        Args:
            sizes: vLLM's capture sizes, in tokens.
            hidden_size: d.
            dtype: The model's dtype.
            device: The device.
        """
        self.sizes = sorted(size for size in sizes if size <= _MAX_TOKENS)
        largest = self.sizes[-1] if self.sizes else 0
        self.positions = torch.zeros(largest, dtype=torch.int64, device=device)
        shape = (largest, hidden_size)
        # Segment 0 returns its input as the residual stream it began with, so its input
        # must not be what the next segment's hidden states are copied to.
        self.embeddings = torch.zeros(shape, dtype=dtype, device=device)
        self.hidden = torch.zeros(shape, dtype=dtype, device=device)
        self.residual = torch.zeros(shape, dtype=dtype, device=device)

    def size(self, num_tokens: int) -> int | None:
        """The smallest captured size that holds a batch, or None."""
        index = bisect_left(self.sizes, num_tokens)
        return self.sizes[index] if index < len(self.sizes) else None

    def fill(
        self,
        size: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Copy a batch into the inputs.

        Args:
            size: A captured size.
            positions: (n,) int64, n <= size.
            hidden: (n, d).
            residual: (n, d), or None for segment 0.

        Returns:
            The same three, padded to ``size``; padding holds whatever was there.
        """
        count = len(positions)
        self.positions[:count].copy_(positions)
        if residual is None:
            self.embeddings[:count].copy_(hidden)
            return self.positions[:size], self.embeddings[:size], None
        # First, since after a segment it may be a view of these very buffers.
        self.residual[:count].copy_(residual)
        self.hidden[:count].copy_(hidden)
        return self.positions[:size], self.hidden[:size], self.residual[:size]

    @staticmethod
    def context(size: int, *, graph: bool = True) -> dict[str, Any]:
        """Arguments of ``set_forward_context`` that choose the graphs of a size."""
        mode = CUDAGraphMode.PIECEWISE if graph else CUDAGraphMode.NONE
        return {
            "cudagraph_runtime_mode": mode,
            "batch_descriptor": BatchDescriptor(num_tokens=size),
        }
