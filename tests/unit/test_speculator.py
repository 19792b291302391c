# SPDX-License-Identifier: Apache-2.0
"""How Model Runner V2's adapter reads schedules that know no drafts yet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

from adadecode_vllm.compat import SUPPORTED
from adadecode_vllm.config import parse_config
from adadecode_vllm.engine import placeholder_drafts
from adadecode_vllm.engine.draft_cycle import DraftCycle
from adadecode_vllm.engine.settings import Settings
from adadecode_vllm.engine.speculator import AdaDecodeSpeculator
from adadecode_vllm.heads import load_heads_config
from adadecode_vllm.method.ledger import Ledger, Window
from tests.harness import HEADS

CAP = 3


def make_speculator(*, asynchronous: bool = True) -> AdaDecodeSpeculator:
    config: Any = SimpleNamespace(
        additional_config={"adadecode": {"heads": "H"}},
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
    )
    states: Any = SimpleNamespace(
        max_num_reqs=4,
        max_model_len=64,
        draft_tokens=torch.zeros((4, CAP), dtype=torch.int64),
        req_id_to_index={"a": 2, "b": 0, "c": 1},
    )
    speculator = AdaDecodeSpeculator(config, torch.device("cpu"), states)
    adadecode: Any = SimpleNamespace(
        ledger=Ledger(),
        forget=lambda request_ids: None,
        settings=Settings(
            parse_config({"heads": HEADS, "exit_layers": [2]}), load_heads_config(HEADS)
        ),
    )
    speculator.adadecode = adadecode
    speculator.cycle = DraftCycle(adadecode, max_model_len=64)
    return speculator


def schedule(
    counts: dict[str, int],
    drafts: dict[str, list[int]],
    new: tuple[str, ...] = (),
    params: SamplingParams | None = None,
    **changes: Any,
) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = counts
    output.total_num_scheduled_tokens = sum(counts.values())
    output.scheduled_spec_decode_tokens = drafts
    output.scheduled_new_reqs = [
        SimpleNamespace(req_id=name, num_computed_tokens=5, sampling_params=params)
        for name in new
    ]
    for name, value in changes.items():
        setattr(output, name, value)
    return output


def test_empty_placeholders_are_removed() -> None:
    speculator = make_speculator()
    speculator.drafts = {"a": [7, 8], "b": []}
    placeholders = [-1] * CAP
    given = schedule({"a": 4, "b": 4, "c": 6}, {"a": placeholders, "b": placeholders})
    taken = speculator.start_step(given)
    assert taken.num_scheduled_tokens == {"a": 3, "b": 1, "c": 6}
    assert taken.total_num_scheduled_tokens == 10
    assert taken.scheduled_spec_decode_tokens == {"a": [-1, -1]}
    assert speculator.unused_drafts == {"a": 1, "b": 3}
    # The scheduler keeps its own; it reads what was rejected off it.
    assert given.num_scheduled_tokens == {"a": 4, "b": 4, "c": 6}
    assert given.scheduled_spec_decode_tokens == {"a": placeholders, "b": placeholders}


def test_drafts_are_dropped_beside_a_request_that_needs_a_plain_step() -> None:
    speculator = make_speculator()
    speculator.drafts = {"a": [7, 8]}
    scoring = SamplingParams(logprob_token_ids=[3])
    drafts = {"a": [-1] * CAP}
    given = schedule({"a": 4, "b": 6}, drafts, new=("b",), params=scoring)
    assert speculator.start_step(given).num_scheduled_tokens == {"a": 1, "b": 6}
    assert speculator.unused_drafts == {"a": CAP}
    speculator.drafts = {"a": [7, 8]}
    given = schedule({"a": 4}, drafts, finished_req_ids={"b"})
    assert speculator.start_step(given).num_scheduled_tokens == {"a": 3}


def test_what_fits_is_passed_on_as_it_is() -> None:
    speculator = make_speculator(asynchronous=False)
    speculator.drafts = {"a": [7, 8]}
    given = schedule({"a": 3}, {"a": [7, 8]})
    assert speculator.start_step(given) is given
    assert speculator.unused_drafts == {}


def test_fewer_placeholders_than_drafts() -> None:
    """Near the end of a text or of the budget."""
    speculator = make_speculator()
    speculator.drafts = {"a": [7, 8, 9]}
    taken = speculator.start_step(schedule({"a": 2}, {"a": [-1]}))
    assert taken.num_scheduled_tokens == {"a": 2}


def test_drafts_that_the_scheduler_changed_are_not_verified() -> None:
    speculator = make_speculator(asynchronous=False)
    speculator.drafts = {"a": [7, 8, 9]}
    taken = speculator.start_step(schedule({"a": 4}, {"a": [7, 5, 9]}))
    assert taken.num_scheduled_tokens == {"a": 2}
    assert taken.scheduled_spec_decode_tokens == {"a": [7]}


@pytest.mark.parametrize("gone", ["finished", "preempted", "new"])
def test_drafts_of_another_life_are_forgotten(gone: str) -> None:
    """A request that came back under its name owns none of its former drafts."""
    speculator = make_speculator()
    speculator.drafts = {"a": [7, 8]}
    ended = {
        "finished": {"finished_req_ids": {"a"}},
        "preempted": {"preempted_req_ids": {"a"}},
        "new": {},
    }[gone]
    new = ("a",) if gone == "new" else ()
    taken = speculator.start_step(schedule({"a": 4}, {"a": [-1] * CAP}, new, **ended))
    assert taken.num_scheduled_tokens == {"a": 1}


def test_while_warming_up_made_up_drafts_are_verified() -> None:
    speculator = make_speculator()
    resets: list[bool] = []
    speculator.adadecode.reset_counters = lambda: resets.append(True)
    given = schedule({"a": 4}, {"a": [0] * CAP})
    with speculator.warming_up():
        assert speculator.start_step(given) is given
        assert not resets
    assert resets
    assert speculator.start_step(given).num_scheduled_tokens == {"a": 1}


@pytest.mark.parametrize("minor", list(SUPPORTED))
def test_the_grammar_concerns_the_drafts_that_there_are(
    minor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placeholder_drafts, "facts", lambda: SUPPORTED[minor])
    speculator = make_speculator()
    speculator.drafts = {"a": [7, 8], "b": [], "c": [1, 2, 3]}
    placeholders = [-1] * CAP
    speculator.start_step(
        schedule(
            {"a": 4, "b": 4, "c": 4},
            {"a": placeholders, "b": placeholders, "c": placeholders},
        )
    )
    # One row per scheduled draft and one more, request by request.
    bitmask = np.arange(12, dtype=np.int32)[:, None]
    given = GrammarOutput(["c", "a", "b"], bitmask, [3, 1, 3])
    trimmed = speculator.trim_grammar(given)
    # From 0.33 on a request's rows are always as many; the runner skips some.
    kept = [0, 1, 2, 3, 4, 5, 6, 8] if minor == "0.32" else list(range(12))
    assert trimmed.grammar_bitmask[:, 0].tolist() == kept
    assert trimmed.num_acceptable_drafts == [3, 1, 0]
    assert speculator.trim_grammar(None) is None
    only_full = GrammarOutput(["c"], bitmask[:4], [3])
    assert speculator.trim_grammar(only_full) is only_full


def input_batch(request_ids: list[str], rows: list[int], count: list[int]) -> Any:
    return SimpleNamespace(
        req_ids=request_ids,
        idx_mapping_np=np.array(rows),
        num_scheduled_tokens=np.array(count, np.int32),
        num_computed_tokens_np=np.array([30] * len(rows), np.int32),
        input_ids=torch.arange(sum(count)),
        num_tokens=sum(count),
    )


def pending(position: int) -> Window:
    return Window(
        first_position=np.array([position]),
        length=np.array([3]),
        token_ids=np.array([[5, 7, 8, 0]]),
        levels=np.array([[2, 1, 0, 0]], np.int8),
        exits=np.array([[-1, 0, 0, -1]], np.int8),
    )


@pytest.mark.parametrize(("asynchronous", "position"), [(True, 20), (False, 30)])
def test_positions_are_the_workers_own_where_scheduling_is_asynchronous(
    asynchronous: bool, position: int
) -> None:
    """The scheduler's are exact only if it waits for the step before."""
    speculator = make_speculator(asynchronous=asynchronous)
    speculator._computed[2] = 20
    for first, resumes in ((position, True), (position + 1, False)):
        speculator.adadecode.ledger.record(speculator.cycle.step, ["a"], pending(first))
        speculator.drafts = {"a": [7, 8]}
        speculator.start_step(schedule({"b": 9, "a": 3}, {"a": [7, 8]}))
        found = speculator.resumable(input_batch(["b", "a"], [0, 2], [9, 3]))
        assert (found is not None) is resumes
        if found is not None:
            batch, resumable = found
            assert batch.rows.tolist() == [0, 2]
            assert batch.first.tolist()[1] == position
            assert resumable.requests.tolist() == [1]
            assert resumable.levels.tolist() == [[2, 1, 0, 0]]


def test_new_requests_resume_nothing() -> None:
    speculator = make_speculator()
    speculator._computed[2] = 20
    speculator.adadecode.ledger.record(0, ["a"], pending(20))
    speculator.start_step(schedule({"a": 3}, {}, ("a",)))
    assert speculator.resumable(input_batch(["a"], [2], [3])) is None
    speculator.add_requests(schedule({"a": 3}, {}, ("a",)))
    assert speculator._computed[2] == 5


def test_a_skipped_step_drops_what_was_pending() -> None:
    speculator = make_speculator()
    speculator.adadecode.ledger.record(speculator.cycle.step, ["a"], pending(0))
    speculator.start_step(schedule({}, {}))
    speculator.start_step(schedule({"a": 3}, {}))
    assert not speculator.may_resume(schedule({"b": 1}, {}))
    assert speculator.resumable(input_batch(["a"], [2], [3])) is None
    assert speculator.adadecode.ledger.dropped == {"skipped_step": 1}
