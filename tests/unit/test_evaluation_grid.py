# SPDX-License-Identifier: Apache-2.0
"""Thresholds and caps, simulated: rated as the engine's defaults are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adadecode_vllm.engine.settings import threshold_policy
from adadecode_vllm.heads import init_heads
from adadecode_vllm.toolkit.evaluation.answers import KEPT_ANSWERS, known_answers
from adadecode_vllm.toolkit.evaluation.defaults import default_options
from adadecode_vllm.toolkit.evaluation.row_costs import RowCosts
from adadecode_vllm.toolkit.evaluation.run import (
    SimulationGrid,
    evaluate_heads,
    load_heads_for,
)
from adadecode_vllm.toolkit.evaluation.simulate import Setting, total
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.states.texts import load_texts
from tests.data_directory import write_answers

ANSWERS = KEPT_ANSWERS + 3
# At 0 every token is taken, nearly always wrongly: these heads are not trained.
THRESHOLDS, CAPS = (0.0, 0.02, 0.9), (1, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return write_answers(tmp_path_factory.mktemp("data") / "d", model, ANSWERS, 10)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    directory = tmp_path_factory.mktemp("heads") / "h"
    init_heads(str(model), directory, [1, 2])
    return directory


def evaluate(
    teacher: Teacher, heads: Path, data: Path, row_costs: str, requests: int = 1
) -> dict[str, Any]:
    grid = SimulationGrid(
        THRESHOLDS, CAPS, row_costs=RowCosts.parse(row_costs), requests=requests
    )
    return evaluate_heads(teacher, heads, [data], grid=grid)


@pytest.mark.parametrize("requests", [1, 3])
def test_rows_cost_what_they_cost_the_defaults(
    teacher: Teacher, heads: Path, data: Path, requests: int
) -> None:
    free, dear = (
        evaluate(teacher, heads, data, costs, requests) for costs in ("free", "1:1,2:3")
    )
    for report in (free, dear):
        for name in ("requests", "row_costs"):
            assert report["simulation"][name] == report["defaults"][name], name
    free, dear = free["simulation"], dear["simulation"]
    assert dear["tokens_per_forward"] == free["tokens_per_forward"]
    for with_rows, without in zip(dear["speedup"][0], free["speedup"][0], strict=True):
        assert with_rows < without
    # Nothing is drafted, and exits are asked about one token each.
    if requests == 1:
        assert dear["speedup"][2] == pytest.approx(free["speedup"][2])


def test_answers_that_are_played_in_parts_give_the_same_figures(
    teacher: Teacher, heads: Path, data: Path
) -> None:
    simulation = evaluate(teacher, heads, data, "1:1,6:1.6")["simulation"]
    assert simulation["answers"] == ANSWERS
    config, tensors = load_heads_for(teacher, heads)
    texts = load_texts([data], teacher, None)
    answers = known_answers(
        teacher, config.exit_layers, tensors.weights, texts, kept_answers=ANSWERS
    )
    options = default_options(config, "heads")
    for row, threshold in enumerate(THRESHOLDS):
        for column, cap in enumerate(CAPS):
            changed = {"threshold": threshold, "max_early_predictions": cap}
            policy = threshold_policy(options.model_copy(update=changed), config)
            setting = Setting((1, 2), config.num_hidden_layers, policy)
            counters = total(answers, setting)
            for name in ("tokens_per_forward", "acceptance", "coverage"):
                assert simulation[name][row][column] == getattr(counters, name), name
