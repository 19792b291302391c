# SPDX-License-Identifier: Apache-2.0
"""What `adadecode doctor` says beforehand, beside an engine that runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adadecode_vllm.toolkit.doctor.examine import examine
from adadecode_vllm.toolkit.doctor.finding import all_well
from adadecode_vllm.toolkit.doctor.fit import read_heads
from adadecode_vllm.toolkit.doctor.memory import memory_needed
from adadecode_vllm.toolkit.doctor.model import read_model
from tests.harness import HEADS, MODEL, adadecode_options, start_engine

pytestmark = pytest.mark.engine


def test_an_engine_takes_what_was_said() -> None:
    assert all_well(examine(MODEL, HEADS))
    model = replace(read_model(MODEL), dtype="float32")
    need = memory_needed(model, read_heads(HEADS).config, 0, requests=16)
    with start_engine(**adadecode_options(), max_num_seqs=16) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        states: Any = worker.model_runner.adadecode.states
        served = worker.model_config
        padding = 2 * states.hidden[0].nbytes
        assert states.hidden.nbytes + states.residual.nbytes - padding == need.states
        assert list(served.architectures) == list(model.architectures)
        assert served.get_total_num_hidden_layers() == model.num_hidden_layers
        assert served.get_hidden_size() == model.hidden_size
        assert served.get_vocab_size() == model.vocab_size
