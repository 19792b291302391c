# SPDX-License-Identifier: Apache-2.0
"""The simulation's counters on hand-made answers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from adadecode_vllm.toolkit.evaluation.cost import CostModel
from adadecode_vllm.toolkit.evaluation.simulate import Answer, Counters, Gate, total


def answer(
    tokens: Sequence[int], gates: dict[tuple[int, ...], list[Gate]], **values: int
) -> Answer:
    return Answer(
        tokens=tokens,
        gates=lambda prefix, _, exit_index: gates[prefix][exit_index],
        stops={9},
        max_tokens=values.get("max_tokens", 100),
    )


SURE, UNSURE = 5.0, -5.0


def test_all_right_up_to_the_cap() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 9]
    gates = {
        tuple(tokens[:n]): [(tokens[n], SURE), (0, UNSURE)] for n in range(len(tokens))
    }
    counters = total([answer(tokens, gates)], (2, 4), 8, [0.0, 0.0], 2)
    # 1 | 2 3 +4 | 5 6 +9
    assert counters.early_predictions == [4, 0]
    assert counters.accepted == [4, 0]
    assert counters.rejected == [0, 0]
    assert counters.gates == [4, 0]
    assert (counters.forwards, counters.generated_tokens) == (2, 6)
    # Two drafting runs of segment 0 a cycle; the forward starts at the newest token.
    assert counters.segments_run == [4 + 2, 2, 2]


def test_a_wrong_prediction_ends_the_accepted_run() -> None:
    tokens = [1, 2, 9]
    gates = {
        (1,): [(7, SURE), (0, UNSURE)],  # wrong
        (1, 7): [(8, UNSURE), (5, SURE)],  # off the answer, never judged
        (1, 7, 5): [(8, UNSURE), (8, UNSURE)],
        (1, 2): [(9, UNSURE), (9, SURE)],
    }
    counters = total([answer(tokens, gates)], (2, 4), 8, [0.0, 0.0], 5)
    assert counters.early_predictions == [1, 2]
    assert counters.accepted == [0, 1]
    assert counters.rejected == [1, 0]
    assert counters.generated_tokens == 2
    assert counters.forwards == 2
    # First cycle: 0, 0 and 1, 0 and 1; the front stands after the last exit, so the
    # forward runs only the last segment. Second: 0 and 1, then all of them.
    assert counters.segments_run == [3 + 1 + 1, 2 + 1 + 1, 2]


def test_no_prediction_beyond_the_limit_of_tokens() -> None:
    tokens = [1, 2, 3]
    gates = {tuple(tokens[:n]): [(tokens[n], SURE)] for n in range(3)}
    counters = total([answer(tokens, gates, max_tokens=3)], (2,), 8, [0.0], 5)
    assert counters.early_predictions == [1]
    assert counters.generated_tokens == 2


@pytest.mark.parametrize(
    ("head_share", "expected"),
    # Six tokens by six forwards cost six ordinary steps.
    [(0.0, 6.0), (0.3, 6.0)],
)
def test_plain_decoding_costs_its_steps(head_share: float, expected: float) -> None:
    counters = Counters((2, 4), 8)
    counters.segments_run = [6, 6, 6]
    counters.forwards = counters.generated_tokens = 6
    cost = CostModel(head_share, 0.0)
    assert cost.baseline_steps(counters) == pytest.approx(expected)
    assert cost.speedup(counters) == pytest.approx(1)


def test_the_papers_bound() -> None:
    """Exit 8 of 32, five right drafts a cycle, 7 % LM head: 2.38x (shared formula)."""
    counters = Counters((8,), 32)
    counters.segments_run = [5 + 1, 1]
    counters.gates = [5]
    counters.forwards, counters.generated_tokens = 1, 6
    assert CostModel(0.07, 0.0).speedup(counters) == pytest.approx(2.38, abs=0.01)


def test_the_last_exits_unsure_guess_ends_a_cycle() -> None:
    tokens = [1, 2, 3, 9]
    gates = {
        (1,): [(7, UNSURE), (2, -0.5)],  # right, and worth its verification
        (1, 2, 3): [(7, UNSURE), (9, -2.0)],  # not worth it
    }
    answers = [answer(tokens, gates)]
    counters = total(answers, (2, 4), 8, [0.0, 0.0], 5, guess_threshold=-1.0)
    assert counters.early_predictions == [0, 1]
    assert counters.accepted == [0, 1]
    assert (counters.forwards, counters.generated_tokens) == (2, 3)
    # The guess starts at the first layer; without one, the second cycle resumes.
    assert counters.segments_run == [1 + 1 + 1, 1 + 1 + 1, 2]
