# SPDX-License-Identifier: Apache-2.0
"""Invariants I2-I4 of the core and its drafting, in steps that a test chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from adadecode_vllm.method.cycle import DraftRequests
from adadecode_vllm.method.executor import TokenSubset
from adadecode_vllm.method.ledger import Resumable
from adadecode_vllm.method.resume import ScheduledBatch
from tests.reference_engine import Engine
from tests.reference_model import WIDTH, ReferenceModel, View

# I3


def test_drafting_writes_only_below_the_limit() -> None:
    """Deep exits run pending tokens too, but never past the last owned slot."""
    for cap in (1, 2, 4):
        model = ReferenceModel((1, 2), 4, block_size=2, num_blocks=16)
        model.exit_function = lambda request, prefix, exit_index: (0, float(exit_index))
        engine = Engine(model, cap=cap, threshold=0.5, max_model_len=20)
        request = engine.add([1, 2, 3], 10)
        engine.step()
        written = [write for write in model.writes if write.drafting]
        assert written
        first = request.prompt_length
        assert {write.position for write in written} == set(range(first, first + cap))
        assert {write.layer for write in written} == {0, 1}
        owned = set(model.block_slots(request.blocks))
        assert {write.slot for write in written} <= owned


def test_a_request_without_spare_blocks_drafts_less() -> None:
    model = ReferenceModel((1,), 2, block_size=4, num_blocks=4)
    model.exit_function = lambda request, prefix, exit_index: (0, 1.0)
    engine = Engine(model, cap=6, threshold=0.0, max_model_len=16)
    request = engine.add([1, 2, 3, 4, 5], 8)
    engine.step()
    assert len(request.blocks) == 2  # nothing was reserved: 4 blocks are too few
    assert len(request.drafts) == 8 - 5
    engine.run()


# I4: direct comparisons, where the levels are chosen


def _window(levels: list[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a prompt and a window, whole or with the first tokens at some level."""
    exit_layers, num_layers = (1, 2, 4), 5
    tokens = [1, 2, 3, 4, 5, 6, 0]
    first = len(tokens) - count
    results = []
    for resumed in (False, True):
        model = ReferenceModel(exit_layers, num_layers)
        view = View(0, list(range(8)), tokens, (0, 16))
        model.views = {0: view}
        ids = torch.tensor(tokens)
        one = np.ones(1, np.int64)
        prompt = TokenSubset(one * 0, one * 0, one * first)
        model.forward(prompt, ids[:first])
        whole = TokenSubset(one * 0, one * first, one * count)
        if not resumed:
            results.append(model.forward(whole, ids[first:]))
            continue
        engine = Engine(model, cap=count - 1, max_num_seqs=2, max_model_len=16)
        slot = 1
        reached = 0
        for segment in range(max(levels)):
            # All tokens that go through this segment, run one at a time.
            for offset in range(sum(level > segment for level in levels)):
                index = torch.tensor([slot * engine.states.window + offset])
                if segment == 0:
                    hidden, residual = model.embed(ids[first + offset][None]), None
                else:
                    hidden, residual = engine.states.read(index)
                alone = TokenSubset(one * 0, one * (first + offset), one)
                hidden, residual = model.run(segment, alone, hidden, residual)
                assert residual is not None
                engine.states.write(index, hidden, residual)
                reached += 1
        assert reached == sum(levels)
        row = np.zeros((1, count), np.int8)
        row[0, : len(levels)] = levels
        batch = ScheduledBatch(one * 0, one * first, one * count, ids[first:])
        resumable = Resumable(one * 0, one * slot, row)
        model.writes.clear()
        results.append(engine.resumer.forward(batch, resumable))
        bounds = model.bounds
        expected = {
            (layer, first + offset)
            for offset in range(count)
            for layer in range(bounds[int(row[0, offset])], num_layers)
        }
        assert {(w.layer, w.position) for w in model.writes} == expected
        assert len(model.writes) == len(expected)
    return results[0], results[1]


