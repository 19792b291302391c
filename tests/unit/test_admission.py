# SPDX-License-Identifier: Apache-2.0
"""What drafts must promise, and how far their probabilities are trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from adadecode_vllm.method.admission import (
    TRY_COST,
    TRY_EVERY,
    AcceptanceRecord,
    Admission,
)
from adadecode_vllm.method.evidence import KINDS, MOST_MATCHES, Agreement, evidence
from adadecode_vllm.method.policy import ThresholdPolicy
from tests.made_up_exits import make_drafter, make_requests

ASKING = 0.08
"""Tokens of the time that asking an exit takes."""


def admission(least: float, promises: Sequence[float], due: bool) -> Admission:
    return Admission(
        least=np.array([least]),
        trust=np.ones(1),
        lookup=np.array([promises]),
        use_exits=np.ones(1, bool),
        exits_due=np.zeros(1, bool),
        due=np.array([due]),
    )


@pytest.mark.parametrize(
    ("least", "promises", "survival", "found"),
    [
        (0.2, [0.5] * 8, 1.0, 2),  # 0.5, 0.25, then 0.125
        (0.2, [0.9] * 8, 1.0, 8),
        (0.2, [0.9] * 8, 0.25, 2),
        (0.2, [0.5] * 8, 0.25, 0),
        (0.2, [0.5] * 8, 0.1, 0),
        (0.2, [0.99] * 8, 1.0, 8),
        (0.2, [0.1] * 8, 1.0, 0),
        (math.nan, [0.5] * 8, 0.1, 8),
        (0.2, [], 1.0, 0),
        (0.2, [0.4, 0.6, 0.7], 1.0, 2),  # 0.4, 0.24, then 0.168
        (0.15, [0.4, 0.6, 0.7], 1.0, 3),
    ],
)
def test_how_many_drafts_by_lookup_pay(
    least: float, promises: list[float], survival: float, found: int
) -> None:
    evidence = list(range(len(promises)))
    own = admission(least, promises, due=False)
    assert own.looked_up(0, survival, evidence) == found
    # What is never tried is never found out.
    due = admission(least, promises, due=True).looked_up(0, survival, evidence)
    assert due == max(found, min(1, len(promises)))


def test_evidence_is_told_apart_by_what_matches_and_how_places_agree() -> None:
    kinds = {
        evidence(matches, agreement)
        for matches in range(1, MOST_MATCHES + 1)
        for agreement in Agreement
    }
    assert kinds == set(range(KINDS))
    assert evidence(MOST_MATCHES + 3, Agreement.LIKELY) == evidence(
        MOST_MATCHES, Agreement.LIKELY
    )
    assert np.iinfo(np.int8).min <= -1 - KINDS


def test_requests_are_trusted_by_their_own_record() -> None:
    record = AcceptanceRecord()
    two, three = (evidence(matches, Agreement.LIKELY) for matches in (2, 3))
    exits = np.array([0, 0, -1 - two, -1 - three], np.int8)
    expected = np.array([0.8, 0.8, 1.0, 1.0])
    new = record.admission(["new"], np.full(1, 0.1)).lookup[0]
    assert (np.diff(new.reshape(len(Agreement), -1)) >= 0).all()
    assert (np.diff(new.reshape(len(Agreement), -1), axis=0) > 0).all()
    for _ in range(30):
        # Three drafts of it are never compared.
        record.record_acceptance("wrong", exits, expected, 0)
        record.record_acceptance("right", exits, expected, 4)
        record.record_acceptance("half", exits, expected, 2)
    least = np.full(4, 0.1)
    found = record.admission(["wrong", "right", "half", "new"], least)
    # Factors on odds of 0.8 to 0.2.
    assert found.trust[0] < 0.1
    assert found.trust[1] == found.trust[2] > 4.0
    assert found.trust[3] == 1.0
    # Of two matching tokens: half of 60 were right; of three, all 30. Those of "wrong"
    # were never compared, and nobody tried a single one.
    wrong, right, half, unknown = found.lookup
    assert unknown[two] == pytest.approx(0.49, abs=0.02)
    assert unknown[three] == pytest.approx(0.92, abs=0.02)
    assert unknown[0] == new[0]
    assert wrong.tolist() == unknown.tolist()
    assert (right > 1.1 * unknown).sum() > 3
    assert half[two] == pytest.approx(0.13, abs=0.05)
    assert (half < unknown).all()
    assert not found.due.any()
    record.forget(["wrong", "gone"])
    assert record.admission(["wrong"], least[:1]).trust.tolist() == [1.0]


def test_requests_that_the_exits_do_nothing_for_use_them_rarely() -> None:
    record = AcceptanceRecord()
    early, by_lookup = np.zeros(2, np.int8), np.full(2, -1, np.int8)
    expected = np.full(2, 0.5)
    scored = {"wrong": 0, "right": 0, "silent": 0, "own": 0, "lookup": 0}
    least = np.array([0.2, 0.2, 0.2, math.nan, 0.2])
    for _ in range(200):
        found = record.admission(list(scored), least)
        for row, name in enumerate(scored):
            if name == "lookup":  # found before any exit scores
                record.record_acceptance(name, by_lookup, expected, 0)
            elif found.use_exits[row]:
                scored[name] += 1
                record.record_scoring(name, least[row], ASKING)
                if name != "silent":
                    record.record_acceptance(
                        name, early, expected, 2 if name == "right" else 0
                    )
    assert scored["right"] == scored["own"] == 200
    assert found.use_exits[-1]
    # At first, and then once in 28 cycles: 0.2 tokens for a draft and 0.08 for asking.
    assert scored["wrong"] == scored["silent"] == 8 + (200 - 8) // 28
    # Its drafts by lookup are verified every time, those of the others never.
    assert found.due.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(("least", "cycles"), [(0.02, 16), (0.5, 50), (0.9, 90)])
def test_trying_costs_a_hundredth_at_most(least: float, cycles: int) -> None:
    """Where rows are dear, as in large batches, what is hopeless is tried seldom."""
    record = AcceptanceRecord()
    record.record_acceptance("a", np.full(1, -1, np.int8), np.ones(1), 0)
    promise = np.array([least])
    due = [bool(record.admission(["a"], promise).due[0]) for _ in range(100)]
    assert due.index(True) + 1 == cycles


def test_a_request_whose_text_changes_uses_the_exits_again() -> None:
    record = AcceptanceRecord()
    early, least = np.zeros(2, np.int8), np.array([0.2])
    scored = []
    for cycle in range(400):
        if scores := bool(record.admission(["a"], least).use_exits[0]):
            record.record_scoring("a", 0.2, ASKING)
            record.record_acceptance(
                "a", early, np.full(2, 0.5), 0 if cycle < 200 else 2
            )
        scored.append(scores)
    assert sum(scored[100:200]) < 10
    assert all(scored[-100:])


@pytest.mark.parametrize(
    ("costs", "asking", "uses"),
    [
        ((), 0.08, True),
        ((math.nan, 0.1), 0.08, True),
        ((0.1, 9.0), 0.1, True),
        # A draft in each cycle, right in every second: it brings 0.3 tokens.
        ((0.4, 0.1), 0.4, True),
        ((0.8, 0.1), 0.8, False),
        # Two exits were asked in each cycle.
        ((0.4, 0.4), 0.8, False),
    ],
)
def test_scoring_has_to_bring_what_it_takes(
    costs: tuple[float, ...], asking: float, uses: bool
) -> None:
    record = AcceptanceRecord()
    least = np.array([0.2])
    for cycle in range(40):
        record.record_scoring("a", 0.2, asking)
        record.record_acceptance(
            "a", np.zeros(1, np.int8), np.full(1, 0.5), int(cycle % 2)
        )
    found = record.admission(["a"], least, costs)
    assert found.use_exits.tolist() == [uses]
    assert found.select(np.array([0])).exit_costs.tolist() == pytest.approx(
        list(costs), nan_ok=True
    )
    assert math.isnan(found.exit_cost(2))


@pytest.mark.parametrize("right", [True, False])
def test_exits_that_are_no_longer_trusted_are_tried(right: bool) -> None:
    """Alone, a draft of theirs would never promise enough to be verified."""
    record = AcceptanceRecord()
    early = np.zeros(1, np.int8)
    for _ in range(60):
        record.record_acceptance("a", early, np.ones(1), 0)
    drafter = make_drafter([0], 4, lambda rows: [0.99] * len(rows))
    requests = make_requests(1, 4, 0.4)
    drafted = []
    for _ in range(2000):
        admission = record.admission(["a"], np.array([0.4]))
        if admission.use_exits[0]:
            record.record_scoring("a", 0.4, ASKING)
        window = drafter.draft(replace(requests, admission=admission))
        exits, expected = window.exits[0, 1:], window.expected
        assert expected is not None
        drafts = int(window.length[0]) - 1
        drafted.append(drafts)
        if drafts:
            record.record_acceptance(
                "a", exits[:drafts], expected[0, 1 : 1 + drafts], drafts * right
            )
    tries = drafted[:120] if right else drafted
    assert 0 < sum(tries) <= len(tries) * TRY_COST / 0.4
    assert max(tries) == 1
    if right:
        assert min(drafted[-50:]) == 4


def test_a_try_that_is_not_compared_counts() -> None:
    """It would be made again in every cycle."""
    record = AcceptanceRecord()
    first_wrong = [(-1, 0), (0, -1)]
    for exits in first_wrong:
        record.record_acceptance("a", np.array(exits, np.int8), np.ones(2), 0)
        found = record.admission(["a"], np.array([0.1]))
        assert not found.exits_due[0]
        assert not found.due[0]
        for _ in range(TRY_EVERY):
            found = record.admission(["a"], np.array([0.1]))
        assert found.exits_due[0]
        assert found.due[0]


def test_acceptance_is_what_the_exit_was_calibrated_to() -> None:
    confidence = np.array([0.0, 0.5, 0.9, 1.0], np.float32)
    plain = ThresholdPolicy([0.5], 3)
    assert plain.acceptance(0, confidence) == pytest.approx(confidence)
    policy = ThresholdPolicy([0.5, 0.5], 3, calibration=[(1.0, 0.0), (0.5, -1.0)])
    assert policy.acceptance(0, confidence) == pytest.approx(confidence, abs=1e-6)
    found = policy.acceptance(1, confidence)
    assert found[1] == pytest.approx(1 / (1 + math.exp(1)))
    assert found[2] == pytest.approx(1 / (1 + math.exp(1 - 0.5 * math.log(9))))
    assert (np.diff(found) > 0).all()


def test_what_follows_an_exits_draft_is_its_merit() -> None:
    """Its own draft alone would not bring what it takes."""
    uses = []
    for follows in (0, 3):
        record = AcceptanceRecord()
        exits = np.array([0] + [-1] * follows, np.int8)
        for _ in range(40):
            record.record_scoring("a", 0.2, 2.0)
            record.record_acceptance("a", exits, np.ones(1 + follows), 1 + follows)
        found = record.admission(["a"], np.array([0.2]), (2.0,))
        uses.append(bool(found.use_exits[0]))
    assert uses == [False, True]
