# SPDX-License-Identifier: Apache-2.0
"""I2: which pending tokens a step may resume, and why not."""

from __future__ import annotations

import numpy as np
import pytest

from adadecode_vllm.method.ledger import REASONS, Ledger, Resumable, Window

WIDTH = 4
STEP = 7


def make_window(
    first: list[int], tokens: list[list[int]], levels: list[list[int]]
) -> Window:
    """A window; columns past the length hold what must never be looked at."""
    shape = (len(first), WIDTH)
    token_ids = np.full(shape, 99, np.int64)
    all_levels = np.full(shape, 9, np.int8)
    for row, (some, level) in enumerate(zip(tokens, levels, strict=True)):
        token_ids[row, : len(some)] = some
        all_levels[row, : len(some)] = level
    return Window(
        first_position=np.array(first, np.int64),
        length=np.array([len(some) for some in tokens], np.int64),
        token_ids=token_ids,
        levels=all_levels,
        exits=np.full(shape, -1, np.int8),
    )


def two_requests() -> Ledger:
    """`a` at positions 5 to 7, `b` at 2 and 3."""
    ledger = Ledger()
    window = make_window([5, 2], [[10, 11, 12], [20, 21]], [[2, 2, 0], [1, 1]])
    ledger.record(STEP, ["a", "b"], window)
    return ledger


def table(rows: dict[int, tuple[int, list[int]]], length: int = 12) -> np.ndarray:
    """Token ids by position: {row: (first position, tokens)}."""
    token_ids = np.zeros((max(rows) + 1, length), np.int64)
    for row, (first, tokens) in rows.items():
        token_ids[row, first : first + len(tokens)] = tokens
    return token_ids


AS_DRAFTED = table({0: (5, [10, 11, 12]), 1: (2, [20, 21])})


def test_only_requests_with_work_done_are_pending() -> None:
    """An early prediction from the embedding leaves nothing to resume."""
    ledger = Ledger()
    ledger.record(
        STEP, ["a", "b"], make_window([5, 2], [[10, 11], [20, 21]], [[0, 0], [1, 0]])
    )
    assert len(ledger) == 1
    assert ledger.request_ids == ["b"]
    found = take(ledger)
    assert found is not None
    assert found.requests.tolist() == found.slots.tolist() == [1]
    ledger.record(STEP, ["a"], make_window([5], [[10, 11]], [[0, 0]]))
    assert len(ledger) == 0
    assert take(ledger, {}) is None
    assert ledger.dropped == {}


def take(
    ledger: Ledger,
    rows: dict[str, int] | None = None,
    first: tuple[int, ...] = (5, 2),
    count: tuple[int, ...] = (3, 2),
    token_ids: np.ndarray = AS_DRAFTED,
    step: int = STEP + 1,
) -> Resumable | None:
    return ledger.take(
        step,
        {"a": 0, "b": 1} if rows is None else rows,
        np.array(first, np.int64),
        np.array(count, np.int64),
        token_ids,
    )


def test_everything_agrees() -> None:
    ledger = two_requests()
    assert len(ledger) == 2
    resumable = take(ledger)
    assert resumable is not None
    assert resumable.requests.tolist() == [0, 1]
    assert resumable.slots.tolist() == [0, 1]
    assert resumable.levels.tolist() == [[2, 2, 0, 0], [1, 1, 0, 0]]
    assert resumable.levels.dtype == np.int8
    assert not ledger.dropped


def test_an_entry_is_handed_out_once() -> None:
    ledger = two_requests()
    assert take(ledger) is not None
    assert len(ledger) == 0
    assert take(ledger) is None
    assert take(ledger, step=STEP + 2) is None
    assert not ledger.dropped


def test_empty() -> None:
    ledger = Ledger()
    assert len(ledger) == 0
    assert take(ledger) is None
    ledger.clear("weights_reloaded")
    assert not ledger.dropped


