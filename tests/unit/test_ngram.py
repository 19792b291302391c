# SPDX-License-Identifier: Apache-2.0
"""Drafts by n-gram lookup behind early predictions."""

from __future__ import annotations

import numpy as np
import pytest
from vllm.platforms import current_platform

from adadecode_vllm.engine.ngram import NgramTail
from adadecode_vllm.method.stats import Stats
from adadecode_vllm.patches import llvmlite_library

CONTEXT = [7, 1, 2, 3, 4, 5, 9, 1, 2]


@pytest.fixture(scope="module")
def tail() -> NgramTail:
    return NgramTail(max_model_len=16)


def extend(
    tail: NgramTail,
    early: list[int],
    most: int,
    stops: tuple[int, ...] = (),
    context: list[int] = CONTEXT,
) -> list[int]:
    return tail.extend(np.array(context, np.int32), early, most, stops)


def test_what_followed_the_same_tokens_is_drafted(tail: NgramTail) -> None:
    assert extend(tail, [], 3) == [3, 4, 5]
    assert extend(tail, [], 1) == [3]
    assert extend(tail, [], 0) == []
    # Behind early predictions, as if they were verified.
    assert extend(tail, [3], 2) == [4, 5]
    assert extend(tail, [3, 4], 3) == [5, 9, 1]
    assert extend(tail, [8], 3) == []
    # One token alone is no reason.
    assert extend(tail, [], 3, context=[5, 2, 8, 2]) == []
    assert extend(tail, [], 3, context=[5]) == []


def test_nothing_is_drafted_past_the_models_length(tail: NgramTail) -> None:
    context = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1, 2]
    assert extend(tail, [], 5, context=context) == [3, 4]


def test_nothing_follows_a_token_that_ends_the_text(tail: NgramTail) -> None:
    assert extend(tail, [], 3, stops=(4,)) == [3, 4]
    assert extend(tail, [3], 2, stops=(3,)) == []


def test_acceptance_tells_exits_from_lookups() -> None:
    stats = Stats(exit_layers=(2, 5), num_layers=8)
    exits = np.array([1, -1, -1], np.int8)
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


def test_workers_set_themselves_up_after_numba(tail: NgramTail) -> None:
    """vLLM looks through all modules then."""
    current_platform.register_triton_kernel_overrides()
