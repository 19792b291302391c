# SPDX-License-Identifier: Apache-2.0
"""Hidden states of pending tokens, kept between drafting and resumption."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Finished:
    """Tokens of a drafting cycle that ran all layers before the step that verifies.

    Attributes:
        hidden: (n, d), what the final norm returned, request by request.
        first: (R,) int64, the first row of each slot of the cycle.
    """

    hidden: torch.Tensor
    first: np.ndarray


class PendingStates:
    """Preallocated hidden states and residuals, addressed by (slot, window offset).

    The two are kept apart and in the model's dtype (I4): vLLM's fused add-and-norm
    works on their unrounded sum, so storing the sum would change the arithmetic.

    One more row than there are tokens takes what padding in CUDA graphs writes.

    Heads with memory read, beside a token's hidden state, the state that the token was
    taken from: the final layer's for a sampled token, the exit head's own output for an
    early prediction. The former comes with the cycle, the latter is written when the
    head has scored, so nothing of it outlives a cycle. A window's last token is never
    scored: nothing could follow it.

    Attributes:
        memory: (rows + 1, d), what each token was taken from; None for heads without
            memory.
        finished: Tokens that have run all layers already, if there are any; valid until
            the next drafting cycle.

    Memory: ``2 * max_requests * (max_early_predictions + 1) * hidden_size`` elements,
    and half as much for heads with memory.
    """

    def __init__(
        self,
        max_requests: int,
        window: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        with_memory: bool = False,
    ) -> None:
        """Allocate the buffers.

        Args:
            max_requests: Largest number of requests in one batch.
            window: Tokens per request, 1 + the cap on early predictions.
            hidden_size: d.
            dtype: The model's dtype.
            device: The model's device.
            with_memory: Whether the heads have memory.
        """
        self.window = window
        self.padding_row = max_requests * window
        shape = (self.padding_row + 1, hidden_size)
        self.hidden = torch.zeros(shape, dtype=dtype, device=device)
        self.residual = torch.zeros(shape, dtype=dtype, device=device)
        self.memory: torch.Tensor | None = None
        if with_memory:
            # What padding says of a token that would follow goes behind all.
            shape = (self.padding_row + 2, hidden_size)
            self.memory = torch.zeros(shape, dtype=dtype, device=device)
            windows = self.memory[: self.padding_row].unflatten(0, (-1, window))
            self._sampled_from = windows[:, 0]
        self.finished: Finished | None = None

    def read(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather states.

        Args:
            index: (n,) int64, ``slot * window + offset``.

        Returns:
            Hidden states and residuals, (n, d) each.
        """
        return self.hidden.index_select(0, index), self.residual.index_select(0, index)

    def write(
        self, index: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> None:
        """Scatter states; the inverse of `read`."""
        self.hidden.index_copy_(0, index, hidden)
        self.residual.index_copy_(0, index, residual)

    def begin_memory(self, sampled_from: torch.Tensor | None) -> None:
        """Take in what a cycle's newest tokens were sampled from.

        Args:
            sampled_from: (R, d) final states by slot; None where they are unknown,
                which makes drafts worse and no text wrong.
        """
        if self.memory is None:
            return
        if sampled_from is None:
            self._sampled_from.zero_()
        else:
            self._sampled_from[: len(sampled_from)] = sampled_from

    def read_memory(self, index: torch.Tensor) -> torch.Tensor | None:
        """The memory of tokens.

        Args:
            index: (n,) int64, ``slot * window + offset``.

        Returns:
            (n, d); None for heads without memory.
        """
        if self.memory is None:
            return None
        return self.memory.index_select(0, index)

    def write_memory(self, index: torch.Tensor, output: torch.Tensor) -> None:
        """Keep what exit heads made of tokens: their successors' memory.

        Args:
            index: (n,) int64, ``slot * window + offset`` of the tokens asked about.
            output: (n, d).
        """
        assert self.memory is not None, "only heads with memory have an output"
        self.memory.index_copy_(0, index + 1, output)
