# SPDX-License-Identifier: Apache-2.0
"""What the scheduler leaves for drafts and reads of outcomes, with made-up requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from adadecode_vllm.engine.counter_report import CounterReport
from adadecode_vllm.engine.outcomes import BY_COSTS, UNUSED_DRAFTS
from adadecode_vllm.engine.scheduler import AdaDecodeScheduler

BUDGET = 256
RUNNING = 6


def request(tokens: int, computed: int = 0, *, paused: bool = False) -> Any:
    return SimpleNamespace(
        num_tokens=tokens,
        num_computed_tokens=computed,
        num_output_placeholders=0,
        is_prefill_chunk=False,
        status=RequestStatus.WAITING_FOR_STREAMING_REQ
        if paused
        else RequestStatus.WAITING,
    )


def make_scheduler(**parts: Any) -> Any:
    """With what a step's outcome, or a step's budget, asks for."""
    scheduler: Any = AdaDecodeScheduler.__new__(AdaDecodeScheduler)
    scheduler.running = []
    scheduler._report = CounterReport()
    scheduler._adaptive = None
    scheduler._by_costs = True
    vars(scheduler).update(parts)
    return scheduler


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int] | None]:
    """What vLLM keeps out of its acceptance metrics, step by step."""
    seen: list[dict[str, int] | None] = []

    def update_from_output(self: Any, scheduled: SchedulerOutput, outcome: Any) -> None:
        seen.append(scheduled.num_invalid_spec_tokens)

    monkeypatch.setattr(Scheduler, "update_from_output", update_from_output)
    return seen


def outcome(**said: Any) -> ModelRunnerOutput:
    made = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    vars(made).update(said)
    return made


@pytest.mark.parametrize("whole", [False, True], ids=["chunks", "whole"])
@pytest.mark.parametrize(
    ("waiting", "holding", "half", "room"),
    [
        ([], [], False, None),
        ([request(100)], [], True, None),
        ([request(240)], [], True, BUDGET - RUNNING - 240),
        # Not even plain decoding leaves it enough.
        ([request(255)], [], True, None),
        ([], [request(90, 89, paused=True)], False, None),
        ([], [request(90, 89, paused=True), request(120, 89)], True, None),
        ([], [request(300, 60)], True, BUDGET - RUNNING - 240),
        ([request(240)], [request(120, 89)], True, None),
    ],
)
def test_drafts_leave_room_for_who_is_admitted_next(
    waiting: list[Any], holding: list[Any], half: bool, room: int | None, whole: bool
) -> None:
    paused = sum(
        own.status == RequestStatus.WAITING_FOR_STREAMING_REQ for own in holding
    )
    scheduler = make_scheduler(
        running=[request(40, 39)] * RUNNING,
        waiting=FCFSRequestQueue(waiting),
        kv_holding_waiting=FCFSRequestQueue(holding),
        num_waiting_for_streaming_input=paused,
        max_num_scheduled_tokens=BUDGET,
        max_num_active_reqs=RUNNING + 2,
        scheduler_config=SimpleNamespace(enable_chunked_prefill=not whole),
    )
    spare = BUDGET - RUNNING
    if half:
        spare //= 2
        if whole and room is not None:
            spare = room
    assert scheduler._spare_tokens() == spare
    # Nobody is admitted to a full batch, of which sessions are a part.
    scheduler.max_num_active_reqs = RUNNING + paused
    assert scheduler._spare_tokens() == BUDGET - RUNNING


def with_free_blocks(free: int, **parts: Any) -> Any:
    """Of 16 tokens, with one request that runs."""
    pool = SimpleNamespace(get_num_free_blocks=lambda: free)
    return make_scheduler(
        running=[request(40, 39)],
        max_num_scheduled_tokens=BUDGET,
        max_num_active_reqs=8,
        _smallest_block=16,
        _groups=1,
        kv_cache_manager=SimpleNamespace(block_pool=pool),
        **parts,
    )


def test_the_blocks_for_a_sessions_next_turn_are_counted() -> None:
    """Eight blocks: enough for it, and not for drafts of all as well."""
    scheduler = with_free_blocks(
        8,
        waiting=FCFSRequestQueue(),
        kv_holding_waiting=FCFSRequestQueue([request(140, 60, paused=True)]),
        num_waiting_for_streaming_input=1,
    )
    assert scheduler._has_blocks_for(16)
    scheduler.kv_holding_waiting = FCFSRequestQueue([request(140, 60)])
    scheduler.num_waiting_for_streaming_input = 0
    assert scheduler._has_blocks_for(0)
    assert not scheduler._has_blocks_for(16)


def test_the_blocks_for_all_of_a_long_prompt_are_counted() -> None:
    """vLLM admits it where they are free, though a step computes a part of it."""
    parts = {
        "waiting": FCFSRequestQueue([request(1000)]),
        "kv_holding_waiting": FCFSRequestQueue([]),
        "num_waiting_for_streaming_input": 0,
    }
    # Of 1,000 tokens; of the running one's token, and one for each.
    scheduler = with_free_blocks(62 + 3, **parts)
    assert scheduler._has_blocks_for(0)
    assert not scheduler._has_blocks_for(16)
    assert with_free_blocks((1000 + BUDGET) // 16, **parts)._has_blocks_for(16)


def test_drafts_that_were_not_verified_are_not_counted(
    counted: list[dict[str, int] | None],
) -> None:
    """A grammar forbade some, and the worker dropped some or all."""
    scheduled = SchedulerOutput.make_empty()
    scheduled.num_invalid_spec_tokens = {"a": 2, "b": 3}
    unused = {UNUSED_DRAFTS: {"a": 4, "b": 1, "c": 2}}
    make_scheduler().update_from_output(scheduled, outcome(**unused))
    assert counted == [{"a": 4, "b": 3, "c": 2}]


def test_no_step_is_without_drafts_while_thresholds_decide(
    counted: list[dict[str, int] | None],
) -> None:
    """Costs had ended drafting; they go on from there when they decide again."""
    told: list[str] = []

    def step(**_: Any) -> bool:
        told.append("step")
        return len(told) == 1

    adaptive = SimpleNamespace(
        step=step, pause=lambda: told.append("pause"), drafts=lambda requests: False
    )
    scheduler = make_scheduler(_adaptive=adaptive, _most_by_requests=[5, 5, 5, 0])
    found = []
    for said in ({BY_COSTS: True}, {BY_COSTS: False}, {}, {BY_COSTS: True}, {}):
        scheduler.update_from_output(SchedulerOutput.make_empty(), outcome(**said))
        found.append(scheduler.dynamic_sd_lookup)
    costs, thresholds = [5, 0, 0, 0], [5, 5, 5, 0]
    assert found == [costs, thresholds, thresholds, costs, costs]
    assert told == ["step", "pause", "pause", "step", "step"]
    assert len(counted) == 5
