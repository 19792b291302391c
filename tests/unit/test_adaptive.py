# SPDX-License-Identifier: Apache-2.0
"""When drafting stops and begins again, with made-up steps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

import numpy as np
import pytest

from adadecode_vllm.engine.adaptive import MANY, SETTLE_STEPS, WORTH, AdaptiveDrafting

REQUESTS = 4


class Steps:
    """An engine that takes its time.

    Attributes:
        ways: Whether each step drafted.
        seconds: Time of all steps.
        tokens: What they yielded.
    """

    def __init__(self, cost: Callable[[int, bool], tuple[int, float]]) -> None:
        self.seconds = 0.0
        self.adaptive = AdaptiveDrafting(64, lambda: self.seconds)
        self.ways: list[bool] = []
        self.tokens = 0
        self.drafts = 1
        self.drafting_seconds = 0.0
        self._cost = cost

    def run(
        self, steps: int, requests: int = REQUESTS, *, decodes: bool = True
    ) -> None:
        for _ in range(steps):
            drafted = self.adaptive.drafts(requests)
            tokens, seconds = self._cost(len(self.ways), drafted)
            self.seconds += seconds
            self.tokens += tokens
            self.ways.append(drafted)
            self.adaptive.step(
                requests=requests,
                drafted=drafted,
                drafts=self.drafts if drafted else 0,
                tokens=tokens,
                decodes=decodes,
                busy=True,
                drafting_seconds=self.drafting_seconds,
            )

    def share(self, last: int) -> float:
        """Of the last steps, those with drafts."""
        return sum(self.ways[-last:]) / last


def pays(step: int, drafted: bool) -> tuple[int, float]:
    return (6, 1.2) if drafted else (4, 1.0)


def costs(step: int, drafted: bool) -> tuple[int, float]:
    return (5, 1.6) if drafted else (4, 1.0)


def test_what_drafts_bring_is_known() -> None:
    steps = Steps(pays)
    steps.run(12)
    assert steps.adaptive.take_compared() is None  # no step without drafts yet
    steps.run(3000)
    compared = steps.adaptive.take_compared()
    assert compared is not None
    # Tokens per second 6 / 1.2 and 4 / 1, but for the looks at the other way.
    assert compared.plain_seconds / compared.seconds == pytest.approx(1.25, rel=0.02)
    assert compared.seconds == pytest.approx(steps.seconds, rel=0.03)
    assert steps.adaptive.take_compared() is None


def test_steps_without_drafts_are_plain() -> None:
    steps = Steps(costs)
    steps.run(3000)
    steps.adaptive.take_compared()
    steps.run(1000)
    compared = steps.adaptive.take_compared()
    assert compared is not None
    assert 0.98 < compared.plain_seconds / compared.seconds <= 1.0


def test_drafting_that_pays_goes_on() -> None:
    steps = Steps(pays)
    steps.run(3000)
    assert steps.share(2000) > 0.94
    # Looking at the other way may cost a hundredth.
    assert steps.tokens / steps.seconds > 0.985 * 6 / 1.2


def test_drafting_that_costs_stops() -> None:
    steps = Steps(costs)
    steps.run(60)
    assert not all(steps.ways)
    steps.run(3000)
    assert steps.share(2000) < 0.08
    # Against never drafting, the first look included.
    assert steps.tokens / steps.seconds > 0.98 * 4


@pytest.mark.parametrize("held_up", range(2, 14))
def test_a_stall_at_first_is_no_reason_to_stop(held_up: int) -> None:
    """Something else holds up a step for as long as a thousand others take."""

    def step(number: int, drafted: bool) -> tuple[int, float]:
        tokens, seconds = pays(number, drafted)
        return tokens, 1000.0 if number == held_up else seconds

    steps = Steps(step)
    steps.run(60)
    assert steps.share(20) == 1.0


@pytest.mark.parametrize("held_up", range(SETTLE_STEPS + 10))
def test_a_stall_at_first_says_nothing_of_what_a_draft_costs(held_up: int) -> None:
    random = Random(held_up)
    drafts = 0

    def step(number: int, drafted: bool) -> tuple[int, float]:
        seconds = 1000.0 if number == held_up else 1.0 + 0.02 * drafts
        return 4 if drafted else 2, seconds

    steps = Steps(step)
    for _ in range(30):
        steps.drafts = drafts = random.randint(0, 5)
        steps.run(1)
    assert steps.adaptive.admission(REQUESTS) < 0.4
    compared = steps.adaptive.take_compared()
    assert compared is None or compared.seconds < 100


def test_a_bad_beginning_is_soon_forgotten() -> None:
    """Drafts take three times as long as they bring for 30 steps, and pay then."""

    def step(number: int, drafted: bool) -> tuple[int, float]:
        return (4, 3.0) if drafted and number < 30 else pays(number, drafted)

    steps = Steps(step)
    steps.run(30 + 48 * 4 + 20)
    assert steps.share(4) == 1.0


def test_it_follows_the_text() -> None:
    steps = Steps(lambda step, drafted: (costs if step < 2000 else pays)(step, drafted))
    steps.run(2000)
    assert steps.share(500) < 0.08
    steps.run(4000)
    assert steps.share(500) > 0.9


@pytest.mark.parametrize(
    ("gain", "drafts"), [(1.0, False), (1.01, False), (1.05, True)]
)
def test_drafting_must_gain_more_than_nothing(gain: float, drafts: bool) -> None:
    steps = Steps(lambda step, drafted: (5, 1.25 / gain) if drafted else (4, 1.0))
    steps.run(3000)
    # Of 62 steps, a look at the other way takes 14.
    assert steps.share(2000) == pytest.approx(0.77 if drafts else 0.23, abs=0.03)


@pytest.mark.parametrize("loss", [1.0, 1.005])
def test_where_both_are_nearly_alike_the_way_seldom_changes(loss: float) -> None:
    """Drafting goes on where steps without are worth as much, or little more."""
    seconds = 1.25 / WORTH * loss
    steps = Steps(lambda step, drafted: (5, seconds) if drafted else (4, 1.0))
    steps.run(3000)
    # Of 64 steps, a look at the other way takes 14: it begins and it ends.
    assert 0.75 < steps.share(2000) < 0.8
    assert sum(a is not b for a, b in pairwise(steps.ways)) < 3000 / 64 * 2 + 2


def test_batch_sizes_are_apart() -> None:
    steps = Steps(costs)
    steps.run(100, requests=4)
    assert not steps.adaptive.drafts(4)
    assert not steps.adaptive.drafts(7)
    assert steps.adaptive.drafts(3)
    assert steps.adaptive.drafts(8)


def test_many_requests_draft_once_it_was_found_to_pay() -> None:
    steps = Steps(pays)
    # While prompts are computed nothing can be found.
    steps.run(100, MANY, decodes=False)
    assert not any(steps.ways)
    steps.run(100, MANY)
    assert steps.adaptive.drafts(MANY)
    assert not steps.adaptive.drafts(2 * MANY)
    assert steps.adaptive.drafts(MANY - 1)


def test_prompts_and_pauses_say_nothing() -> None:
    steps = Steps(costs)
    steps.run(1000, decodes=False)
    assert all(steps.ways)
    adaptive = AdaptiveDrafting(8, iter(range(0, 100_000, 10)).__next__)
    for _ in range(1000):
        adaptive.step(
            requests=1, drafted=True, drafts=1, tokens=1, decodes=True, busy=False
        )
    assert adaptive.drafts(1)


def test_steps_after_a_pause_settle_first() -> None:
    steps = Steps(pays)
    steps.run(100)
    assert steps.adaptive.take_compared() is not None
    steps.adaptive.pause()
    steps.seconds += 1000.0
    steps.run(SETTLE_STEPS)
    assert steps.adaptive.take_compared() is None
    steps.run(1)
    compared = steps.adaptive.take_compared()
    assert compared is not None
    assert compared.seconds == pytest.approx(1.2)


@pytest.mark.parametrize("cost", [0.0, 0.02, 0.12, 0.3])
def test_a_draft_must_promise_what_its_time_would_bring(cost: float) -> None:
    """With steps of one second, and one in twenty held up by something else."""
    random = Random(1)
    drafts = 0

    def step(number: int, drafted: bool) -> tuple[int, float]:
        seconds = 1.0 + cost * drafts + random.gauss(0, 0.05)
        held_up = number > 50 and random.random() < 0.05
        return 4 if drafted else 2, 10.0 if held_up else seconds

    steps = Steps(step)
    for _ in range(600):
        steps.drafts = drafts = random.randint(0, 5)
        steps.run(1)
    rate = steps.tokens / steps.seconds
    found = steps.adaptive.admission(REQUESTS)
    assert found == pytest.approx(max(0.02, cost * rate), abs=0.08, rel=0.25)
    assert steps.adaptive.admission(1) == 0.05


def test_the_time_of_making_drafts_is_not_what_verifying_them_costs() -> None:
    random, drafts = Random(1), 0

    def step(number: int, drafted: bool) -> tuple[int, float]:
        making = 0.3 * drafts if drafted else 0.0
        steps.drafting_seconds += making
        return 4 + (drafts if drafted else 0), 1.0 + making + 0.02 * drafts

    steps = Steps(step)
    for number in range(600):
        steps.drafts = drafts = random.randint(0, 5)
        steps.run(1)
        if number == 300:
            steps.drafting_seconds = 0.0  # counters are set to zero
    rate = steps.tokens / steps.seconds
    assert steps.adaptive.admission(REQUESTS) == pytest.approx(0.02 * rate, rel=0.5)
    assert 0.3 * rate > 1.0


@pytest.mark.parametrize("cost", [0.005, 0.01])
def test_fewer_requests_are_no_cheaper_drafts(cost: float) -> None:
    """While a batch empties, steps get shorter and more of them draft."""
    random = Random(1)
    requests = drafts = 0

    def step(number: int, drafted: bool) -> tuple[int, float]:
        seconds = 0.2 + 0.01 * requests + cost * drafts + random.gauss(0, 0.01)
        return requests + (drafts if drafted else 0) // 2, seconds

    steps = Steps(step)
    for number in range(600):
        requests = 63 - number * 31 // 600
        steps.drafts = drafts = random.randint(0, 12) + (63 - requests) // 4
        steps.run(1, requests)
    # A step of 48 requests takes 0.7 s without drafts, of which it has about ten.
    rate = (48 + 5) / (0.7 + 10 * cost)
    assert steps.adaptive.admission(48) == pytest.approx(cost * rate, abs=0.06)


def test_ways_are_compared_at_the_same_number_of_requests() -> None:
    """A look at the other way with fewer requests does not make that one slower."""
    requests = 0

    def step(number: int, drafted: bool) -> tuple[int, float]:
        # Drafts bring a tenth more tokens and take a fifth longer.
        seconds = 1.0 + 0.01 * requests
        return (
            (requests * 11, seconds * 12) if drafted else (requests * 10, seconds * 10)
        )

    steps = Steps(step)
    steps.drafts = 0
    for number in range(200):
        requests = 50 + number % 14 if number < 14 else 40
        steps.run(1, requests)
    assert steps.share(100) == 0.0


def test_a_draft_has_its_usual_cost_until_steps_have_told() -> None:
    steps = Steps(lambda number, drafted: (2, 1.0))
    steps.run(20)
    # All steps had as many drafts: nothing tells what one more costs.
    assert steps.adaptive.admission(REQUESTS) == pytest.approx(0.05 * 2)


def test_what_asking_exits_costs_is_known_by_the_number_of_requests() -> None:
    steps = Steps(lambda step, drafted: (6, 1.2) if drafted else (4, 1.0))
    steps.run(20)
    assert steps.adaptive.exit_costs(REQUESTS) == []
    asked = np.zeros((2, 2))
    for _ in range(3):
        asked += [[0.2, 0.0], [4, 0]]
        steps.adaptive.step(
            requests=REQUESTS,
            drafted=True,
            drafts=4,
            tokens=6,
            decodes=True,
            busy=True,
            exit_seconds=asked,
        )
    rate = steps.adaptive._sizes[REQUESTS.bit_length() - 1].rates[True]
    tokens = rate.at(REQUESTS, 0.0)
    first, second = steps.adaptive.exit_costs(REQUESTS)
    assert first == pytest.approx(0.05 * tokens)
    assert np.isnan(second)
    # Of other numbers of requests it says nothing.
    assert steps.adaptive.exit_costs(2 * REQUESTS) == []


@pytest.mark.parametrize(("gain", "steps"), [(3.0, 6), (1.05, 14)])
def test_a_look_at_what_is_clearly_slower_is_short(gain: float, steps: int) -> None:
    engine = Steps(lambda step, drafted: (12, 3 / gain) if drafted else (4, 1.0))
    engine.run(40)
    # Counted steps, and those of which nothing is learnt after the change.
    assert engine.ways.count(False) == steps
