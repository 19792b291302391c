# SPDX-License-Identifier: Apache-2.0
"""A kernel of Model Runner V2 that Triton's interpreter cannot run, in torch.

It refuses the mask that vLLM's bitmask kernel stores with ("mask has unsupported
dtype"), with and without this plugin.
"""

from __future__ import annotations

from typing import Any

import torch


class BitmaskKernel:
    """Called as the kernel is: `kernel[grid](...)`."""

    def __getitem__(self, grid: Any) -> Any:
        """All programs of the grid at once."""
        return self._run

    @staticmethod
    def _run(
        logits: torch.Tensor,
        logits_stride: int,
        mapping: torch.Tensor,
        cu_num_logits: torch.Tensor,
        bitmask: torch.Tensor,
        bitmask_stride: int,
        vocab_size: int,
        MASK_STRIDE: int,
        BLOCK_SIZE: int,
    ) -> None:
        starts = cu_num_logits.tolist()
        for row, index in zip(bitmask, mapping.tolist(), strict=True):
            request, position = divmod(index, MASK_STRIDE)
            if position < starts[request + 1] - starts[request]:
                bits = (row[:, None] >> torch.arange(32)) & 1
                allowed = bits.flatten()[:vocab_size].bool()
                logits[starts[request] + position, ~allowed] = float("-inf")


def install() -> None:
    """Put it in the place of vLLM's."""
    from vllm.v1.worker.gpu import structured_outputs

    structured_outputs._apply_grammar_bitmask_kernel = BitmaskKernel()
