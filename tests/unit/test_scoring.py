# SPDX-License-Identifier: Apache-2.0
"""Whether another draft is worth asking an exit for."""

from __future__ import annotations

import numpy as np
import pytest

from adadecode_vllm.method.admission import SCORING_COST
from adadecode_vllm.method.scoring import Scoring
from tests.made_up_exits import make_drafter, make_requests

LEAST = 0.1


def after(promise: float, asking: float = SCORING_COST * LEAST) -> Scoring:
    """After many tokens of which an exit promised that much."""
    scoring = Scoring()
    for _ in range(500):
        scoring.said(np.array([promise]), LEAST, asking)
    return scoring


def test_exits_that_are_sure_are_asked_as_long_as_a_draft_may_pay() -> None:
    # A draft then brings the ratio less one, and scoring takes less.
    assert after(0.95).least_ratio == pytest.approx(1.0 + SCORING_COST, abs=0.2)


def test_exits_that_are_seldom_sure_are_asked_where_drafts_are_probably_right() -> None:
    ratios = [after(promise).least_ratio for promise in (0.95, 0.7, 0.45, 0.2, 0.0)]
    assert ratios == sorted(ratios)
    assert ratios[3] > 4.0
    # Where nothing is ever worth it, no draft is probable enough.
    assert ratios[4] * LEAST > 1.0


def test_what_asking_takes_is_measured() -> None:
    dear = [after(0.7, asking) for asking in (0.001, 0.04, 0.2, 0.5)]
    ratios = [scoring.least_ratio for scoring in dear]
    assert ratios == sorted(set(ratios))
    # A draft that pays, of 0.1 and more, brings 0.7 times what it survives, less 0.1.
    assert ratios[2] * LEAST == pytest.approx(0.3 / 0.7, rel=0.15)
    assert ratios[3] * LEAST == pytest.approx(0.6 / 0.7, rel=0.15)


def test_an_exit_that_knows_little_better_is_not_asked_beside_a_lookup() -> None:
    sure = [after(0.7, asking).sure for asking in (0.001, 0.04, 0.2, 0.5)]
    assert sure == sorted(set(sure), reverse=True)
    assert sure[2] == pytest.approx(0.5, abs=0.08)
    assert after(0.1).sure < 0.1 < 0.8 < after(0.95).sure
    assert after(0.7, 2.0).sure == 0.0


def test_it_follows_the_text() -> None:
    scoring = Scoring()
    for promise in (0.1, 0.9):
        for _ in range(1000):
            scoring.said(np.full(3, promise), LEAST, SCORING_COST * LEAST)
        assert scoring.least_ratio == pytest.approx(after(promise).least_ratio, rel=0.1)
    before = scoring.least_ratio
    scoring.said(np.empty(0), LEAST, 1.0)
    assert scoring.least_ratio == before


def test_at_first_every_promise_is_alike() -> None:
    assert 1.5 < Scoring().least_ratio < 3.0
    assert 0.6 < Scoring().sure < 0.9


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