@pytest.mark.parametrize(
    ("levels", "count"),
    [
        ([1], 1),
        ([3], 1),
        ([1, 1, 1], 3),
        ([3, 2, 1], 3),
        ([3, 3, 1], 4),
        ([2], 4),
        ([3, 3, 3], 3),  # segments 0 to 2 have no token at all
        ([2, 2], 2),
        ([3, 1, 1], 5),
    ],
)
def test_resumed_states_are_bit_identical(levels: list[int], count: int) -> None:
    uninterrupted, resumed = _window(levels, count)
    assert torch.equal(uninterrupted, resumed)


def test_batch_size_does_not_change_the_reference_arithmetic() -> None:
    """Otherwise the comparisons above would mean nothing."""
    tokens = [3, 1, 4, 1, 5]
    one = np.ones(1, np.int64)
    finals = []
    for chunks in ([5], [1, 1, 1, 1, 1], [2, 3]):
        model = ReferenceModel()
        model.views = {0: View(0, list(range(8)), tokens, (0, 16))}
        done, parts = 0, []
        for chunk in chunks:
            subset = TokenSubset(one * 0, one * done, one * chunk)
            ids = torch.tensor(tokens[done : done + chunk])
            parts.append(model.forward(subset, ids))
            done += chunk
        finals.append(torch.cat(parts))
    assert torch.equal(finals[0], finals[1])
    assert torch.equal(finals[0], finals[2])


def test_rounding_the_sum_would_be_noticed() -> None:
    """I4 needs hidden state and residual apart: their rounded sum is not enough."""
    tokens = [3, 1, 4]
    model = ReferenceModel()
    model.views = {0: View(0, list(range(8)), tokens, (0, 16))}
    one = np.ones(1, np.int64)
    subset = TokenSubset(one * 0, one * 0, one * 3)
    hidden, residual = model.run(0, subset, model.embed(torch.tensor(tokens)), None)
    assert residual is not None
    kept, _ = model.run(1, subset, hidden, residual)
    total, zero = residual.clone(), hidden.clone()
    total[:, :-3] += hidden[:, :-3]
    zero[:, :-3] = 0
    rounded, _ = model.run(1, subset, zero, total)
    assert not torch.equal(kept, rounded)


# Drafting


def _draft(
    answers: dict[tuple[int, int, int], tuple[int, float]],
    limits: list[int],
    stops: list[frozenset[int]] | None = None,
    cap: int = 4,
) -> tuple[Any, Engine]:
    """Draft after one-token prompts, with answers by (request, length, exit)."""

    def exit_function(
        request: int, prefix: tuple[int, ...], exit_index: int
    ) -> tuple[int, float]:
        return answers.get((request, len(prefix), exit_index), (0, 0.0))

    model = ReferenceModel((1, 2), 3, exit_function=exit_function)
    engine = Engine(model, cap=cap, threshold=0.5)
    requests = len(limits)
    model.drafting = True
    # Rows in reverse, to tell rows from slots.
    rows = np.arange(requests)[::-1].copy()
    places = np.array([(-1, request) for request in range(requests)])
    final_states = model.final_states(torch.zeros(requests, WIDTH), places)
    for request, row in enumerate(rows.tolist()):
        blocks = list(range(8 * request, 8 * request + 8))
        memory = {0: final_states[request]}
        model.views[row] = View(request, blocks, [1], (0, limits[request]), memory)
    window = engine.drafter.draft(
        DraftRequests(
            rows=rows,
            token_ids=np.ones(requests, np.int64),
            positions=np.zeros(requests, np.int64),
            limits=np.array(limits, np.int64),
            stop_token_ids=list(stops or [frozenset()] * requests),
            final_states=final_states,
            final_rows=np.arange(requests),
        )
    )
    return window, engine


