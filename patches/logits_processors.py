# SPDX-License-Identifier: Apache-2.0
"""``build_logitsprocs`` builds all logits processors although there may be drafts.

Symptom without it: with any speculative method Model Runner V1 builds no processor for
min_p and logit_bias, and a custom one (``--logits-processors``) ends start-up in a
traceback about speculative decoding. A proposer that makes no draft for the requests
concerned needs neither: the sampler applies processors to one token a request, the one
that follows the drafts, and that is all that such a request samples.

Upstream: ``build_logitsprocs`` in
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/sample/logits_processor/__init__.py
The change to propose there: let the speculative method say that it draws no drafts for
requests that processors concern.

Can go when vLLM's rejection sampler applies processors to drafts. The name is replaced
only while one runner is built.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.worker import gpu_model_runner

from adadecode_vllm.compat import SUPPORTED_NAMES


@contextmanager
def beside_drafts() -> Iterator[None]:
    """Let ``GPUModelRunner.__init__`` build logits processors as without drafts.

    Raises:
        RuntimeError: If vLLM's module does not look as expected.
    """
    if getattr(gpu_model_runner, "build_logitsprocs", None) is not build_logitsprocs:
        raise RuntimeError(
            "adadecode: vllm.v1.worker.gpu_model_runner.build_logitsprocs is not "
            f"vLLM's own; this plugin was written for vLLM {SUPPORTED_NAMES}. Remove "
            "other patches, or install one of them."
        )

    def build(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        without = copy.copy(vllm_config)
        without.speculative_config = None
        return build_logitsprocs(without, *args, **kwargs)

    gpu_model_runner.build_logitsprocs = build
    try:
        yield
    finally:
        gpu_model_runner.build_logitsprocs = build_logitsprocs
