# SPDX-License-Identifier: Apache-2.0
"""The search behind n-gram lookup, compiled by numba."""

from __future__ import annotations

import numpy as np
from numba import njit

from adadecode_vllm.method.evidence import MOST_MATCHES, Agreement, evidence
from adadecode_vllm.patches import llvmlite_library

# Before another worker sets itself up in this process.
llvmlite_library.install()

PLACES = 16
"""Most places that vote, the most recent ones."""

_evidence = njit(evidence)


@njit
def continuation(
    context: np.ndarray, drafts: np.ndarray, fewest: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find what followed where most of the last tokens match.

    Of the places with the longest match, the most recent ones vote on the next token;
    the most recent one decides a draw. Those that name another token drop out, and the
    rest votes on the token behind it. A place may run on into what was just found, as
    text that repeats itself does.

    Args:
        context: (n,) int32, n >= 1.
        drafts: (m,) int32, the tokens behind it.
        fewest: Tokens that must match, 1 or more.
        most: Most tokens to find.

    Returns:
        (k,) int32 tokens, and the evidence for each, (k,) int64; none without a match.
    """
    size = len(context) + len(drafts)
    most = max(most, 0)
    text = np.empty(size + most, np.int32)
    # As slices, these would take numba a second and a half more to compile.
    for index in range(len(context)):
        text[index] = context[index]
    for index in range(len(drafts)):
        text[len(context) + index] = drafts[index]
    places = np.empty(PLACES, np.int64)
    count, matches = 0, fewest
    for end in range(size - 2, -1, -1):
        length = 0
        while (
            length < MOST_MATCHES
            and length <= end
            and text[end - length] == text[size - 1 - length]
        ):
            length += 1
        if length > matches:
            count, matches = 0, length
        if length == matches and count < PLACES:
            places[count] = end + 1
            count += 1
    kinds = np.empty(most, np.int64)
    found = 0
    while found < most and count:
        votes, token = 0, text[places[0]]
        for place in places[:count]:
            same = 0
            for other in places[:count]:
                same += text[other] == text[place]
            if same > votes:
                votes, token = same, text[place]
        if 2 * votes <= count:
            agreement = Agreement.DIVIDED
        elif votes == count > 1:
            agreement = Agreement.UNANIMOUS
        else:
            agreement = Agreement.LIKELY
        kinds[found] = _evidence(matches, agreement)
        text[size + found] = token
        found += 1
        matches += 1
        kept = 0
        for place in places[:count]:
            if text[place] == token:
                places[kept] = place + 1
                kept += 1
        count = kept
    return text[size : size + found], kinds[:found]
