# SPDX-License-Identifier: Apache-2.0
"""The simulation's counters on hand-made answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from adadecode_vllm.engine.ngram import NgramLookup
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.method.policy import ThresholdPolicy
from adadecode_vllm.toolkit.evaluation import row_costs
from adadecode_vllm.toolkit.evaluation.cost import CostModel
from adadecode_vllm.toolkit.evaluation.counters import Counters
from adadecode_vllm.toolkit.evaluation.known_exits import Answer, Scored
from adadecode_vllm.toolkit.evaluation.row_costs import RowCosts, measure_row_costs
from adadecode_vllm.toolkit.evaluation.simulate import Setting, total
from adadecode_vllm.toolkit.states.teacher import Teacher
from tests.tiny import save_tiny_llama


def answer(
    tokens: Sequence[int],
    gates: dict[tuple[int, ...], list[Scored]],
    prompt: Sequence[int] = (),
    **values: int,
) -> Answer:
    return Answer(
        tokens=tokens,
        scores=lambda prefix, _, exit_index: gates[prefix][exit_index],
        stops={9},
        max_tokens=values.get("max_tokens", 100),
        prompt=prompt,
    )


SURE, UNSURE = 0.9, 0.1


def setting(exit_layers: tuple[int, ...], cap: int = 5, guess: float = 1.0) -> Setting:
    return Setting(
        exit_layers, 8, ThresholdPolicy([0.5] * len(exit_layers), cap, guess)
    )


def test_all_right_up_to_the_cap() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 9]
    gates = {
        tuple(tokens[:n]): [(tokens[n], SURE), (0, UNSURE)] for n in range(len(tokens))
    }
    counters = total([answer(tokens, gates)], setting((2, 4), 2))
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
    counters = total([answer(tokens, gates)], setting((2, 4)))
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
    counters = total([answer(tokens, gates, max_tokens=3)], setting((2,)))
    assert counters.early_predictions == [1]
    assert counters.generated_tokens == 2


@pytest.mark.parametrize(
    ("head_share", "expected"),
    # Six tokens by six forwards cost six plain steps.
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
        (1,): [(7, UNSURE), (2, 0.4)],  # right, and worth its verification
        (1, 2, 3): [(7, UNSURE), (9, 0.2)],  # not worth it
    }
    answers = [answer(tokens, gates)]
    counters = total(answers, setting((2, 4), guess=0.3))
    assert counters.early_predictions == [0, 1]
    assert counters.accepted == [0, 1]
    assert (counters.forwards, counters.generated_tokens) == (2, 3)
    # The guess starts at the first layer; without one, the second cycle resumes.
    assert counters.segments_run == [1 + 1 + 1, 1 + 1 + 1, 2]


# n-gram lookup


@pytest.fixture(scope="module")
def lookup() -> NgramLookup:
    return NgramLookup(100, vocab_size=100)


def test_what_is_found_first_needs_no_exit(lookup: NgramLookup) -> None:
    prompt, tokens = [5, 6, 7, 8, 2], [5, 6, 7, 3, 9]
    gates: dict[tuple[int, ...], list[Scored]] = {
        (5,): [(6, SURE)],  # nothing is found behind 2, 5
        (5, 6, 7, 3): [(9, UNSURE)],
    }
    looking = replace(setting((2,), cap=1), ngram="first", lookup=lookup)
    counters = total([answer(tokens, gates, prompt)], looking)
    # 5 | 6 by the exit, + 7 | behind 6, 7 comes 8, which is wrong, + 3 | 9.
    assert (counters.ngram_drafts, counters.ngram_rejected) == (1, 1)
    assert counters.early_predictions == [1]
    assert counters.gates == [2]
    assert (counters.forwards, counters.generated_tokens) == (3, 4)


def test_a_tail_follows_the_exits(lookup: NgramLookup) -> None:
    prompt, tokens = [5, 6, 7, 8, 2], [5, 6, 7, 8, 9]
    gates: dict[tuple[int, ...], list[Scored]] = {
        (5,): [(6, SURE)],
        (5, 6): [(0, UNSURE)],
    }
    looking = replace(setting((2,), cap=3), ngram="tail", lookup=lookup)
    counters = total([answer(tokens, gates, prompt)], looking)
    # 5 | 6 by the exit, 7 and 8 behind it, + 9
    assert (counters.ngram_drafts, counters.ngram_accepted) == (2, 2)
    assert counters.accepted == [1]
    assert (counters.forwards, counters.generated_tokens) == (1, 4)
    # The front token ran segment 0 while drafting, the drafts by lookup did not.
    assert counters.segments_run == [2 + 1, 1]


def test_a_chain_takes_what_is_found_where_the_exits_are_not_sure(
    lookup: NgramLookup,
) -> None:
    prompt, tokens = [5, 6, 7, 8, 1, 2], [5, 6, 4, 8, 1, 2, 9]
    gates: dict[tuple[int, ...], list[Scored]] = {
        (5,): [(6, SURE)],  # nothing is found behind 2, 5
        (5, 6): [(4, SURE)],  # found: 7
        (5, 6, 4): [(8, SURE)],
        (5, 6, 4, 8): [(1, SURE)],  # nothing is found behind 4, 8
        (5, 6, 4, 8, 1): [(0, UNSURE)],  # found: 2
    }
    looking = replace(setting((2,), cap=5), ngram="chain", lookup=lookup)
    counters = total([answer(tokens, gates, prompt)], looking)
    assert (counters.ngram_drafts, counters.ngram_accepted) == (1, 1)
    assert counters.accepted == [4]
    assert (counters.forwards, counters.generated_tokens) == (1, 6)


def test_a_chain_takes_the_more_probable_of_both(lookup: NgramLookup) -> None:
    # The exit is trusted above what one matching token is worth, below three.
    gates: dict[tuple[int, ...], list[Scored]] = {(5,): [(3, 0.4)], (3, 0.4): []}
    for prompt, right, gated in (
        ([1, 5, 8, 9, 2], 3, 1),
        ([1, 2, 5, 8, 9, 1, 2], 8, 1),
        ([*range(10, 20), 5, 8, 9, *range(10, 20)], 8, 0),
    ):
        looking = replace(
            setting((2,), cap=1), ngram="chain", lookup=lookup, by_costs=True
        )
        counters = total([answer([5, right, 0], gates, prompt)], looking, FREE_ROWS)
        by_exit = right == 3
        assert counters.accepted == [int(by_exit)]
        assert counters.ngram_accepted == int(not by_exit)
        assert counters.gates == [gated]


# Costs


ANSWER = [*range(10, 60), 9]
RIGHT: dict[tuple[int, ...], list[Scored]] = {
    tuple(ANSWER[:n]): [(ANSWER[n], 0.6), (ANSWER[n], 0.9)] for n in range(len(ANSWER))
}
FREE_ROWS = CostModel(0.3, 0.01, 0.02)


@pytest.mark.parametrize("exit_layers", [(0, 4), (2, 4)])
def test_the_clock_agrees_with_the_formula(exit_layers: tuple[int, ...]) -> None:
    playing = replace(setting(exit_layers), requests=1)
    counters = total([answer(ANSWER, RIGHT)] * 2, playing, FREE_ROWS)
    assert counters.time == pytest.approx(FREE_ROWS.baseline_steps(counters))
    assert counters.time > counters.forwards
    # Together they share the weights.
    batch = total([answer(ANSWER, RIGHT)] * 2, setting(exit_layers), FREE_ROWS)
    assert batch.time == pytest.approx(counters.time / 2)
    assert timeless(batch) == timeless(counters)


@pytest.mark.parametrize("exit_layers", [(0, 4), (2, 4)])
def test_requests_together_can_be_timed_as_if_alone(
    exit_layers: tuple[int, ...],
) -> None:
    cost = replace(FREE_ROWS, row_costs=RowCosts((1, 3), (1.0, 2.0)))
    answers = [answer(ANSWER[:length], RIGHT) for length in (51, 20, 33)]
    playing = setting(exit_layers)
    one_by_one = total(answers, replace(playing, requests=1), cost)
    alone = replace(playing, timed_alone=True)
    together = total(answers, alone, cost)
    assert together.time == pytest.approx(one_by_one.time)
    assert timeless(together) == timeless(one_by_one)
    assert total(answers, playing, cost).time < one_by_one.time
    parts = total(answers[:1], alone, cost)
    parts.add(total(answers[1:], alone, cost))
    assert parts.time == pytest.approx(together.time)
    assert timeless(parts) == timeless(together)


def timeless(counters: Counters) -> dict[str, object]:
    return {**vars(counters), "time": 0}


def test_rows_cost_what_they_are_said_to() -> None:
    cost = replace(FREE_ROWS, row_costs=RowCosts((1, 3), (1.0, 2.0)))
    assert [cost.row_costs(rows) for rows in (1, 2, 3, 5)] == [1, 1.5, 2, 3]
    # One of 8 layers for two tokens, and the exit about one of them.
    expected = 0.7 * 0.125 * 1.5 + 0.3 + 0.01 + 0.02
    assert cost.drafting(0.125, 2, 1) == pytest.approx(expected)
    assert cost.drafting(0.0, 1, 1) == pytest.approx(0.33)
    verified = cost.verifying([(0.25, 0), (0.25, 1), (0.5, 3)])
    assert verified == pytest.approx(0.7 * (0.25 + 0.5 * 2) + 0.3 * 2)


def test_drafts_end_where_they_do_not_pay() -> None:
    playing = replace(setting((0,)), by_costs=True, requests=1)
    drafts = []
    for second in (1.0, 1.5, 4.0):
        rows = RowCosts((1, 2), (1.0, second))
        cost = replace(FREE_ROWS, row_costs=rows, gate_head_share=0.0)
        counters = total([answer(ANSWER, RIGHT)] * 4, playing, cost)
        assert counters == total([answer(ANSWER, RIGHT)] * 4, playing, cost)
        assert counters.generated_tokens == 4 * (len(ANSWER) - 1)
        drafts.append(sum(counters.early_predictions))
    assert drafts[0] > drafts[1] > drafts[2]
    assert drafts[0] > 3 * counters.generated_tokens / 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "much",
        "1:1,2",
        "2:1",
        "1:2",
        "1:1,1:1",
        "1:1,4:0.5",
        "1:1,4:nan",
        "1:1,4:inf",
    ],
)
def test_row_costs_that_are_none(text: str) -> None:
    with pytest.raises(AdaDecodeError, match=f"^--row-costs {text}: expected measured"):
        RowCosts.parse(text)


def test_row_costs_are_read_as_written() -> None:
    assert RowCosts.parse("free") == RowCosts()
    costs = RowCosts.parse("1:1,6:1.6")
    assert costs == RowCosts((1, 6), (1.0, 1.6))
    assert costs.to_dict() == {"1": 1.0, "6": 1.6}


def test_rows_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_llama(tmp_path)
    monkeypatch.setattr(row_costs, "_SECONDS", 0.05)
    costs = measure_row_costs(Teacher.load(str(tmp_path)), 6)
    assert costs.rows == (1, 2, 4, 6)
    assert costs.costs[0] == 1
    assert list(costs.costs) == sorted(costs.costs)
