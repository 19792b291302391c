# SPDX-License-Identifier: Apache-2.0
"""The final norm before an exit head, outside of any compiled graph."""

from __future__ import annotations

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.layernorm import RMSNorm


class FinalNorm:
    """A model's final norm.

    On CPUs vLLM leaves its norms to torch's compiler. Called alone they are a dozen
    operations, which take several times as long as vLLM's kernel for the same.
    """

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        """Find out whether there is a kernel.

        Args:
            norm: vLLM's module, ``norm(hidden, residual) -> (normed, sum)``.
            dtype: The model's dtype.
        """
        self._norm = norm
        self._kernel_norm: RMSNorm | None = None
        if (
            # Others derive from it and compute something else.
            type(norm) is RMSNorm
            and norm.has_weight
            and norm.variance_size_override is None
            and norm.weight.device.type == "cpu"
            and norm.weight.dtype == dtype
            and hasattr(torch.ops._C, "rms_norm")
        ):
            self._kernel_norm = norm

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """Normalize the residual stream.

        Args:
            hidden: (n, d); may be overwritten.
            residual: (n, d), which is added, and may be overwritten; None at the
                embedding.

        Returns:
            (n, d).
        """
        if (norm := self._kernel_norm) is not None:
            weight, epsilon = norm.weight, norm.variance_epsilon
            if residual is not None:
                ops.fused_add_rms_norm(hidden, residual, weight, epsilon)
                return hidden
            normed = torch.empty_like(hidden)
            ops.rms_norm(normed, hidden, weight, epsilon)
            return normed
        if residual is not None:
            return self._norm(hidden, residual)[0]
        # Some norms return a pair whatever they are given.
        answer = self._norm(hidden)
        return answer[0] if isinstance(answer, tuple) else answer
