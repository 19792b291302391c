# SPDX-License-Identifier: Apache-2.0
"""The method's parts of one worker, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adadecode_vllm.engine.adadecode import AdaDecode
from adadecode_vllm.method.combined import Drafts
from adadecode_vllm.method.cycle import DraftRequests
from adadecode_vllm.method.stats import Stats

STOP = 7


class Combined:
    """Notes who drafts."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def draft(
        self, request_ids: Sequence[str], requests: DraftRequests
    ) -> tuple[None, list[Drafts]]:
        self.asked += request_ids
        return None, [Drafts([3], np.zeros(1, np.int8)) for _ in request_ids]


@pytest.fixture
def adadecode() -> Any:
    found = AdaDecode.__new__(AdaDecode)
    found.stats = Stats([0], 4)
    found.ledger = SimpleNamespace(record=lambda *_: None)  # type: ignore[assignment]
    found._combined = Combined()  # type: ignore[assignment]
    found._contradicted = set()
    found._last_accepted = {}
    exits = np.zeros(2, np.int8)
    found._drafts = {name: Drafts([5, STOP], exits) for name in "abc"}
    return found


def draft(adadecode: Any, stops: frozenset[int]) -> list[str]:
    """Who drafts next, of four requests whose newest token is 9."""
    four = np.full(4, 9)
    requests = DraftRequests(
        rows=np.arange(4),
        token_ids=four,
        positions=four,
        limits=four,
        stop_token_ids=[stops] * 4,
    )
    adadecode.draft(1, list("abcd"), requests)
    return list(adadecode._combined.asked)


def test_what_an_accepted_draft_ended_drafts_no_more(adadecode: Any) -> None:
    """The token behind it was sampled all the same, and is nobody's."""
    sampled = {"a": 3, "b": 2, "c": 1, "d": 1}
    adadecode.record_acceptance(sampled, dict.fromkeys("abc", 2))
    assert draft(adadecode, frozenset({STOP})) == ["b", "c", "d"]


@pytest.mark.parametrize("drafts", [0, 2])
def test_more_may_be_accepted_than_was_drafted(adadecode: Any, drafts: int) -> None:
    """vLLM warms up with placeholders, with which a model may agree."""
    own = adadecode._drafts["a"]
    adadecode._drafts["a"] = own._replace(
        token_ids=own.token_ids[:drafts], exits=own.exits[:drafts], expected=None
    )
    adadecode.record_acceptance({"a": 9}, {"a": 8})
    assert adadecode.stats.accepted.sum() == drafts
    assert draft(adadecode, frozenset({STOP})) == ["a", "b", "c", "d"][drafts > 0 :]


def test_of_the_step_before_nothing_is_left(adadecode: Any) -> None:
    adadecode.record_acceptance({"a": 3}, {"a": 2})
    adadecode.record_acceptance(dict.fromkeys("abcd", 1), {})
    assert draft(adadecode, frozenset({STOP})) == list("abcd")


def test_where_it_ends_nothing_all_go_on(adadecode: Any) -> None:
    adadecode.record_acceptance({"a": 3}, {"a": 2})
    assert draft(adadecode, frozenset()) == list("abcd")
