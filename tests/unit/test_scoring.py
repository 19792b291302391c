# SPDX-License-Identifier: Apache-2.0
"""Whether another draft is worth asking an exit for."""

from __future__ import annotations

import numpy as np
import pytest

from adadecode_vllm.method.admission import SCORING_COST
from adadecode_vllm.method.scoring import Scoring
from tests.made_up_exits import make_drafter, make_requests


def after(promise: float, tokens: int = 500) -> float:
    scoring = Scoring()
    for _ in range(tokens):
        scoring.said(np.array([promise]))
    return scoring.least_ratio


def test_exits_that_are_sure_are_asked_as_long_as_a_draft_may_pay() -> None:
    # A draft then brings the ratio less one, and scoring takes less.
    assert after(0.95) == pytest.approx(1.0 + SCORING_COST, abs=0.2)


def test_exits_that_are_seldom_sure_are_asked_where_drafts_are_probably_right() -> None:
    ratios = [after(promise) for promise in (0.95, 0.7, 0.45, 0.2)]
    assert ratios == sorted(ratios)
    assert ratios[-1] > 4.0
    # Where nothing is ever worth it, all but certain drafts are still followed.
    assert after(0.0) < 9.0


def test_what_asking_takes_is_measured() -> None:
    ratios = []
    for cost in (0.01, 0.4, 2.0):
        scoring = Scoring()
        for _ in range(500):
            scoring.said(np.array([0.7]), cost)
        ratios.append(scoring.least_ratio)
    assert ratios == sorted(ratios)
    assert ratios[1] == after(0.7)
    assert ratios[0] < ratios[1] < ratios[2]


def test_it_follows_the_text() -> None:
    scoring = Scoring()
    for promise in (0.1, 0.9):
        for _ in range(1000):
            scoring.said(np.full(3, promise))
        assert scoring.least_ratio == pytest.approx(after(promise), abs=0.25)
    before = scoring.least_ratio
    scoring.said(np.empty(0))
    assert scoring.least_ratio == before


def test_at_first_every_promise_is_alike() -> None:
    assert 1.5 < Scoring().least_ratio < 3.0


@pytest.mark.parametrize(
    ("promise", "drafts", "asked_for"),
    [
        # A third draft would have to promise more than a half.
        (0.3, 2, 2),
        (0.95, 8, 8),
    ],
)
def test_a_drafter_asks_no_exit_whose_answer_would_not_pay(
    promise: float, drafts: int, asked_for: int
) -> None:
    """Where a draft must promise 0.05."""
    asked = []

    def confidence(rows: np.ndarray) -> list[float]:
        asked.append(len(rows))
        return [promise] * len(rows)

    drafter = make_drafter([0], 8, confidence)
    requests = make_requests(1, 8, least=0.05)
    for _ in range(100):
        asked.clear()
        window = drafter.draft(requests)
    assert window.length[0] == 1 + drafts
    assert len(asked) == asked_for
