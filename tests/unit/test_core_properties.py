# SPDX-License-Identifier: Apache-2.0
"""Invariants I1-I4 and I6 of the core, on random schedules and a watchful model."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.reference_engine import EVENTS, Engine, Event, plain_decoding
from tests.reference_model import ReferenceModel
from tests.reference_steps import RandomExits

VOCAB_SIZE = 7
MAX_MODEL_LEN = 24


@dataclass(frozen=True)
class Scenario:
    """Everything that a run depends on."""

    prompts: list[list[int]]
    max_tokens: list[int]
    num_layers: int
    exit_layers: list[int]
    cap: int
    threshold: float
    accuracy: float
    token_budget: int
    max_num_seqs: int
    num_blocks: int
    block_size: int
    events: list[Event]
    seed: int
    stop_token_ids: frozenset[int] = frozenset()
    real_exits: bool = False
    guess_threshold: float = 1.0
    step_tokens: int = 0
    admission: float | None = None


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    num_layers = draw(st.integers(2, 5))
    layers = st.integers(0, num_layers - 1)
    exit_layers = draw(st.sets(layers, min_size=1, max_size=4))
    token = st.integers(0, VOCAB_SIZE - 1)
    prompts = draw(
        st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=4)
    )
    block_size = draw(st.integers(1, 4))
    fewest = -(-MAX_MODEL_LEN // block_size)
    occurrence = st.tuples(st.sampled_from(EVENTS), st.integers(0, 30))
    return Scenario(
        prompts=prompts,
        max_tokens=[draw(st.integers(1, 14)) for _ in prompts],
        num_layers=num_layers,
        exit_layers=sorted(exit_layers),
        cap=draw(st.integers(1, 6)),
        threshold=draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])),
        guess_threshold=draw(st.sampled_from([0.0, 0.3, 1.0])),
        accuracy=draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        token_budget=draw(st.integers(3, 16)),
        max_num_seqs=draw(st.integers(1, 4)),
        num_blocks=draw(st.integers(fewest, 3 * fewest)),
        block_size=block_size,
        events=draw(st.lists(occurrence, max_size=25)),
        seed=draw(st.integers(0, 1000)),
        stop_token_ids=frozenset(draw(st.sets(token, max_size=1))),
        real_exits=draw(st.booleans()),
        step_tokens=draw(st.sampled_from([0, 1, 6, 64])),
        admission=draw(st.sampled_from([None, 0.1, 0.5])),
    )


def random_scenario(seed: int) -> Scenario:
    """A scenario with plenty of everything, the same on every machine."""
    draw = random.Random(seed)
    num_layers = draw.randint(3, 5)
    prompts = [
        [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 9))]
        for _ in range(4)
    ]
    exits = draw.sample(range(num_layers), draw.randint(1, num_layers - 1))
    return Scenario(
        prompts=prompts,
        max_tokens=[draw.randint(8, 14) for _ in prompts],
        num_layers=num_layers,
        exit_layers=sorted(exits),
        cap=draw.randint(1, 6),
        threshold=draw.choice([0.0, 0.25, 0.5]),
        guess_threshold=draw.choice([0.0, 0.2, 1.0]),
        accuracy=0.8,
        token_budget=draw.randint(6, 24),
        max_num_seqs=4,
        num_blocks=2 * MAX_MODEL_LEN // 3,
        block_size=3,
        events=[(draw.choice(EVENTS), draw.randrange(30)) for _ in range(25)],
        seed=seed,
        step_tokens=draw.choice([0, 8, 64]),
        admission=draw.choice([None, 0.2]),
    )


def run_scenario(scenario: Scenario) -> Engine:
    """Run both loops, compare them, and return the engine for its counters."""
    exits = RandomExits(scenario.seed, VOCAB_SIZE, scenario.accuracy)
    shape: dict[str, Any] = {
        "exit_layers": scenario.exit_layers,
        "num_layers": scenario.num_layers,
        "vocab_size": VOCAB_SIZE,
        "num_blocks": scenario.num_blocks,
        "block_size": scenario.block_size,
        "seed": scenario.seed,
    }
    model = ReferenceModel(
        **shape, exit_function=None if scenario.real_exits else exits
    )
    engine = Engine(
        model,
        cap=scenario.cap,
        threshold=scenario.threshold,
        guess_threshold=scenario.guess_threshold,
        token_budget=scenario.token_budget,
        max_num_seqs=scenario.max_num_seqs,
        max_model_len=MAX_MODEL_LEN,
        step_tokens=scenario.step_tokens,
        admission=scenario.admission,
    )
    expected = []
    for prompt, max_tokens in zip(scenario.prompts, scenario.max_tokens, strict=True):
        stops = scenario.stop_token_ids
        tokens, finals = plain_decoding(
            ReferenceModel(**shape), prompt, max_tokens, stops
        )
        request = engine.add(prompt, max_tokens, stops)
        exits.continuations[request.number] = prompt + tokens
        engine.finals |= finals
        expected.append(tokens)
    engine.run(scenario.events)
    for request, tokens in zip(engine.requests, expected, strict=True):
        if request.aborted:
            assert request.generated == tokens[: len(request.generated)]
        else:
            assert request.generated == tokens
    check_counters(engine)
    return engine


def check_counters(engine: Engine) -> None:
    stats = engine.stats
    assert (stats.accepted + stats.rejected <= stats.early_predictions).all()
    assert (stats.early_predictions <= stats.gates).all()
    assert stats.generated_tokens >= stats.request_steps
    assert engine.compared_states > 0
    at_embedding = engine.model.exits_at_embedding
    bounds = engine.model.bounds
    widths = np.diff(bounds)
    assert not stats.segments_run[:at_embedding].any()
    assert (stats.token_layers[at_embedding:] % widths == 0).all()


@settings(deadline=None, max_examples=60)
@given(scenario=scenarios())
def test_output_is_that_of_plain_decoding(scenario: Scenario) -> None:
    engine = run_scenario(scenario)
    if engine.stats.accepted.any():
        event("accepted")
    if engine.stats.rejected.any():
        event("rejected")
    if engine.stats.resumed_tokens:
        event("resumed")
    for reason in engine.ledger.dropped:
        event(reason)
    if scenario.threshold == 1.0:
        assert engine.stats.gates.sum() == 0
        assert engine.stats.resumed_forwards == 0


def test_everything_happens() -> None:
    """The property above is not empty: each outcome occurs, many times."""
    seen: Counter[str] = Counter()
    for seed in range(25):
        engine = run_scenario(random_scenario(seed))
        seen["accepted"] += int(engine.stats.accepted.sum())
        seen["rejected"] += int(engine.stats.rejected.sum())
        seen["resumed"] += engine.stats.resumed_tokens
        seen["compared"] += engine.compared_states
        seen["aborted"] += sum(request.aborted for request in engine.requests)
        seen.update(engine.ledger.dropped)
    assert seen["accepted"] > 100
    assert seen["rejected"] > 50
    assert seen["resumed"] > 300
    assert seen["compared"] > 1000
    assert seen["aborted"] > 5
    for reason in ("skipped_step", "not_scheduled", "moved", "changed"):
        assert seen[reason] > 5, reason


def test_whole_steps_are_used() -> None:
    scenario = dataclasses.replace(
        random_scenario(3), step_tokens=64, real_exits=False, admission=None
    )
    steps = run_scenario(scenario).model.steps
    assert steps is not None
    assert steps.drafted > 0
    assert steps.resumed > 0
    # The first segment is prefetched more often than a whole forward.
    assert steps.prefetched[0] > steps.prefetched[1] > 0


def test_without_mishaps_right_drafts_save_forwards() -> None:
    scenario = Scenario(
        prompts=[[1, 2, 3]],
        max_tokens=[12],
        num_layers=3,
        exit_layers=[1, 2],
        cap=3,
        threshold=0.0,
        accuracy=1.0,
        token_budget=8,
        max_num_seqs=1,
        num_blocks=16,
        block_size=3,
        events=[],
        seed=0,
    )
    engine = run_scenario(scenario)
    assert engine.stats.request_steps == 4
    assert engine.stats.rejected.sum() == 0
    assert engine.ledger.dropped == {}
    # 1 token from the prompt, then windows of 1 + 3, 1 + 3 and 1 + 2 tokens.
    assert engine.stats.accepted.tolist() == [8, 0]
    assert engine.stats.resumed_tokens == 3 + 3 + 2
