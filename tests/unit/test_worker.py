# SPDX-License-Identifier: Apache-2.0
"""What workers and runners do around vLLM's own, with made-up ones of vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from adadecode_vllm.engine import adadecode as adadecode_module
from adadecode_vllm.engine.adadecode import AdaDecode
from adadecode_vllm.engine.draft_cycle import DraftCycle
from adadecode_vllm.engine.outcomes import (
    BY_COSTS,
    COUNTERS,
    EXIT_SECONDS,
    UNUSED_DRAFTS,
)
from adadecode_vllm.engine.runner_v1 import AdaDecodeCPUModelRunner
from adadecode_vllm.engine.runner_v2 import AdaDecodeModelRunner
from adadecode_vllm.engine.worker import AdaDecodeWorker
from adadecode_vllm.method.combined import Drafts
from adadecode_vllm.method.ledger import Ledger, Window
from adadecode_vllm.method.stats import Stats


class Scorer(nn.Module):
    """Rows of an LM head, and what no LM head can bring back."""

    def __init__(self, lm_head: torch.Tensor) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.head = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        self.rows = lm_head[1:3].clone()

    def refresh(self) -> None:
        self.rows.copy_(self.lm_head[1:3])

    def lasting(self) -> dict[str, torch.Tensor]:
        return {"T": self.head}


class VllmWorker:
    """Discards weights in its sleep, as CUDA's does; other weights are in parts."""

    def __init__(self) -> None:
        self.lm_head = torch.arange(8.0).view(4, 2)
        # With what a worker uses of it, but no model.
        self.adadecode = AdaDecode.__new__(AdaDecode)
        self.adadecode.ledger = Ledger()
        self.adadecode.model = SimpleNamespace(scorer=Scorer(self.lm_head))  # type: ignore[assignment]
        self.model_runner = SimpleNamespace(adadecode=self.adadecode)
        self.woken: list[Any] = []
        self.received: list[float] = []
        self.compile_or_warm_up: Any = None

    def sleep(self, level: int) -> None:
        if level == 2:
            for weight in (self.lm_head, self.scorer.head, self.scorer.rows):
                weight.fill_(float("nan"))

    def wake_up(self, tags: list[str] | None) -> None:
        self.woken.append(tags)

    def compile_or_warm_up_model(self) -> str:
        self.compile_or_warm_up()
        return "compiled"

    def update_weights(self, update_info: float) -> None:
        self.received.append(update_info)

    def finish_weight_update(self) -> None:
        self.lm_head.fill_(sum(self.received))

    def reset_weights(self) -> None:
        self.lm_head.zero_()

    @property
    def scorer(self) -> Any:
        return self.adadecode.scorer


class Worker(AdaDecodeWorker, VllmWorker):
    """Ours around it."""


def leave_pending(worker: Worker) -> None:
    ones = np.ones((1, 2), np.int8)
    window = Window(np.array([3]), np.array([2]), ones.astype(np.int64), ones, ones)
    worker.adadecode.ledger.record(1, ["a"], window)


def dropped(worker: Worker) -> dict[str, int]:
    assert len(worker.adadecode.ledger) == 0
    return dict(worker.adadecode.ledger.dropped_tokens)


@pytest.mark.parametrize("level", [1, 2])
def test_heads_survive_sleep_and_the_scorer_follows_the_lm_head(level: int) -> None:
    worker = Worker()
    scorer, lm_head = worker.scorer, worker.lm_head.clone()
    head = scorer.head.clone()
    storage = (scorer.head.data_ptr(), scorer.rows.data_ptr())
    leave_pending(worker)
    worker.sleep(level)
    assert dropped(worker) == {"slept": 2}
    worker.wake_up(["kv_cache"])
    assert bool(scorer.head.isnan().any()) is (level == 2)
    worker.lm_head.copy_(lm_head + 1)  # what vLLM kept, or somebody loaded meanwhile
    worker.wake_up(["weights"])
    worker.wake_up(None)
    assert torch.equal(scorer.head, head)
    assert torch.equal(scorer.rows, lm_head[1:3] + 1)
    # CUDA graphs know the addresses.
    assert (scorer.head.data_ptr(), scorer.rows.data_ptr()) == storage
    assert worker.woken == [["kv_cache"], ["weights"], None]


def test_drafts_are_told_with_their_exits() -> None:
    worker = Worker()
    worker.adadecode.stats = Stats((2, 5), num_layers=8)
    looked_up = Drafts([11, 12, 13], np.array([1, 0, -1], np.int8))
    worker.adadecode._drafts = {"a": looked_up, "b": Drafts([], np.empty(0, np.int8))}
    assert worker.adadecode_drafts() == {"a": [(11, 5), (12, 2), (13, -1)], "b": []}


