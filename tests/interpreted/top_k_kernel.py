# SPDX-License-Identifier: Apache-2.0
"""vLLM's own top-k and top-p in torch, where its kernel needs a compiler.

Triton's interpreter ends on the kernel's row number, a plain integer there ("'int'
object has no attribute 'to'"), with and without this plugin.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Put it in the place of the kernel."""
    from vllm.v1.sample.ops import topk_topp_sampler

    def in_torch(logits: Any, k: Any, p: Any, **hints: Any) -> Any:
        """Since 0.33 the kernel is told which rows there are, to save work."""
        return topk_topp_sampler.apply_top_k_top_p_pytorch(logits, k, p)

    topk_topp_sampler.apply_top_k_top_p_triton = in_torch
