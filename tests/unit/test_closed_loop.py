# SPDX-License-Identifier: Apache-2.0
"""Requests that a measurement keeps in the engine."""

from benchmarks.closed_loop import Concurrency


def limits(concurrency: Concurrency, ends: int) -> list[int]:
    found = []
    for _ in range(ends):
        found.append(concurrency.limit)
        concurrency.finished()
    return found


def test_one_number_stays() -> None:
    assert limits(Concurrency(3), 20) == [3] * 20


def test_two_numbers_take_turns() -> None:
    expected = [4] * 8 + [1] * 2 + [4] * 8 + [1] * 2
    assert limits(Concurrency(4, 1), 20) == expected
