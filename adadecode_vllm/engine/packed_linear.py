# SPDX-License-Identifier: Apache-2.0
"""A matrix product by the kernel of vLLM's own linear layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm


class PackedLinear(nn.Module):
    """A matrix that is multiplied by the kernel which vLLM's own layers use.

    On CPU vLLM packs weights for a faster kernel than torch's; elsewhere torch's is
    the kernel.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """Take the weight, and pack it where it is on the CPU.

        Args:
            weight: (m, d), in the model's dtype, on its device.
        """
        super().__init__()
        self._shape = weight.shape
        self.cpu_linear: Callable[..., torch.Tensor] | None = None
        self._hold(weight)

    def _hold(self, weight: torch.Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        if weight.device.type == "cpu":
            dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def refill(self, fill: Callable[[torch.Tensor], None]) -> None:
        """Change the weight.

        Where it is not packed it stays where it is in memory, since CUDA graphs know
        the address.

        Args:
            fill: Writes the new (m, d) weight into the tensor that it is given.
        """
        if self.cpu_linear is None:
            fill(self.weight.data)
            return
        weight = self.weight.new_empty(self._shape)
        fill(weight)
        self._hold(weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (n, m) for (n, d) hidden states."""
        if self.cpu_linear is not None:
            return self.cpu_linear(hidden, self.weight, None)
        return nn.functional.linear(hidden, self.weight)