def test_drafting_goes_deeper_only_where_it_must() -> None:
    window, engine = _draft(
        {
            (0, 1, 0): (4, 0.9),  # predicts at once,
            (0, 2, 0): (5, 0.9),  # and again; the third token stops at both exits
            (1, 1, 1): (6, 0.9),  # predicts at the second exit only
        },
        [4, 4],
    )
    assert window.length.tolist() == [3, 2]
    assert window.token_ids[0, :3].tolist() == [1, 4, 5]
    assert window.token_ids[1, :2].tolist() == [1, 6]
    assert window.exits[0, :3].tolist() == [-1, 0, 0]
    assert window.exits[1, :2].tolist() == [-1, 1]
    assert window.levels[0, :3].tolist() == [2, 2, 2]
    assert window.levels[1, :2].tolist() == [2, 2]
    # Segment 0: two fronts, then 0's second, 0's third with 1's second.
    assert engine.stats.gates.tolist() == [5, 3]
    assert engine.stats.early_predictions.tolist() == [2, 1]
    # Deferred layers of several tokens ran as one batch.
    assert engine.stats.token_layers.tolist() == [5, 5, 0]
    assert engine.stats.segments_run.tolist() == [4, 2, 0]


def test_confidence_must_exceed_the_threshold() -> None:
    window, _ = _draft({(0, 1, 0): (4, 0.5), (0, 1, 1): (4, 0.5)}, [4])
    assert window.length.tolist() == [1]
    assert window.levels[0, 0] == 2


def test_a_request_stops_at_its_limit() -> None:
    answers = {(r, n, 0): (3, 0.9) for r in (0, 1) for n in range(1, 9)}
    window, engine = _draft(answers, [1, 4])
    assert window.length.tolist() == [2, 5]
    # The last prediction is not run: it would need one slot more.
    assert window.levels[0, :2].tolist() == [1, 0]
    assert window.levels[1, :5].tolist() == [1, 1, 1, 1, 0]
    assert engine.stats.gates.tolist() == [5, 0]


def test_nothing_is_predicted_after_a_stop_token() -> None:
    answers = {(r, n, 0): (2 + r, 0.9) for r in (0, 1) for n in range(1, 9)}
    window, _ = _draft(answers, [4, 4], [frozenset({2}), frozenset({2})])
    assert window.length.tolist() == [2, 5]
    assert window.levels[0, :2].tolist() == [1, 0]


# I2: only the agreeing prefix resumes


@pytest.mark.parametrize("changed", [None, 0, 1, 2])
def test_only_the_agreeing_prefix_resumes(changed: int | None) -> None:
    model = ReferenceModel((1,), 2, exit_function=lambda *_: (3, 1.0))
    engine = Engine(model, cap=3, threshold=0.5)
    request = engine.add([1, 2], 10)
    engine.step()
    assert request.drafts == [3, 3, 3]
    if changed is None:
        engine.step()
        assert engine.stats.resumed_tokens == 3  # the last draft never ran
        assert not engine.ledger.dropped
    else:
        engine.step(("change", changed))
        assert engine.stats.resumed_tokens == 1 + changed
        assert engine.ledger.dropped == {"changed": 1}


@pytest.mark.parametrize(
    ("mishap", "reason"),
    [
        ("preempt", "not_scheduled"),
        ("bounce", "not_scheduled"),
        ("hold", "not_scheduled"),
        ("rollback", "moved"),
        ("skip", "skipped_step"),
    ],
)
def test_mishaps_drop_the_entry(mishap: str, reason: str) -> None:
    model = ReferenceModel((1,), 2, exit_function=lambda *_: (3, 1.0))
    engine = Engine(model, cap=3, threshold=0.5, token_budget=16)
    for prompt in ([1, 2], [4, 5]):
        engine.add(prompt, 10)
    engine.step()
    assert len(engine.ledger) == 2
    engine.step((mishap, 0))
    if mishap == "skip":
        assert engine.stats.resumed_tokens == 0
        engine.step()
        assert engine.ledger.dropped == {reason: 2}
        assert engine.stats.resumed_tokens == 0
    else:
        assert engine.ledger.dropped == {reason: 1}
        assert engine.stats.resumed_tokens == 3  # the other request's


def test_truncated_drafts_resume_what_is_left() -> None:
    model = ReferenceModel((1,), 2, exit_function=lambda *_: (3, 1.0))
    engine = Engine(model, cap=3, threshold=0.5)
    engine.add([1, 2], 10)
    engine.step()
    engine.step(("truncate", 1))
    assert engine.stats.resumed_tokens == 2
    assert engine.ledger.dropped_tokens == {"truncated": 1}  # the last never ran
