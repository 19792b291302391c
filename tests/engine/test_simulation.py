# SPDX-License-Identifier: Apache-2.0
"""The simulation's counters are the engine's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adadecode_vllm.config import parse_config
from adadecode_vllm.engine import draft_cycle
from adadecode_vllm.toolkit.evaluation.answers import known_answers
from adadecode_vllm.toolkit.evaluation.counters import Counters, StepCosts
from adadecode_vllm.toolkit.evaluation.defaults import engine_with
from adadecode_vllm.toolkit.evaluation.run import load_heads_for
from adadecode_vllm.toolkit.evaluation.simulate import total
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
    draft_vocabulary: int | None = None,
    requests: int | None = None,
    costs: StepCosts | None = None,
    **options: Any,
) -> Counters:
    tokenizer = llm.get_tokenizer()
    texts = []
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = tuple(tokenizer(prompt).input_ids)
        texts.append(Text((*ids, *output), len(ids) - 1, prompted=True))
    config, tensors = load_heads_for(teacher, heads)
    ranking = tensors.draft_token_ids
    if draft_vocabulary:
        assert ranking is not None
        ranking = ranking[:draft_vocabulary]
    options = {"heads": str(heads), "exit_layers": config.exit_layers, **options}
    engine = parse_config(options)
    assert engine.exit_layers is not None
    answers = known_answers(
        teacher,
        config.exit_layers,
        tensors.weights,
        texts,
        max_length=MAX_MODEL_LEN,
        draft_token_ids=ranking if draft_vocabulary else None,
        memory=tensors.memory,
    )
    assert [list(answer.tokens) for answer in answers] == outputs
    return total(*engine_with(answers, config, engine, requests, MAX_MODEL_LEN), costs)


SAME = (
    "early_predictions",
    "accepted",
    "rejected",
    "gates",
    "ngram_drafts",
    "ngram_accepted",
    "ngram_rejected",
)


def assert_same(found: dict[str, Any], counters: Counters, requests: int) -> None:
    for name in SAME:
        assert found[name] == getattr(counters, name), name
    # The engine counts the forwards of the prompts too.
    assert found["request_steps"] == counters.forwards + requests


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
        engine,
        gate="probability",
        threshold=threshold,
        max_early_predictions=cap,
        ngram="off",
    )
    outputs = generate(engine, prompts)
    counters = simulated(
        teacher, calibrated, engine, prompts, outputs,
        threshold=threshold, max_early_predictions=cap,
    )  # fmt: skip
    found = stats(engine)
    assert sum(found["accepted"]) > 50
    if threshold < 0.5:
        assert sum(found["rejected"]) > 10
    assert_same(found, counters, len(prompts))


@pytest.mark.parametrize("ngram", ["first", "tail", "chain"])
def test_ngram_drafts_are_equal(
    engine: Any, teacher: Teacher, calibrated: Path, prompts: list[str], ngram: str
) -> None:
    options: dict[str, Any] = {
        "threshold": 0.6,
        "max_early_predictions": 5,
        "ngram": ngram,
    }
    configure(engine, gate="probability", **options)
    outputs = generate(engine, prompts)
    found = stats(engine)
    counters = simulated(teacher, calibrated, engine, prompts, outputs, **options)
    assert_same(found, counters, len(prompts))
    assert min(found["ngram_accepted"], found["ngram_rejected"]) > 0
    assert sum(found["accepted"]) > 10


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

        def play(gate: str, draft_vocabulary: int | None) -> Counters:
            return simulated(
                teacher, calibrated, llm, prompts, outputs, draft_vocabulary,
                threshold=0.6, max_early_predictions=4, gate=gate,
            )  # fmt: skip

        counters = play("acceptance", 100)
        whole = play("acceptance", None)
        plain = play("probability", 100)
    assert outputs == reference["texts"]
    assert_same(found, counters, len(prompts))
    assert found["early_predictions"] != plain.early_predictions
    assert found["early_predictions"] != whole.early_predictions


@pytest.mark.parametrize("exit_layers", [[0], [0, 2], [2, 4]])
def test_heads_with_memory_beside_ngram_drafts(
    memory_heads: Path, teacher: Teacher, prompts: list[str], exit_layers: list[int]
) -> None:
    options: dict[str, Any] = {
        "exit_layers": exit_layers,
        "threshold": 0.2,
        "max_early_predictions": 4,
    }
    with start_engine(**adadecode_options(str(memory_heads), **options)) as llm:
        for ngram in ("first", "tail", "chain", "off"):
            configure(llm, ngram=ngram)
            outputs = generate(llm, prompts)
            found = stats(llm)
            counters = simulated(
                teacher, memory_heads, llm, prompts, outputs, ngram=ngram, **options
            )
            assert (found["ngram_accepted"] > 0) is (ngram != "off")
            assert min(sum(found["accepted"]), sum(found["rejected"])) > 10
            assert_same(found, counters, len(prompts))


class RowsCost(StepCosts):
    """A forward costs its rows alone, in numbers that add up exactly."""

    def __init__(self, row: float) -> None:
        self.row = row

    def verifying(self, segments: Sequence[tuple[float, int]]) -> float:
        return 1.0 + self.row * segments[-1][1]


def fix_costs(llm: Any, costs: RowsCost) -> None:
    """Let an engine's steps take what they are said to cost, and its exits nothing."""
    adaptive = llm.llm_engine.engine_core.engine_core.scheduler._adaptive
    step, clock = adaptive.step, [0.0]
    # The simulation drafts behind the scheduler's look at a step, the engine before it.
    asked: list[np.ndarray] = []

    def timed(**outcome: Any) -> bool:
        rows = outcome["requests"] + outcome["drafts"]
        clock[0] += costs.verifying([(1.0, rows)])
        asked.append(outcome["exit_seconds"] * [[0.0], [1.0]])
        outcome["exit_seconds"] = asked[-2] if len(asked) > 1 else 0.0 * asked[0]
        outcome["drafting_seconds"] = 0.0
        return bool(step(**outcome))

    adaptive._clock = lambda: clock[0]
    adaptive.step = timed


@pytest.mark.parametrize(
    ("row", "requests"),
    [
        pytest.param(1 / 64, 1, marks=pytest.mark.slow),
        (1 / 2, 1),
        pytest.param(4.0, 1, marks=pytest.mark.slow),
        (1 / 16, 3),
    ],
)
def test_drafts_by_costs_are_equal(
    calibrated: Path,
    teacher: Teacher,
    prompts: list[str],
    row: float,
    requests: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine's defaults, on a clock that runs equally in both."""
    costs = RowsCost(row)
    options = adadecode_options(str(calibrated))
    with start_engine(max_num_seqs=requests, **options) as llm:
        fix_costs(llm, costs)
        monkeypatch.setattr(draft_cycle, "EXIT_SECONDS_EVERY", 1)
        outputs = generate(llm, prompts)
        found = stats(llm)
        counters = simulated(
            teacher, calibrated, llm, prompts, outputs,
            requests=requests, costs=costs,
        )  # fmt: skip
        free = simulated(
            teacher, calibrated, llm, prompts, outputs,
            requests=requests, costs=RowsCost(0.0),
        )  # fmt: skip
    assert_same(found, counters, len(prompts))
    assert min(sum(found["accepted"]), found["ngram_accepted"]) > 0
    # Where rows are dear, fewer drafts pay.
    if row >= 0.5:
        assert counters.ngram_drafts < free.ngram_drafts
        assert sum(counters.early_predictions) < sum(free.early_predictions)
