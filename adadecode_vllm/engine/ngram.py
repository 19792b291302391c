# SPDX-License-Identifier: Apache-2.0
"""n-gram lookup: what came after the same tokens before."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from adadecode_vllm.config import Ngram
from adadecode_vllm.method.lookup import Continuation, Query, verifiable_part


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
    """Prompt lookup decoding: what followed where most of the last tokens match.

    vLLM's own lookup takes the earliest such place and does not tell how many there
    are. Here the most recent places vote, and how they agree is part of the evidence.
    """

    def __init__(self, max_model_len: int, vocab_size: int) -> None:
        """Compile the lookup, which takes half a second at the first time.

        Args:
            max_model_len: The model's length.
            vocab_size: How many logits the model has.
        """
        # Loads numba, which only engines with this option shall wait for.
        from adadecode_vllm.engine import ngram_kernel

        self._continue = ngram_kernel.continuation
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self.find(Query("", np.zeros(2, np.int32), (), 1, 1, ()))

    def find(self, query: Query) -> Continuation:
        """Look up in the request; see :class:`adadecode_vllm.method.lookup.Lookup`."""
        drafts = np.array(query.drafts, np.int32)
        room = self._max_model_len - len(query.context) - len(drafts)
        found, evidence = self._continue(
            query.context, drafts, query.fewest_matches, min(query.most, room)
        )
        tokens = verifiable_part(found.tolist(), query.stop_token_ids, self._vocab_size)
        return Continuation(tokens, evidence[: len(tokens)].tolist())

    def forget(self, request_ids: Collection[str]) -> None:
        """Nothing: it remembers no request."""