def test_answers_are_forgotten_where_they_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where no request has asked for a lookup yet."""

    class Remembering:
        forgotten = 0

        def __init__(self, vocab_size: int) -> None:
            assert vocab_size == 4

        def forget_answers(self) -> None:
            self.forgotten += 1

    monkeypatch.setattr(adadecode_module, "SuffixLookup", Remembering)
    worker = Worker()
    worker.adadecode._lookup = None
    worker.adadecode._vocab_size = 4
    worker.adadecode._looks_in = "ngram"
    worker.adadecode_forget_answers()
    assert worker.adadecode._lookup is None
    worker.adadecode._looks_in = "suffix"
    worker.adadecode_forget_answers()
    worker.adadecode_forget_answers()
    lookup: Any = worker.adadecode._lookup
    assert lookup.forgotten == 2


@pytest.mark.parametrize("v2", [False, True])
def test_model_runner_v2_verifies_made_up_drafts_while_warming_up(v2: bool) -> None:
    worker = Worker()
    seen: list[str] = []

    @contextmanager
    def warming_up() -> Iterator[None]:
        seen.append("begins")
        yield
        seen.append("ends")

    worker.use_v2_model_runner = v2
    worker.model_runner.proposer = SimpleNamespace(warming_up=warming_up)
    worker.compile_or_warm_up = lambda: seen.append("warms up")
    assert worker.compile_or_warm_up_model() == "compiled"
    assert seen == (["begins", "warms up", "ends"] if v2 else ["warms up"])


def test_the_scorer_follows_weights_that_are_sent_in_parts() -> None:
    """The LM head is whole only at the end."""
    worker = Worker()
    before = worker.scorer.rows.clone()
    leave_pending(worker)
    worker.update_weights(1.0)
    assert dropped(worker) == {"weights_updated": 2}
    worker.update_weights(2.0)
    assert torch.equal(worker.scorer.rows, before)
    leave_pending(worker)
    worker.finish_weight_update()
    assert dropped(worker) == {"weights_updated": 4}
    assert bool((worker.scorer.rows == 3.0).all())


def test_the_scorer_follows_weights_that_are_reset() -> None:
    worker = Worker()
    leave_pending(worker)
    worker.reset_weights()
    assert dropped(worker) == {"weights_updated": 2}
    assert not worker.scorer.rows.any()


def sample_tokens(v2: bool, output: Any, unused: dict[str, int]) -> Any:
    """What one of our runners makes of what vLLM's returned."""
    adadecode: Any = SimpleNamespace(
        counters=lambda: np.array([1.0, 2.0]),
        settings=SimpleNamespace(by_costs=False),
        stats=SimpleNamespace(exit_seconds=lambda: np.array([[0.5], [3.0]])),
    )
    proposer: Any = SimpleNamespace(
        adadecode=adadecode,
        cycle=DraftCycle(adadecode, max_model_len=64),
        trim_grammar=lambda grammar_output: grammar_output,
        unused_drafts=unused,
        waited=False,
    )
    runner: Any
    with pytest.MonkeyPatch.context() as patch:
        for cls in (CPUModelRunner, GPUModelRunner):
            patch.setattr(cls, "sample_tokens", lambda self, grammar_output: output)
        if v2:
            runner = AdaDecodeModelRunner.__new__(AdaDecodeModelRunner)
            runner.speculator = proposer
        else:
            runner = AdaDecodeCPUModelRunner.__new__(AdaDecodeCPUModelRunner)
            runner.drafter = proposer
            runner._scheduled, runner._dropped = None, unused
        return runner.sample_tokens(None)


@pytest.mark.parametrize(
    ("v2", "copied"), [(False, False), (True, False), (True, True)]
)
def test_the_scheduler_learns_from_the_runner(v2: bool, copied: bool) -> None:
    """With Ray's first executor no worker takes part."""
    outcome = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    output: Any = outcome
    if copied:
        output = AsyncOutput.__new__(AsyncOutput)
        output.model_runner_output = outcome
    assert sample_tokens(v2, output, {}) is output
    assert getattr(outcome, COUNTERS).tolist() == [1.0, 2.0]
    assert getattr(outcome, BY_COSTS) is False
    assert getattr(outcome, EXIT_SECONDS).tolist() == [[0.5], [3.0]]
    assert not hasattr(outcome, UNUSED_DRAFTS)
    sample_tokens(v2, output, {"a": 3})
    assert getattr(outcome, UNUSED_DRAFTS) == {"a": 3}


@pytest.mark.parametrize("output", [None, EMPTY_MODEL_RUNNER_OUTPUT])
@pytest.mark.parametrize("v2", [False, True])
def test_what_all_steps_share_says_nothing(v2: bool, output: Any) -> None:
    """It would say the same in a later step."""
    assert sample_tokens(v2, output, {"a": 3}) is output
    for name in (COUNTERS, BY_COSTS, EXIT_SECONDS, UNUSED_DRAFTS):
        assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, name)
