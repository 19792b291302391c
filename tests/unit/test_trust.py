# SPDX-License-Identifier: Apache-2.0
"""How far what drafts promise is trusted, by what became of a request's others."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from adadecode_vllm.method.trust import Trust, trusted


def learnt(said: float, right: float, drafts: int = 400) -> float:
    """What is promised after so many drafts, of which such a share was right."""
    trust, random = Trust(), Random(0)
    for _ in range(drafts):
        trust.learn(said, random.random() < right)
    return float(trusted(np.array([said]), np.array([trust.factor]))[0])


def test_without_drafts_promises_are_taken_as_they_are() -> None:
    said = np.array([0.0, 0.2, 0.5, 0.9])
    assert trusted(said, np.array([Trust().factor])) == pytest.approx(said)


@pytest.mark.parametrize(
    ("said", "right"),
    [(0.5, 0.5), (0.8, 0.5), (0.5, 0.8), (0.3, 0.1), (0.95, 0.7), (0.99, 0.3)],
)
def test_promises_become_what_comes(said: float, right: float) -> None:
    assert learnt(said, right) == pytest.approx(right, abs=0.06)


def test_drafts_that_do_what_they_promise_change_little() -> None:
    """Of drafts that promise 0.8 one in five is wrong, whatever is next to certain."""
    trust = Trust()
    for _ in range(20):
        for said, right in ((0.99, True), (0.8, True), (0.99, True)):
            trust.learn(said, right)
        trust.learn(0.2, False)
    assert float(trusted(np.array([0.99]), np.array([trust.factor]))[0]) > 0.98


def test_what_is_nearly_certain_loses_least() -> None:
    """Eight such drafts in a row must stay probable after a few wrong guesses."""
    trust = Trust()
    for _ in range(4):
        trust.learn(0.8, right=False)
    sure, likely, unsure = trusted(
        np.array([0.99, 0.8, 0.2]), np.full(3, trust.factor)
    ).tolist()
    assert sure > 0.95
    assert 0.3 < likely < 0.6
    assert unsure < 0.1


def test_exits_that_are_always_certain_lose_their_trust_soon() -> None:
    trust = Trust()
    for _ in range(30):
        trust.learn(1.0, right=False)
    assert trusted(np.ones(1), np.array([trust.factor]))[0] < 0.3
    # However wrong they were, trust can be won again.
    for _ in range(500):
        trust.learn(1.0, right=False)
    for _ in range(100):
        trust.learn(1.0, right=True)
    assert trusted(np.ones(1), np.array([trust.factor]))[0] > 0.5
