# SPDX-License-Identifier: Apache-2.0
"""Drafts that follow the early predictions: what came after the same tokens before."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from adadecode_vllm.config import Ngram
from adadecode_vllm.patches import llvmlite_library

MIN_NGRAM = 2
MAX_NGRAM = 5
"""Last tokens that must have occurred before, and how many are compared."""


def contexts_of(
    lookups: Sequence[Ngram],
    token_ids: np.ndarray,
    rows: np.ndarray,
    positions: np.ndarray,
) -> tuple[list[np.ndarray | None], np.ndarray]:
    """What :class:`DraftRequests` says of lookups.

    Args:
        lookups: R requests' ways.
        token_ids: (max_requests, max_model_len) int32, verified tokens by row.
        rows: (R,) int64, the requests' rows in it.
        positions: (R,) int64, positions of their newest tokens.

    Returns:
        ``contexts`` and ``lookup_first``.
    """
    contexts = [
        None if way == "off" else token_ids[row, : position + 1]
        for row, position, way in zip(rows, positions, lookups, strict=True)
    ]
    return contexts, np.array([way == "first" for way in lookups])


class NgramTail:
    """vLLM's n-gram lookup (prompt lookup decoding) behind a request's window."""

    def __init__(self, max_model_len: int) -> None:
        """Compile the lookup, which takes vLLM a second at the first time.

        Args:
            max_model_len: The model's length.
        """
        # Loads numba, which only engines with this option shall wait for.
        from vllm.v1.spec_decode import ngram_proposer

        llvmlite_library.install()
        self._lookup = ngram_proposer._find_longest_matched_ngram_and_propose_tokens
        self._max_model_len = max_model_len
        self.extend(np.zeros(MIN_NGRAM, np.int32), [], 1, ())

    def extend(
        self,
        context: np.ndarray,
        early: Sequence[int],
        most: int,
        stop_token_ids: Collection[int],
    ) -> list[int]:
        """Draft by lookup; see :class:`adadecode_vllm.method.combined.Lookup`."""
        if most <= 0 or (early and early[-1] in stop_token_ids):
            return []
        if early:
            context = np.concatenate((context, np.array(early, context.dtype)))
        drafts = self._lookup(
            context, MIN_NGRAM, MAX_NGRAM, self._max_model_len, most
        ).tolist()
        for index, token in enumerate(drafts):
            if token in stop_token_ids:
                return drafts[: index + 1]
        return drafts
