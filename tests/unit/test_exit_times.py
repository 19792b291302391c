# SPDX-License-Identifier: Apache-2.0
"""What asking an exit costs, told from the worker's counters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adadecode_vllm.engine.exit_times import ExitClock, ExitTimes


def test_what_was_added_since_the_last_counters() -> None:
    clock = ExitClock()
    counters = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert clock.step(1, None) is None
    assert clock.step(1, counters) is None  # nothing to compare it with
    # The worker's own array, which goes on counting.
    counters += [[0.5, 0.0], [2.0, 0.0]]
    assert clock.step(1, None) is None
    added = clock.step(1, counters)
    assert added is not None
    assert added.tolist() == [[0.5, 0.0], [2.0, 0.0]]
    assert clock.step(1, np.zeros((2, 2))) is None  # set to zero in between
    added = clock.step(1, counters)
    assert added is not None
    assert added.tolist() == counters.tolist()


def test_steps_of_another_kind_in_between_say_nothing_of_this_one() -> None:
    clock = ExitClock()
    counters = np.array([[1.0], [3.0]])
    clock.step(1, counters)
    clock.step(2, None)
    clock.step(1, None)
    assert clock.step(1, counters + 1) is None
    assert clock.step(1, counters + 2) is not None
    assert clock.step(2, counters + 3) is None


def test_seconds_become_the_tokens_of_the_time() -> None:
    times = ExitTimes()
    assert times.in_tokens(10.0) == []
    times.add(np.array([0.06, 0.0]), np.array([3, 0]))
    first, second = times.in_tokens(10.0)
    assert first == pytest.approx(0.2)
    assert math.isnan(second)  # never asked
    assert all(map(math.isnan, times.in_tokens(0.0)))  # no speed is known
    times.add(np.array([0.0, 0.5]), np.array([0, 1]))
    assert times.in_tokens(10.0) == pytest.approx([0.2, 5.0])


def test_a_step_that_was_held_up_says_nothing_and_old_ones_are_forgotten() -> None:
    times = ExitTimes()
    for seconds in (0.1, 30.0, 0.1):
        times.add(np.array([seconds]), np.array([1]))
    assert times.in_tokens(1.0) == pytest.approx([0.1])
    for _ in range(31):
        times.add(np.array([0.2]), np.array([1]))
    assert times.in_tokens(1.0) == pytest.approx([0.2])
