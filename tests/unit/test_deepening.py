# SPDX-License-Identifier: Apache-2.0
"""Whether an unsure token runs on to the next exit, where costs decide."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adadecode_vllm.method.deepening import Deepening
from tests.made_up_exits import make_drafter, make_requests


def pays(
    deepening: Deepening,
    promise: float,
    *,
    looked_up: float = 0.0,
    survival: float = 1.0,
    least: float = 0.1,
    room: int = 8,
    exit_index: int = 0,
    deeper_cost: float = math.nan,
    asking: float = 0.0,
) -> bool:
    (answer,) = deepening.pays(
        exit_index,
        np.array([promise]),
        np.array([max(promise, looked_up)]),
        np.array([survival]),
        np.array([least]),
        np.array([room]),
        deeper_cost,
        asking,
    )
    return bool(answer)


def on_easy_text() -> Deepening:
    """After drafts that were nearly sure, so that much may follow a right one."""
    deepening = Deepening([2, 4, 8])
    for _ in range(100):
        deepening.drafted(np.array([0.95, 0.95]))
    return deepening


@pytest.mark.parametrize(
    ("promise", "changes", "answer"),
    [
        (0.5, {}, True),
        # A token that is all but sure cannot win what the layers cost.
        (0.99, {}, False),
        (0.5, {"least": 0.6}, False),
        # Nor one that others before it are likely to spoil.
        (0.5, {"survival": 0.15}, False),
        # Nothing may follow it.
        (0.5, {"least": 0.3, "room": 1}, False),
        (0.5, {"least": 0.3}, True),
        # Where nothing pays now, something deeper still may.
        (0.05, {}, True),
        (0.05, {"least": 0.6}, False),
        # Thresholds decide.
        (0.5, {"least": math.nan}, False),
    ],
)
def test_what_follows_and_what_it_costs_decide(
    promise: float, changes: dict[str, float], answer: bool
) -> None:
    assert pays(on_easy_text(), promise, **changes) is answer  # type: ignore[arg-type]


def test_a_lookup_is_weighed_against_what_the_next_exit_says_of_its_own() -> None:
    # The exit would be right half of the time, and the next one hardly more often than
    # the lookup.
    assert pays(on_easy_text(), 0.5, looked_up=0.6)
    assert not pays(on_easy_text(), 0.5, looked_up=0.74)
    # What is known of tokens of which exits promised as much says nothing here.
    deepening = on_easy_text()
    for _ in range(100):
        deepening.ran_on(0, np.array([0.74]), np.array([0.99]))
    assert pays(deepening, 0.74)
    assert not pays(deepening, 0.5, looked_up=0.74)


def test_a_try_is_due_by_what_the_exit_promises() -> None:
    deepening = on_easy_text()
    for _ in range(100):
        deepening.ran_on(0, np.array([0.2]), np.array([0.2]))
    for _ in range(16):
        assert not pays(deepening, 0.2, looked_up=0.9)
        deepening.stayed(0, np.array([0.2]))
    assert pays(deepening, 0.2, looked_up=0.9)


def test_it_matters_less_where_little_follows() -> None:
    hard = Deepening([2, 4, 8])
    for _ in range(100):
        hard.drafted(np.array([0.2, 0.2]))
    assert pays(on_easy_text(), 0.7, least=0.2)
    assert not pays(hard, 0.7, least=0.2)


def test_many_layers_to_the_next_exit_cost_more() -> None:
    near, far = Deepening([2, 4]), Deepening([2, 24])
    assert pays(near, 0.4)
    assert not pays(far, 0.4)


def test_what_asking_costs_is_measured() -> None:
    # By layers alone it would cost what a draft has to promise.
    usual = pays(on_easy_text(), 0.5, least=0.3)
    assert usual is pays(on_easy_text(), 0.5, least=0.3, deeper_cost=0.3) is True
    assert not pays(on_easy_text(), 0.5, least=0.3, deeper_cost=3.0)
    assert not pays(Deepening([0, 12]), 0.4)
    assert pays(Deepening([0, 12]), 0.4, deeper_cost=0.1)
    # Of requests with thresholds it says nothing.
    assert not pays(on_easy_text(), 0.5, least=math.nan, deeper_cost=0.01)


def test_drafts_that_follow_take_an_exits_time_each() -> None:
    assert pays(on_easy_text(), 0.5, least=0.05, deeper_cost=0.4, asking=0.1)
    assert not pays(on_easy_text(), 0.5, least=0.05, deeper_cost=0.4, asking=0.7)


def test_what_the_next_exit_says_is_learnt_by_promise() -> None:
    deepening = on_easy_text()
    for _ in range(30):
        deepening.ran_on(0, np.array([0.5]), np.array([0.5]))
    assert not pays(deepening, 0.5)
    # Of other promises and of other exits this says nothing.
    assert pays(deepening, 0.3)
    assert pays(deepening, 0.5, exit_index=1)
    for _ in range(100):
        deepening.ran_on(0, np.array([0.5]), np.array([0.95]))
    assert pays(deepening, 0.5)


@pytest.mark.parametrize(("least", "tokens"), [(0.1, 16), (0.9, 90)])
def test_what_was_not_tried_for_long_is_tried_again(least: float, tokens: int) -> None:
    deepening = on_easy_text()
    promise = np.array([0.5])
    for _ in range(100):
        deepening.ran_on(0, promise, promise)
    for _ in range(2):
        for _ in range(tokens):
            assert not pays(deepening, 0.5, least=least)
            deepening.stayed(0, promise)
        assert pays(deepening, 0.5, least=least)
        assert not pays(deepening, 0.3, least=0.9)  # of a range that nothing was in
        deepening.ran_on(0, promise, promise)


@pytest.mark.parametrize("deeper_cost", [math.nan, 0.1])
def test_a_request_with_a_threshold_takes_nobodys_try(deeper_cost: float) -> None:
    deepening = on_easy_text()
    for _ in range(100):
        deepening.ran_on(0, np.full(1, 0.5), np.full(1, 0.5))
    deepening.stayed(0, np.full(64, 0.5))
    both, ones = np.full(2, 0.5), np.ones(2)
    answers = deepening.pays(
        0, both, both, ones, np.array([math.nan, 0.1]), np.full(2, 8), deeper_cost
    )
    assert answers.tolist() == [False, True]


def test_one_of_many_requests_is_enough_for_a_try() -> None:
    deepening = on_easy_text()
    promise = np.full(64, 0.5)
    for _ in range(100):
        deepening.ran_on(0, promise, promise)
    deepening.stayed(0, promise)
    answers = deepening.pays(
        0, promise, promise, np.ones(64), np.full(64, 0.1), np.full(64, 8, np.int64)
    )
    assert np.count_nonzero(answers) == 1


def test_a_single_exit_has_nothing_to_decide() -> None:
    deepening = Deepening([0])
    deepening.drafted(np.array([0.5]))
    deepening.drafted(np.zeros(0))


def test_a_probability_that_is_none_leaves_what_is_learnt() -> None:
    """Of embeddings with NaN, which a request may bring."""
    said = np.array([0.5, math.nan])
    drafter = make_drafter([1, 2], 3, lambda rows: said[rows])
    requests = make_requests(2, 3, least=0.1)
    for _ in range(50):
        window = drafter.draft(requests)
        assert window.length[0] > 1
        assert window.length[1] == 1
    assert np.isfinite(drafter.decisions._deepening._gained).all()


def test_what_asking_took_never_gets_less_at_any_exit() -> None:
    """Else it would be taken for counters that were set to zero."""
    unsure = iter([False, True, True, True] * 100)
    drafter = make_drafter(
        [2, 4], 3, lambda rows: [0.3 if next(unsure, True) else 0.9] * len(rows)
    )
    requests = make_requests(1, 3, least=0.1)
    before = drafter.stats.exit_seconds()
    for _ in range(100):
        drafter.draft(requests)
        after = drafter.stats.exit_seconds()
        assert (after >= before).all()
        before = after
    assert (before > 0).all()
    assert before[0].sum() <= drafter.stats.drafting_seconds
