# SPDX-License-Identifier: Apache-2.0
"""On CPUs drafts are verified at their request's temperature, top-k and top-p.

Symptom without it: vLLM's rejection sampler expands these to one value for each draft
with a Triton kernel, and its stand-in for CPUs fills an integer copy of the buffer. The
sampler then divides logits by whatever was in memory, so that what is sampled follows
another distribution, or the engine ends on an index out of bounds. Greedy requests are
not touched by it.

Upstream: ``_expand_kernel_impl`` in
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/utils/cpu_triton_utils.py,
https://github.com/vllm-project/vllm/issues/55005 and its pull request 55006.

Can go when that is merged and released. It goes through ``register_kernels``, vLLM's
own way for a platform to bring an implementation, and concerns speculative methods
only.
"""

from __future__ import annotations

import torch
from vllm.logger import init_logger
from vllm.triton_utils import HAS_TRITON, dispatcher

KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"

logger = init_logger("vllm.adadecode")


def install() -> None:
    """Register the implementation, unless the kernel itself runs.

    vLLM registers its stand-ins anew for every worker, just before that sets itself up.
    """
    if HAS_TRITON:
        return
    # Otherwise each start-up would warn of a kernel that is overwritten.
    dispatcher._registry.pop(KERNEL, None)
    dispatcher.register_kernels({KERNEL: expand_values})
    logger.debug("expand_kernel keeps its values' type on CPUs")


def expand_values(
    output: torch.Tensor,
    values: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    max_num_tokens: int | None = None,
) -> None:
    """Give every draft its request's value.

    Args:
        output: (N,), written: one value for each draft.
        values: (R,) of the same dtype, one value for each request.
        cu_num_tokens: (R,) drafts of this and all earlier requests.
        replace_from: Value that is replaced.
        replace_to: Its replacement.
        max_num_tokens: Unused: the kernel's bound on drafts of a request.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = values.masked_fill(values == replace_from, replace_to)
    output.copy_(replaced.repeat_interleave(counts))
