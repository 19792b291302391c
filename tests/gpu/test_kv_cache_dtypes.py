# SPDX-License-Identifier: Apache-2.0
"""A quantized KV cache on a CUDA device, compiled and in CUDA graphs; the demo model.

Float32 throughout: in bfloat16 what a batch rounds otherwise is rounded to 8 bits again
and grows beyond a tie.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import (
    adadecode_options,
    configure,
    demo_corpus,
    generate,
    start_engine,
    stats,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.feature("fp8 KV cache", "supported")
# vLLM's attention for CUDA quantizes queries too, which it can to e4m3 alone.
@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3"])
def test_texts(kv_cache_dtype: str) -> None:
    prompts = demo_corpus().heldout_problems(12)
    engine: dict[str, Any] = {
        "gpu_memory_utilization": 0.3,
        "enforce_eager": False,
        "dtype": "float32",
        "kv_cache_dtype": kv_cache_dtype,
    }
    with start_engine(**engine) as llm:
        expected = generate(llm, prompts)
    with start_engine(**adadecode_options(threshold=0.0), **engine) as llm:
        assert generate(llm, prompts) == expected
        counted = stats(llm)
        assert sum(counted["accepted"]) > 0
        assert sum(counted["rejected"]) > 0
        configure(llm, threshold=0.75, max_early_predictions=3)
        assert generate(llm, prompts) == expected
        assert stats(llm)["resumed_tokens"] > 0
