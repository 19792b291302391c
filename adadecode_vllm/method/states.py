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

    Attributes:
        finished: Tokens that have run all layers already, if there are any; valid until
            the next drafting cycle.

    Memory: ``2 * max_requests * (max_early_predictions + 1) * hidden_size`` elements.
    """

    def __init__(
        self,
        max_requests: int,
        window: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate the buffers.

        Args:
            max_requests: Largest number of requests in one batch.
            window: Tokens per request, 1 + the cap on early predictions.
            hidden_size: d.
            dtype: The model's dtype.
            device: The model's device.
        """
        self.window = window
        self.padding_row = max_requests * window
        shape = (self.padding_row + 1, hidden_size)
        self.hidden = torch.zeros(shape, dtype=dtype, device=device)
        self.residual = torch.zeros(shape, dtype=dtype, device=device)
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
        """Scatter states; the inverse of :meth:`read`."""
        self.hidden.index_copy_(0, index, hidden)
        self.residual.index_copy_(0, index, residual)
