# SPDX-License-Identifier: Apache-2.0
"""Drafts by n-gram lookup."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms import current_platform

from adadecode_vllm.engine.ngram import NgramLookup
from adadecode_vllm.method.admission import MOST_MATCHES
from adadecode_vllm.method.lookup import NOTHING, Continuation, Query
from adadecode_vllm.method.stats import Stats
from adadecode_vllm.patches import llvmlite_library

CONTEXT = [7, 1, 2, 3, 4, 5, 9, 1, 2]
VOCABULARY = 20


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


def test_what_followed_the_same_tokens_is_drafted(lookup: NgramLookup) -> None:
    assert find(lookup, 3) == ([3, 4, 5], 2)
    assert find(lookup, 1) == ([3], 2)
    # Behind drafts, as if they were verified.
    assert find(lookup, 2, drafts=(3,)) == ([4, 5], 3)
    assert find(lookup, 3, drafts=(8,)) == NOTHING
    # One token alone is no reason, except where one is enough.
    assert find(lookup, 3, context=[5, 2, 8, 2]) == NOTHING
    assert find(lookup, 3, context=[5, 2, 8, 2], fewest=1) == ([8, 2], 1)
    assert find(lookup, 3, context=[5]) == NOTHING


@given(st.lists(st.integers(0, 3), min_size=2, max_size=16), st.integers(1, 3))
def test_matches_are_counted(
    lookup: NgramLookup, context: list[int], fewest: int
) -> None:
    found = find(lookup, 1, context=context, fewest=fewest)

    def occurs(matches: int) -> bool:
        last = context[-matches:]
        return any(
            context[start : start + matches] == last
            for start in range(len(context) - matches)
        )

    longest = max(
        (n for n in range(1, min(len(context), MOST_MATCHES + 1)) if occurs(n)),
        default=0,
    )
    if len(context) == 16:  # the model's length
        assert found == NOTHING
    else:
        assert found.matches == (longest if longest >= fewest else 0)


def test_nothing_is_drafted_past_the_models_length(lookup: NgramLookup) -> None:
    context = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1, 2]
    assert find(lookup, 5, context=context).token_ids == [3, 4]


def test_nothing_follows_a_token_that_ends_the_text(lookup: NgramLookup) -> None:
    assert find(lookup, 3, stops=(4,)).token_ids == [3, 4]


def test_nothing_is_drafted_that_has_no_logit(lookup: NgramLookup) -> None:
    """A prompt may hold ids that only the tokenizer knows."""
    unknown, last = VOCABULARY, VOCABULARY - 1
    assert find(lookup, 3, context=[1, 2, last, unknown, 3, 1, 2]) == ([last], 2)
    assert find(lookup, 3, context=[1, 2, unknown, 3, 1, 2]) == NOTHING
    # Behind one of them, what followed is as good as any other.
    assert find(lookup, 1, context=[1, unknown, 3, 1, unknown]) == ([3], 2)


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
