# SPDX-License-Identifier: Apache-2.0
"""Heads as training leaves them: served by their own name, with what it recommends."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator

from adadecode_vllm.heads import load_heads_config
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.training.options import Reporter, RunOptions
from adadecode_vllm.toolkit.training.run import train_heads
from adadecode_vllm.toolkit.training.settings import TrainSettings
from tests.data_directory import write_rows
from tests.harness import MODEL, Reference, generate, metric, start_engine

pytestmark = pytest.mark.engine

SETTINGS = TrainSettings(
    epochs=2, batch_size=4, held_out=0.25, memory=True, start="ridge"
)


@pytest.fixture(scope="module")
def trained(
    prompts: list[str],
    reference: Reference,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Heads of the demo's model, from its own answers to a few prompts."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("trained")
    asked = AutoTokenizer.from_pretrained(MODEL)(prompts)["input_ids"]
    rows = list(zip(asked, reference["texts"], strict=True))
    teacher = Teacher.load(MODEL)
    data = write_rows(directory / "data", rows, vocab_size=teacher.vocab_size)
    output = directory / "heads"
    options = RunOptions(output, max_early_predictions=4)
    train_heads(
        teacher,
        [data],
        [1, 4],
        SETTINGS,
        options,
        Accelerator(cpu=True),
        Reporter(),
    )
    return output


def test_they_are_served_by_their_own_name(
    trained: Path, prompts: list[str], reference: Reference
) -> None:
    recommended = load_heads_config(trained).recommended
    assert recommended is not None
    assert recommended["max_early_predictions"] == 4
    with start_engine(str(trained), additional_config={"adadecode": {}}) as llm:
        config = llm.llm_engine.vllm_config
        assert config.model_config.model == MODEL
        options = config.additional_config["adadecode"]
        assert recommended.items() <= options.items()
        assert options["policy"] == "cost"
        assert generate(llm, prompts) == reference["texts"]
        assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0
