# SPDX-License-Identifier: Apache-2.0
"""Sleep on a CUDA device: weights and KV cache leave it and come back; the demo.

Gates over a draft vocabulary, whose rows follow what the LM head is after each sleep.
"""

from __future__ import annotations

from pathlib import Path
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
from tests.renamed_model import rename_frequent_tokens

RANKED = 512

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.feature("sleep and wake", "supported", "levels 1 and 2")
def test_texts_and_acceptance_after_sleep(tmp_path: Path) -> None:
    prompts = demo_corpus().heldout_problems(12)
    engine: dict[str, Any] = {
        "gpu_memory_utilization": 0.3,
        "enforce_eager": False,
        "enable_sleep_mode": True,
    }
    model = rename_frequent_tokens(tmp_path / "model", RANKED)
    options = adadecode_options(threshold=0.5, draft_vocabulary_size=RANKED)
    with start_engine(**options, **engine) as llm:
        tokenizer = llm.get_tokenizer()
        tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]

        def run(tokens: list[list[int]]) -> tuple[list[list[int]], list[int]]:
            configure(llm)
            given = [{"prompt_token_ids": prompt} for prompt in tokens]
            return generate(llm, given), stats(llm)["accepted"]

        def wake_with(weights: str) -> None:
            llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights", kwargs={"weights_path": weights})
            llm.wake_up(tags=["kv_cache"])

        expected = run(tokens)
        assert sum(expected[1]) > 0
        llm.sleep(level=1)
        llm.wake_up()
        assert run(tokens) == expected
        llm.sleep(level=2)
        wake_with(MODEL)
        assert run(tokens) == expected
        llm.sleep(level=2)
        wake_with(str(model.directory))
        renamed = run(model.renamed(tokens))
        assert renamed == (model.renamed(expected[0]), expected[1])
