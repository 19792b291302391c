# SPDX-License-Identifier: Apache-2.0
"""What every worker does around vLLM's own, with a made-up worker of vLLM's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from adadecode_vllm.core.ledger import Ledger, Window
from adadecode_vllm.scheduler import COUNTERS
from adadecode_vllm.worker.common import AdaDecodeWorker


class VllmWorker:
    """Discards weights in its sleep, as CUDA's does."""

    def __init__(self, output: Any = None) -> None:
        gate = nn.Linear(3, 2, bias=False)
        gate.register_buffer("token_ids", torch.tensor([5, 7]))
        self.adadecode: Any = SimpleNamespace(
            ledger=Ledger(),
            weights=lambda: {"T": gate.weight.data, "token_ids": gate.token_ids.data},
            gate=gate,
            counters=lambda: np.array([1.0, 2.0]),
        )
        self.model_runner = SimpleNamespace(adadecode=self.adadecode)
        self.output = output
        self.woken: list[Any] = []

    def sleep(self, level: int) -> None:
        if level == 2:
            gate = self.adadecode.gate
            gate.weight.data.fill_(float("nan"))
            gate.token_ids.fill_(-1)

    def wake_up(self, tags: list[str] | None) -> None:
        self.woken.append(tags)

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self.output


class Worker(AdaDecodeWorker, VllmWorker):
    """Ours around it."""


@pytest.mark.parametrize("level", [1, 2])
def test_heads_and_counters_survive_sleep(level: int) -> None:
    worker = Worker()
    gate = worker.adadecode.gate
    weight, storage = gate.weight.detach().clone(), gate.weight.data_ptr()
    ones = np.ones((1, 2), np.int8)
    window = Window(np.array([3]), np.array([2]), ones.astype(np.int64), ones, ones)
    worker.adadecode.ledger.record(1, ["a"], window)
    worker.sleep(level)
    assert len(worker.adadecode.ledger) == 0
    assert worker.adadecode.ledger.dropped_tokens == {"slept": 2}
    worker.wake_up(["kv_cache"])
    assert bool(gate.weight.isnan().any()) is (level == 2)
    worker.wake_up(["weights"])
    worker.wake_up(None)
    assert torch.equal(gate.weight, weight)
    assert gate.token_ids.tolist() == [5, 7]
    # CUDA graphs know the address.
    assert gate.weight.data_ptr() == storage
    assert worker.woken == [["kv_cache"], ["weights"], None]


def test_counters_travel_with_the_outcome() -> None:
    plain = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    assert Worker(plain).sample_tokens(None) is plain
    assert getattr(plain, COUNTERS).tolist() == [1.0, 2.0]
    inner = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    Worker(SimpleNamespace(model_runner_output=inner)).sample_tokens(None)
    assert getattr(inner, COUNTERS).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("output", [None, EMPTY_MODEL_RUNNER_OUTPUT])
def test_what_all_steps_share_carries_no_counters(output: Any) -> None:
    """It would show old ones in a later step."""
    assert Worker(output).sample_tokens(None) is output
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, COUNTERS)
