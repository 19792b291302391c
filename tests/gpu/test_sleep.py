# SPDX-License-Identifier: Apache-2.0
"""Sleep on a CUDA device: weights and KV cache leave it and come back; the demo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import (
    MODEL,
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


@pytest.mark.feature("sleep and wake", "supported", "levels 1 and 2")
def test_texts_and_acceptance_after_sleep() -> None:
    prompts = demo_corpus().heldout_problems(12)
    engine: dict[str, Any] = {
        "gpu_memory_utilization": 0.3,
        "enforce_eager": False,
        "enable_sleep_mode": True,
    }
    with start_engine(**adadecode_options(threshold=0.5), **engine) as llm:

        def run() -> tuple[list[list[int]], list[int]]:
            configure(llm)
            return generate(llm, prompts), stats(llm)["accepted"]

        expected = run()
        assert sum(expected[1]) > 0
        llm.sleep(level=1)
        llm.wake_up()
        assert run() == expected
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights", kwargs={"weights_path": MODEL})
        llm.wake_up(tags=["kv_cache"])
        assert run() == expected