@pytest.mark.parametrize("step", [STEP, STEP + 2, STEP + 100, 0])
def test_only_the_next_step_may_resume(step: int) -> None:
    ledger = two_requests()
    assert take(ledger, step=step) is None
    assert ledger.dropped == {"skipped_step": 2}
    assert ledger.dropped_tokens == {"skipped_step": 4}
    assert len(ledger) == 0
    # Not even afterwards.
    assert take(ledger) is None


def test_a_new_cycle_replaces_the_old_one() -> None:
    ledger = two_requests()
    ledger.record(STEP + 1, ["c"], make_window([5], [[10, 11]], [[3, 1]]))
    assert len(ledger) == 1
    rows = {"a": 1, "b": 2, "c": 0}
    resumable = take(ledger, rows, (5, 5, 2), (2, 3, 2), step=STEP + 2)
    assert resumable is not None
    assert resumable.requests.tolist() == [0]
    assert resumable.levels.tolist() == [[3, 1, 0, 0]]


@pytest.mark.parametrize(
    ("rows", "left"), [({"b": 1}, [1]), ({"b": 1, "other": 0}, [1]), ({}, [])]
)
def test_not_scheduled(rows: dict[str, int], left: list[int]) -> None:
    ledger = two_requests()
    resumable = take(ledger, rows)
    assert ([] if resumable is None else resumable.slots.tolist()) == left
    assert ledger.dropped == {"not_scheduled": 2 - len(left)}
    assert ledger.dropped_tokens == {"not_scheduled": 2 * (2 - len(left))}


@pytest.mark.parametrize("first", [4, 6, 0])
def test_moved(first: int) -> None:
    ledger = two_requests()
    token_ids = table({0: (first, [10, 11, 12]), 1: (2, [20, 21])})
    resumable = take(ledger, first=(first, 2), token_ids=token_ids)
    assert resumable is not None
    assert resumable.slots.tolist() == [1]
    assert ledger.dropped == {"moved": 1}


def test_all_moved() -> None:
    ledger = two_requests()
    assert take(ledger, first=(0, 0)) is None
    assert ledger.dropped == {"moved": 2}


@pytest.mark.parametrize(
    ("tokens", "levels"),
    [
        ([10, 11, 13], [2, 2, 0]),
        ([10, 13, 12], [2, 0, 0]),  # a later token that agrees does not count
        ([10, -1, -1], [2, 0, 0]),  # a grammar's padding
    ],
)
def test_only_the_agreeing_prefix(tokens: list[int], levels: list[int]) -> None:
    ledger = two_requests()
    token_ids = table({0: (5, tokens), 1: (2, [20, 21])})
    resumable = take(ledger, token_ids=token_ids)
    assert resumable is not None
    assert resumable.slots.tolist() == [0, 1]
    assert resumable.levels[0].tolist() == [*levels, 0]
    assert resumable.levels[1].tolist() == [1, 1, 0, 0]
    assert ledger.dropped == {"changed": 1}


def test_nothing_agrees() -> None:
    ledger = two_requests()
    resumable = take(ledger, token_ids=table({0: (5, [0]), 1: (2, [20, 21])}))
    assert resumable is not None
    assert resumable.slots.tolist() == [1]
    assert take(two_requests(), token_ids=np.zeros_like(AS_DRAFTED)) is None
    assert ledger.dropped == {"changed": 1}


@pytest.mark.parametrize(("count", "lost"), [(1, 1), (2, 0)])
def test_truncated_drafts(count: int, lost: int) -> None:
    """What is not scheduled is not resumed, even where old ids are in the table.

    The third token had done no work, so none is lost with it.
    """
    ledger = two_requests()
    resumable = take(ledger, count=(count, 2))
    assert resumable is not None
    assert resumable.levels[0].tolist() == [2] * count + [0] * (4 - count)
    assert ledger.dropped == ({"truncated": 1} if lost else {})
    assert ledger.dropped_tokens["truncated"] == lost


