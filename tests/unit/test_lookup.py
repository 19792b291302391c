# SPDX-License-Identifier: Apache-2.0
"""What the lookup says beside the exits, request by request."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adadecode_vllm.method.admission import AcceptanceRecord
from adadecode_vllm.method.combined import CombinedDrafter
from adadecode_vllm.method.cycle import DraftRequests
from adadecode_vllm.method.evidence import Agreement, evidence
from adadecode_vllm.method.ledger import Window
from adadecode_vllm.method.lookup import (
    NOTHING,
    Candidates,
    Contexts,
    Continuation,
    Query,
    verifiable_part,
)
from adadecode_vllm.method.stats import Stats

LEAST = 0.2
SURE = 0.7


class Fake:
    """Finds the token after the last one, behind as many matches as that says."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int], int, int]] = []

    def find(self, query: Query) -> Continuation:
        tokens = [*query.context.tolist(), *query.drafts]
        self.asked.append((query.request_id, tokens, query.fewest_matches, query.most))
        matches = evidence(tokens[-1], Agreement.LIKELY)
        return Continuation([tokens[-1] + 1], [matches])

    def forget(self, request_ids: Collection[str]) -> None:
        pass


@pytest.fixture
def lookup() -> Fake:
    return Fake()


def contexts(
    lookup: Fake, ways: list[str], least: float | None = LEAST, last: int = 2
) -> Contexts:
    names, requests = of_requests(ways, least, last)
    return Contexts(names, requests, lambda: lookup)


def of_requests(
    ways: list[str], least: float | None = LEAST, last: int = 2
) -> tuple[list[str], DraftRequests]:
    size = len(ways)
    names = [f"r{index}" for index in range(size)]
    requests = DraftRequests(
        rows=np.arange(size),
        token_ids=np.full(size, last),
        positions=np.zeros(size, np.int64),
        limits=np.full(size, 4),
        stop_token_ids=[{9}] * size,
        contexts=[np.array([last], np.int32)] * size,
        ways=ways,
    )
    if least is not None:
        admission = AcceptanceRecord().admission(names, np.full(size, least))
        requests = replace(requests, admission=admission)
    return names, requests


def test_one_matching_token_is_enough_for_a_chain_with_costs(lookup: Fake) -> None:
    for way, least, fewest in (
        ("chain", LEAST, 1),
        ("chain", None, 2),
        ("chain", np.nan, 2),
        ("first", LEAST, 2),
        ("tail", LEAST, 2),
    ):
        contexts(lookup, [way], least).find(0, np.array([5]))
        assert lookup.asked.pop() == ("r0", [2, 5], fewest, 3)


def test_nothing_is_looked_up_behind_a_stop_token_or_the_limit(lookup: Fake) -> None:
    here = contexts(lookup, ["chain"])
    for drafts in ([9], [5, 9], [5, 5, 5, 5]):
        assert here.find(0, np.array(drafts)).token_ids == []
    assert lookup.asked == []


@pytest.mark.parametrize(
    ("found", "part"),
    [
        ([4, 5, 6], [4, 5, 6]),
        ([4, 9, 6], [4, 9]),
        ([4, 20, 9], [4]),
        ([20, 5], []),
        ([19, 5], [19, 5]),
        ([], []),
    ],
)
def test_what_can_be_verified_of_what_was_found(
    found: list[int], part: list[int]
) -> None:
    assert verifiable_part(found, stop_token_ids={9, 25}, vocab_size=20) == part


def test_candidates_follow_the_windows_of_chains(lookup: Fake) -> None:
    candidates = Candidates(contexts(lookup, ["chain", "tail", "chain"]))
    both, windows = np.arange(3), np.array([[2, 7, 0], [2, 0, 0], [2, 0, 0]])
    candidates.look_up(both, windows, np.ones(3, np.int64), SURE)
    assert candidates.token_ids.tolist() == [3, -1, 3]
    two = evidence(2, Agreement.LIKELY)
    assert candidates.evidence[[0, 2]].tolist() == [two, two]
    assert candidates.promises[1] == -1
    assert not candidates.sure.any()
    assert len(lookup.asked) == 2
    # Only the first request has drafted since; seven tokens match behind its draft.
    candidates.look_up(both, windows, np.array([2, 1, 1]), SURE)
    assert len(lookup.asked) == 3
    assert candidates.token_ids.tolist() == [8, -1, 3]
    assert candidates.sure.tolist() == [True, False, False]
    assert candidates.found_behind(0, 1) == ([8], [evidence(7, Agreement.LIKELY)])
    assert candidates.found_behind(0, 0) is None
    assert candidates.found_behind(1, 0) is None


@pytest.mark.parametrize(("least", "sure"), [(LEAST, True), (np.nan, False)])
def test_no_candidate_is_sure_where_thresholds_decide(
    lookup: Fake, least: float, sure: bool
) -> None:
    candidates = Candidates(contexts(lookup, ["chain"], least, last=8))
    candidates.look_up(np.arange(1), np.array([[8]]), np.ones(1, np.int64), SURE)
    assert candidates.token_ids.tolist() == [9]
    assert candidates.sure.tolist() == [sure]
    assert bool(candidates.promises[0] > 0) is sure


class NoDrafts:
    """Exits that are never sure, and whose next forward can be prefetched."""

    def __init__(self) -> None:
        self.prefetched = 0

    def draft(self, requests: DraftRequests, candidates: Any) -> Window:
        size = len(requests.rows)
        shape = (size, 5)
        return Window(
            requests.positions,
            np.ones(size, np.int64),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int8),
            np.zeros(shape, np.int8),
        )

    def prefetch(self) -> None:
        self.prefetched += 1


def test_a_forward_is_prefetched_where_nothing_was_looked_up_behind_it(
    lookup: Fake,
) -> None:
    exits: Any = NoDrafts()
    combined = CombinedDrafter(exits, AcceptanceRecord(), Stats([0], 4), lambda: lookup)
    names, requests = of_requests(["tail", "first"], least=None)
    combined.draft(names, requests)
    assert exits.prefetched == 0
    lookup.find = lambda query: NOTHING  # type: ignore[method-assign]
    combined.draft(names, requests)
    assert exits.prefetched == 1
    combined.draft(names, replace(requests, contexts=None, ways=None))
    assert exits.prefetched == 2
