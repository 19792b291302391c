# SPDX-License-Identifier: Apache-2.0
"""Logits processors are built although there may be drafts."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    MinPLogitsProcessor,
    build_logitsprocs,
)
from vllm.v1.worker import gpu_model_runner

from adadecode_vllm.engine.limits import processed_rows
from adadecode_vllm.patches import logits_processors


def test_processors_are_built_as_without_drafts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setattr(
        logits_processors,
        "build_logitsprocs",
        lambda config, *arguments: seen.append((config.speculative_config, arguments)),
    )
    monkeypatch.setattr(
        gpu_model_runner, "build_logitsprocs", logits_processors.build_logitsprocs
    )
    config: Any = SimpleNamespace(speculative_config="drafts")
    with logits_processors.beside_drafts():
        gpu_model_runner.build_logitsprocs(config, "cpu", False)
    assert seen == [(None, ("cpu", False))]
    assert config.speculative_config == "drafts"
    gpu_model_runner.build_logitsprocs(config, "cpu", False)
    assert seen[1][0] == "drafts"


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gpu_model_runner, "build_logitsprocs")
    with (
        pytest.raises(RuntimeError, match=r"is not vLLM's own"),
        logits_processors.beside_drafts(),
    ):
        pass


def test_vllm_still_builds_none_beside_drafts() -> None:
    """Fails once vLLM applies processors to drafts: then the patch can go."""
    source = inspect.getsource(build_logitsprocs)
    assert "STR_SPEC_DEC_REJECTS_LOGITSPROCS" in source


class _Adapter(AdapterLogitsProcessor):
    def __init__(self, rows: list[int]) -> None:
        self.req_info = dict.fromkeys(rows, lambda logits: logits)

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> None:
        return None


def _processed(*processors: Any) -> list[bool]:
    batch: Any = SimpleNamespace(logitsprocs=SimpleNamespace(all=processors))
    return processed_rows(batch, np.array([0, 2, 3])).tolist()


def test_rows_that_a_processor_may_change() -> None:
    built_in = object.__new__(MinPLogitsProcessor)
    assert _processed() == _processed(built_in) == [False] * 3
    assert _processed(built_in, _Adapter([2, 5])) == [False, True, False]
    # Any other may concern any request.
    assert _processed(_Adapter([]), object()) == [True] * 3
