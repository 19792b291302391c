# SPDX-License-Identifier: Apache-2.0
"""`adadecode doctor`: what heads take, and whether it is free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adadecode_vllm.heads import init_heads, load_heads_config, save_heads
from adadecode_vllm.toolkit.doctor import memory
from adadecode_vllm.toolkit.doctor.examine import examine
from adadecode_vllm.toolkit.doctor.machine import Device
from adadecode_vllm.toolkit.doctor.memory import (
    check_memory,
    default_requests,
    memory_needed,
)
from adadecode_vllm.toolkit.doctor.model import read_model
from tests.findings import GB, by_check
from tests.harness import HEADS, MODEL


def test_the_sums_of_the_design() -> None:
    """docs/design.md: the demo with 128 sequences takes 0.20 MB + 1.18 MB."""
    model = replace(read_model(MODEL), dtype="float32")
    need = memory_needed(model, load_heads_config(HEADS), 0, 128)
    assert (need.heads, need.states) == (3 * 128**2 * 4, 2 * 128 * 9 * 128 * 4)
    assert need.gates == 0  # the ranking is more than half of the vocabulary


def test_heads_with_memory_take_more(model: Path, tmp_path: Path) -> None:
    config = init_heads(str(model), tmp_path, [1, 3])
    same = {layer: torch.eye(config.hidden_size) for layer in (1, 3)}
    save_heads(tmp_path, same, config, memory=same)
    findings = by_check(examine(str(model), str(tmp_path)))
    figures = findings["memory"].figures
    row = 4 * config.hidden_size
    assert figures["heads_bytes"] == 2 * config.hidden_size * row  # U alone
    assert figures["states_bytes"] == 128 * 3 * 9 * row
    assert "with memory of the token before" in findings["heads"].text
    assert findings["speed"].text == "Unknown: these heads were not evaluated."


def test_what_vllm_reserves() -> None:
    from vllm.config import CacheConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    assert CacheConfig().gpu_memory_utilization == memory.VLLM_SHARE
    defaults = EngineArgs.get_batch_defaults(1)[1]
    asked = defaults[UsageContext.OPENAI_API_SERVER]
    assert asked == default_requests(Device("cpu", GB, GB))


def test_too_little_memory(model: Path, heads: Path) -> None:
    need = memory_needed(read_model(str(model)), load_heads_config(heads), 1, 128)
    (finding,) = check_memory(need, Device("cpu", 100_000, 50_000))
    assert finding.status == "problem"
    assert "0.1 MB of 0.1 MB are free" in finding.text


def test_what_vllm_would_reserve_is_not_free(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    need = memory_needed(read_model(str(model)), load_heads_config(heads), 1, 128)
    half = Device("cpu", 64 * GB, 32 * GB)
    fits, reserves = check_memory(need, half)
    assert (fits.status, reserves.status) == ("ok", "warning")
    assert "--gpu-memory-utilization 0.47" in reserves.remedy
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert len(list(check_memory(need, half))) == 1
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert len(list(check_memory(need, Device("cpu", 64 * GB, 60 * GB)))) == 1
    assert len(list(check_memory(need, Device("cuda", 64 * GB, 32 * GB)))) == 1
