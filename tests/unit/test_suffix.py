# SPDX-License-Identifier: Apache-2.0
"""Drafts by the suffix trees of arctic-inference."""

from __future__ import annotations

import numpy as np
import pytest

from adadecode_vllm.engine import suffix
from adadecode_vllm.engine.suffix import TREE_DEPTH, SuffixLookup
from adadecode_vllm.method.evidence import Agreement, evidence
from adadecode_vllm.method.lookup import NOTHING, Continuation, Query

VOCABULARY = 200

pytest.importorskip("arctic_inference", reason="arctic-inference is not installed")


@pytest.fixture
def lookup() -> SuffixLookup:
    return SuffixLookup(VOCABULARY)


def find(
    lookup: SuffixLookup,
    request_id: str,
    context: list[int],
    drafts: tuple[int, ...] = (),
    fewest: int = 2,
    stops: tuple[int, ...] = (),
) -> Continuation:
    return lookup.find(
        Query(request_id, np.array(context, np.int32), drafts, fewest, 3, stops)
    )


def likely(token_ids: list[int], matches: int) -> Continuation:
    """What was found behind so many matching tokens."""
    kinds = [evidence(matches + n, Agreement.LIKELY) for n in range(len(token_ids))]
    return Continuation(token_ids, kinds)


def test_what_followed_the_same_tokens_is_drafted(lookup: SuffixLookup) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3]
    assert find(lookup, "a", prompt) == likely([4, 5, 6], 3)
    assert find(lookup, "a", prompt, drafts=(4,)) == likely([5, 6, 9], 4)
    assert find(lookup, "a", prompt, drafts=(8,)) == NOTHING
    assert find(lookup, "a", prompt, stops=(5,)).token_ids == [4, 5]
    # As many drafts as tokens match.
    assert find(lookup, "a", [*prompt, 7, 1], fewest=1) == likely([2], 1)
    assert find(lookup, "a", [*prompt, 7, 1], fewest=2) == NOTHING


def test_nothing_is_drafted_that_has_no_logit(lookup: SuffixLookup) -> None:
    """A prompt may hold ids that only the tokenizer knows."""
    unknown, last = VOCABULARY, VOCABULARY - 1
    assert find(lookup, "a", [1, 2, last, unknown, 3, 1, 2]) == likely([last], 2)
    assert find(lookup, "b", [1, 2, unknown, 3, 1, 2]) == NOTHING
    # Behind one of them, what followed is as good as any other.
    assert find(lookup, "c", [1, unknown, 3, 4, 1, unknown]).token_ids[:2] == [3, 4]


def test_other_requests_answers_are_found_too(lookup: SuffixLookup) -> None:
    prompt, answer = [1, 2, 3], [40, 41, 42, 43]
    for done in range(len(answer) + 1):
        find(lookup, "a", prompt + answer[:done])
    assert find(lookup, "b", [9, 40, 41]) == likely([42, 43], 2)
    lookup.forget(["a"])
    assert find(lookup, "b", [9, 40, 41, 42]) == likely([43], 3)
    # Prompts are the request's own.
    assert find(lookup, "b", [9, 40, 41, 42, 1, 2]) == NOTHING


def test_a_name_may_be_used_again(lookup: SuffixLookup) -> None:
    find(lookup, "a", [1, 2, 3, 4, 1, 2])
    lookup.forget(["a", "gone"])
    assert find(lookup, "a", [5, 6, 7, 5, 6]) == likely([7, 5], 2)
    assert find(lookup, "a", [5, 6, 7, 3, 1, 2]) == NOTHING
    # Shorter than before: another text.
    assert find(lookup, "a", [8, 9, 4, 8, 9]) == likely([4, 8], 2)


def test_answers_are_bounded_by_their_tokens(
    lookup: SuffixLookup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suffix, "CACHED_TOKENS", 6)
    for name, first in (("a", 10), ("b", 20), ("c", 30)):
        text = [1, 2, first, first + 1, first + 2]
        for known in range(2, 6):
            find(lookup, name, text[:known])
        lookup.forget([name])
    assert find(lookup, "d", [5, 10], fewest=1) == NOTHING
    assert find(lookup, "e", [5, 20], fewest=1).token_ids == [21]
    assert find(lookup, "f", [5, 30], fewest=1).token_ids == [31]


def test_answers_can_be_left_out(lookup: SuffixLookup) -> None:
    """In the midst of a request too, whose own text is still looked up."""
    for name in ("a", "b"):
        for known in range(2, 6):
            find(lookup, name, [1, 2, 40, 41, 42][:known])
    lookup.forget(["a"])
    assert find(lookup, "c", [9, 40, 41]) == likely([42], 2)
    lookup.forget_answers()
    assert find(lookup, "d", [9, 40, 41]) == NOTHING
    assert find(lookup, "b", [1, 2, 40, 41, 42, 1, 2]) == likely([40, 41], 2)
    lookup.forget(["b", "c", "d"])
    # Nor are answers remembered from then on, of running requests or of others.
    for known in range(2, 6):
        find(lookup, "e", [1, 2, 50, 51, 52][:known])
    assert find(lookup, "f", [9, 50, 51]) == NOTHING
    lookup.forget(["e"])
    assert find(lookup, "g", [9, 50, 51]) == NOTHING
    assert find(lookup, "e", [5, 6, 7, 5, 6]) == likely([7, 5], 2)


def test_long_matches(lookup: SuffixLookup) -> None:
    run = list(range(100, 140))
    found = find(lookup, "a", [*run, 7, *run])
    assert found.token_ids[0] == 7
    assert found.evidence[0] == evidence(TREE_DEPTH, Agreement.LIKELY)
