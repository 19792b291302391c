# SPDX-License-Identifier: Apache-2.0
"""The simulation's counters are the engine's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adadecode_vllm.toolkit.evaluation.answers import known_answers
from adadecode_vllm.toolkit.evaluation.run import (
    gate_log_odds,
    guess_log_odds,
    load_heads_for,
)
from adadecode_vllm.toolkit.evaluation.simulate import Counters, total
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.states.texts import Text
from tests.harness import (
    HEADS,
    MAX_MODEL_LEN,
    MODEL,
    adadecode_options,
    configure,
    generate,
    start_engine,
    stats,
)

pytestmark = pytest.mark.engine

# Different for each exit, so that the gate `acceptance` is no plain threshold.
CALIBRATION = {
    "2": {"slope": 0.5, "intercept": 0.25, "tokens": 10},
    "4": {"slope": 1.5, "intercept": -1.0, "tokens": 10},
    "8": {"slope": 1.0, "intercept": 2.0, "tokens": 10},
}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's heads with a made-up calibration."""
    directory = tmp_path_factory.mktemp("heads") / "heads"
    shutil.copytree(HEADS, directory)
    config = json.loads((directory / "config.json").read_text())
    config["calibration"] = CALIBRATION
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher.load(MODEL)


@pytest.fixture(scope="module")
def engine(calibrated: Path) -> Iterator[Any]:
    options = adadecode_options(
        str(calibrated), threshold=0.75, gate="acceptance", max_early_predictions=8
    )
    with start_engine(**options) as llm:
        yield llm


def simulated(
    teacher: Teacher,
    heads: Path,
    llm: Any,
    prompts: list[str],
    outputs: list[list[int]],
    threshold: float,
    cap: int,
    gate: str,
    draft_vocabulary: int | None = None,
) -> Counters:
    tokenizer = llm.get_tokenizer()
    texts = []
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = tuple(tokenizer(prompt).input_ids)
        texts.append(Text((*ids, *output), len(ids) - 1, prompted=True))
    config, tensors = load_heads_for(teacher, heads)
    ranking = tensors.draft_token_ids
    assert ranking is not None
    answers = known_answers(
        teacher,
        config.exit_layers,
        tensors.weights,
        texts,
        max_length=MAX_MODEL_LEN,
        draft_token_ids=ranking[:draft_vocabulary] if draft_vocabulary else None,
        memory=tensors.memory,
    )
    assert [list(answer.tokens) for answer in answers] == outputs
    return total(
        answers,
        config.exit_layers,
        config.num_hidden_layers,
        gate_log_odds(config, threshold, gate),
        cap,
        guess_log_odds(config),
    )


def assert_same(found: dict[str, Any], counters: Counters) -> None:
    for name in ("early_predictions", "accepted", "rejected", "gates"):
        assert found[name] == getattr(counters, name), name


@pytest.mark.parametrize(("threshold", "cap"), [(0.75, 5), (0.2, 5), (0.0, 3)])
def test_early_predictions_and_acceptances_are_equal(
    engine: Any,
    teacher: Teacher,
    calibrated: Path,
    prompts: list[str],
    threshold: float,
    cap: int,
) -> None:
    configure(
        engine, gate="probability", threshold=threshold, max_early_predictions=cap
    )
    outputs = generate(engine, prompts)
    counters = simulated(
        teacher, calibrated, engine, prompts, outputs, threshold, cap, "probability"
    )
    found = stats(engine)
    assert sum(found["accepted"]) > 50
    if threshold < 0.5:
        assert sum(found["rejected"]) > 10
    assert_same(found, counters)


def test_the_acceptance_gate_weighs_the_exits_over_fewer_tokens(
    teacher: Teacher, calibrated: Path, prompts: list[str], reference: dict[str, Any]
) -> None:
    options = adadecode_options(
        str(calibrated),
        threshold=0.6,
        gate="acceptance",
        max_early_predictions=4,
        draft_vocabulary_size=100,
    )
    with start_engine(**options) as llm:
        outputs = generate(llm, prompts)
        found = stats(llm)
        counters = simulated(
            teacher, calibrated, llm, prompts, outputs, 0.6, 4, "acceptance", 100
        )
        whole = simulated(
            teacher, calibrated, llm, prompts, outputs, 0.6, 4, "acceptance"
        )
        plain = simulated(
            teacher, calibrated, llm, prompts, outputs, 0.6, 4, "probability", 100
        )
    assert outputs == reference["texts"]
    assert_same(found, counters)
    assert found["early_predictions"] != plain.early_predictions
    assert found["early_predictions"] != whole.early_predictions
