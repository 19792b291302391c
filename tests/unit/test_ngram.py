# SPDX-License-Identifier: Apache-2.0
"""Drafts by n-gram lookup."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms import current_platform

from adadecode_vllm.engine.ngram import NgramLookup
from adadecode_vllm.engine.ngram_kernel import PLACES
from adadecode_vllm.method.evidence import MOST_MATCHES, Agreement, evidence
from adadecode_vllm.method.lookup import NOTHING, Continuation, Query
from adadecode_vllm.method.stats import Stats
from adadecode_vllm.patches import llvmlite_library

CONTEXT = [7, 1, 2, 3, 4, 5, 9, 1, 2]
VOCABULARY = 20
DIVIDED, LIKELY, UNANIMOUS = Agreement


@pytest.fixture(scope="module")
def lookup() -> NgramLookup:
    return NgramLookup(max_model_len=16, vocab_size=VOCABULARY)


def find(
    lookup: NgramLookup,
    most: int,
    stops: tuple[int, ...] = (),
    context: list[int] = CONTEXT,
    fewest: int = 2,
    drafts: tuple[int, ...] = (),
) -> Continuation:
    return lookup.find(
        Query("a", np.array(context, np.int32), drafts, fewest, most, stops)
    )


def kinds(matches: int, *agreements: Agreement) -> list[int]:
    """Evidence of tokens one behind the other."""
    return [evidence(matches + n, own) for n, own in enumerate(agreements)]


def test_what_followed_the_same_tokens_is_drafted(lookup: NgramLookup) -> None:
    three = kinds(2, LIKELY, LIKELY, LIKELY)
    assert find(lookup, 3) == ([3, 4, 5], three)
    assert find(lookup, 1) == ([3], three[:1])
    # Behind drafts, as if they were verified.
    assert find(lookup, 2, drafts=(3,)) == ([4, 5], three[1:])
    assert find(lookup, 3, drafts=(8,)) == NOTHING
    # One token alone is no reason, except where one is enough.
    assert find(lookup, 3, context=[5, 2, 8, 2]) == NOTHING
    found = find(lookup, 2, context=[5, 2, 8, 2], fewest=1)
    assert found == ([8, 2], kinds(1, LIKELY, LIKELY))
    assert find(lookup, 3, context=[5]) == NOTHING
    assert find(lookup, 0) == NOTHING


def test_places_vote(lookup: NgramLookup) -> None:
    # Two of three say 3; behind that they part, and the more recent one decides.
    found = find(lookup, 2, context=[1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 6, 1, 2])
    assert found == ([3, 5], kinds(2, LIKELY, DIVIDED))
    found = find(lookup, 2, context=[1, 2, 3, 4, 1, 2, 3, 5, 1, 2])
    assert found == ([3, 5], kinds(2, UNANIMOUS, DIVIDED))
    found = find(lookup, 1, context=[1, 2, 3, 4, 1, 2, 5, 1, 2, 6, 1, 2])
    assert found == ([6], kinds(2, DIVIDED))
    # A longer match counts alone, however many others there are.
    found = find(lookup, 1, context=[7, 1, 2, 3, 4, 1, 2, 5, 1, 2, 5, 7, 1, 2])
    assert found == ([3], kinds(3, LIKELY))


def test_text_that_repeats_itself_goes_on(lookup: NgramLookup) -> None:
    found = find(lookup, 6, context=[5, 1, 2, 1, 2])
    assert found == ([1, 2, 1, 2, 1, 2], kinds(2, *[LIKELY] * 6))


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.lists(st.integers(0, 3), max_size=4),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_as_the_definition_says(
    context: list[int], drafts: list[int], fewest: int, most: int
) -> None:
    """The search and the votes again, in plain Python."""
    found = find(NgramLookup(80, 20), most, (), context, fewest, tuple(drafts))
    text, expected = [*context, *drafts], Continuation([], [])
    places = [
        (matches, end)
        for end in range(len(text) - 1, 0, -1)
        if (matches := _matches(text, end)) >= fewest
    ]
    longest = max(places, default=(0, 0))[0]
    votes = [end for matches, end in places if matches == longest][:PLACES]
    while votes and len(expected.token_ids) < most:
        said = [text[place] for place in votes]
        token = max(said, key=said.count)
        agreement = LIKELY
        if 2 * said.count(token) <= len(said):
            agreement = DIVIDED
        elif said.count(token) == len(said) > 1:
            agreement = UNANIMOUS
        text.append(token)
        expected.token_ids.append(token)
        expected.evidence.append(evidence(longest, agreement))
        longest += 1
        votes = [place + 1 for place in votes if text[place] == token]
    assert found == expected


def _matches(text: list[int], end: int) -> int:
    """How many tokens before a place are the last ones."""
    matches = 0
    while (
        matches < min(end, MOST_MATCHES)
        and text[end - 1 - matches] == text[-1 - matches]
    ):
        matches += 1
    return matches


def test_nothing_is_drafted_past_the_models_length(lookup: NgramLookup) -> None:
    context = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1, 2]
    assert find(lookup, 5, context=context).token_ids == [3, 4]
    assert find(lookup, 5, context=[*context, 3], drafts=(4,)) == NOTHING
    assert find(lookup, 5, context=[*context, 3, 4], drafts=(5,)) == NOTHING


def test_nothing_follows_a_token_that_ends_the_text(lookup: NgramLookup) -> None:
    found = find(lookup, 3, stops=(4,))
    assert found == ([3, 4], kinds(2, LIKELY, LIKELY))


def test_nothing_is_drafted_that_has_no_logit(lookup: NgramLookup) -> None:
    """A prompt may hold ids that only the tokenizer knows."""
    unknown, last = VOCABULARY, VOCABULARY - 1
    found = find(lookup, 3, context=[1, 2, last, unknown, 3, 1, 2])
    assert found == ([last], kinds(2, LIKELY))
    assert find(lookup, 3, context=[1, 2, unknown, 3, 1, 2]) == NOTHING
    # Behind one of them, what followed is as good as any other.
    assert find(lookup, 1, context=[1, unknown, 3, 1, unknown]).token_ids == [3]


def test_acceptance_tells_exits_from_lookups() -> None:
    stats = Stats(exit_layers=(2, 5), num_layers=8)
    exits = np.array([1, -2, -3], np.int8)
    stats.record_acceptance(exits, 3)
    stats.record_acceptance(exits, 1)
    stats.record_acceptance(exits, 0)
    assert stats.accepted.tolist() == [0, 2]
    assert stats.rejected.tolist() == [0, 1]
    assert (stats.ngram_accepted, stats.ngram_rejected) == (2, 1)


def test_llvmlite_still_has_every_attribute() -> None:
    """Once it has not, `patches/llvmlite_library.py` can go."""
    from llvmlite.binding import ffi

    llvmlite_library.install()
    llvmlite_library.install()
    patched = type(ffi.lib).__getattr__
    assert not hasattr(ffi.lib, "__dict__")
    assert callable(ffi.lib.LLVMPY_GetVersionInfo)
    original = patched._adadecode_original
    assert not isinstance(original(ffi.lib, "__dict__"), dict)


def test_workers_set_themselves_up_after_numba(lookup: NgramLookup) -> None:
    """vLLM looks through all modules then."""
    current_platform.register_triton_kernel_overrides()