def test_more_scheduled_than_drafted() -> None:
    """Columns past the length are undefined, whatever they and the table hold."""
    ledger = two_requests()
    token_ids = table({0: (5, [10, 11, 12, 99]), 1: (2, [20, 21, 99, 99])})
    resumable = take(ledger, count=(4, 4), token_ids=token_ids)
    assert resumable is not None
    assert resumable.levels.tolist() == [[2, 2, 0, 0], [1, 1, 0, 0]]
    assert not ledger.dropped


def test_rows_may_move() -> None:
    ledger = two_requests()
    token_ids = table({3: (5, [10, 11, 12]), 0: (2, [20, 21])})
    resumable = take(
        ledger, {"b": 0, "new": 1, "a": 3}, (2, 0, 0, 5), (2, 6, 1, 3), token_ids
    )
    assert resumable is not None
    assert resumable.requests.tolist() == [3, 0]
    assert resumable.slots.tolist() == [0, 1]  # the rows of the drafting cycle
    assert resumable.levels.tolist() == [[2, 2, 0, 0], [1, 1, 0, 0]]


def test_slots_survive_a_dropped_neighbour() -> None:
    ledger = two_requests()
    resumable = take(ledger, {"b": 0}, (2,), (2,), table({0: (2, [20, 21])}))
    assert resumable is not None
    assert resumable.requests.tolist() == [0]
    assert resumable.slots.tolist() == [1]
    assert resumable.levels.tolist() == [[1, 1, 0, 0]]


def test_window_at_the_end_of_the_table() -> None:
    """Fixed-width windows reach past the table; their tokens do not."""
    ledger = Ledger()
    ledger.record(STEP, ["a"], make_window([6], [[10, 11]], [[2, 1]]))
    resumable = take(ledger, {"a": 0}, (6,), (2,), table({0: (6, [10, 11])}, length=8))
    assert resumable is not None
    assert resumable.levels.tolist() == [[2, 1, 0, 0]]
    assert not ledger.dropped


def test_tokens_that_did_not_run_are_not_resumed() -> None:
    ledger = Ledger()
    ledger.record(STEP, ["a"], make_window([5], [[10, 11]], [[0, 0]]))
    assert take(ledger, {"a": 0}, (5,), (2,)) is None


def test_clear_counts_requests() -> None:
    ledger = two_requests()
    ledger.clear("weights_reloaded")
    assert ledger.dropped == {"weights_reloaded": 2}
    assert len(ledger) == 0
    assert take(ledger) is None
    assert ledger.dropped == {"weights_reloaded": 2}
    assert ledger.dropped_tokens == {"weights_reloaded": 4}
    ledger.reset_counts()
    assert not ledger.dropped
    assert not ledger.dropped_tokens


def test_several_reasons_in_one_step() -> None:
    ledger = Ledger()
    tokens = [[1, 2], [3, 4], [5, 6], [7, 8]]
    window = make_window([1, 1, 1, 1], tokens, [[1, 1]] * 4)
    ledger.record(STEP, ["gone", "moved", "changed", "fine"], window)
    token_ids = table({0: (2, [3, 4]), 1: (1, [5, 0]), 2: (1, [7, 8])})
    rows = {"moved": 0, "changed": 1, "fine": 2}
    resumable = take(ledger, rows, (2, 1, 1), (2, 2, 2), token_ids)
    assert resumable is not None
    assert resumable.requests.tolist() == [1, 2]
    assert resumable.slots.tolist() == [2, 3]
    assert resumable.levels.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert ledger.dropped == {"not_scheduled": 1, "moved": 1, "changed": 1}
    # Of the changed request the first token agrees and goes on.
    assert ledger.dropped_tokens == {"not_scheduled": 2, "moved": 2, "changed": 1}
    assert set(ledger.dropped) < set(REASONS)
