# SPDX-License-Identifier: Apache-2.0
"""n-gram lookup by vLLM: what came after the same tokens before."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from adadecode_vllm.config import Ngram
from adadecode_vllm.method.admission import MOST_MATCHES
from adadecode_vllm.method.lookup import NOTHING, Continuation, Query, verifiable_part
from adadecode_vllm.patches import llvmlite_library


def contexts_of(
    lookups: Sequence[Ngram],
    token_ids: np.ndarray,
    rows: np.ndarray,
    positions: np.ndarray,
) -> list[np.ndarray | None]:
    """The ``contexts`` of :class:`DraftRequests`.

    Args:
        lookups: R requests' ways.
        token_ids: (max_requests, max_model_len) int32, verified tokens by row.
        rows: (R,) int64, the requests' rows in it.
        positions: (R,) int64, positions of their newest tokens.

    Returns:
        R requests' verified tokens; None for those that look nothing up.
    """
    return [
        None if way == "off" else token_ids[row, : position + 1]
        for row, position, way in zip(rows, positions, lookups, strict=True)
    ]


class NgramLookup:
    """vLLM's n-gram lookup (prompt lookup decoding)."""

    def __init__(self, max_model_len: int, vocab_size: int) -> None:
        """Compile the lookup, which takes vLLM a second at the first time.

        Args:
            max_model_len: The model's length.
            vocab_size: How many logits the model has.
        """
        # Loads numba, which only engines with this option shall wait for.
        from vllm.v1.spec_decode import ngram_proposer

        llvmlite_library.install()
        self._lookup = ngram_proposer._find_longest_matched_ngram_and_propose_tokens
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self.find(Query("", np.zeros(2, np.int32), (), 1, 1, ()))

    def find(self, query: Query) -> Continuation:
        """Look up in the request; see :class:`adadecode_vllm.method.lookup.Lookup`."""
        context = query.context
        if query.drafts:
            context = np.concatenate((context, np.array(query.drafts, context.dtype)))
        found = self._lookup(
            context,
            query.fewest_matches,
            MOST_MATCHES,
            self._max_model_len,
            query.most,
        )
        tokens = verifiable_part(found.tolist(), query.stop_token_ids, self._vocab_size)
        if not tokens:
            return NOTHING
        return Continuation(tokens, _matches(context, found, query.fewest_matches))

    def forget(self, request_ids: Collection[str]) -> None:
        """Nothing: it remembers no request."""


def _matches(context: np.ndarray, found: np.ndarray, fewest: int) -> int:
    """How many tokens before what was found are the context's last ones.

    vLLM returns a part of the context itself, so its address tells where it begins.
    """
    start = (_address(found) - _address(context)) // context.itemsize
    if not fewest <= start < len(context):
        return fewest
    matches = fewest
    while (
        matches < min(start, MOST_MATCHES)
        and context[start - 1 - matches] == context[-1 - matches]
    ):
        matches += 1
    return matches


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
