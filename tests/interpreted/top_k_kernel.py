# SPDX-License-Identifier: Apache-2.0
"""vLLM's own top-k and top-p in torch, where its kernel needs a compiler.

Triton's interpreter ends on the kernel's row number, a plain integer there ("'int'
object has no attribute 'to'"), with and without this plugin.
"""

from __future__ import annotations


def install() -> None:
    """Put it in the place of the kernel."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.apply_top_k_top_p_triton = (
        topk_topp_sampler.apply_top_k_top_p_pytorch
    )
