# SPDX-License-Identifier: Apache-2.0
"""Lookup in suffix trees by arctic-inference: also what earlier answers said."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec

import numpy as np

from adadecode_vllm.method.evidence import Agreement, evidence
from adadecode_vllm.method.lookup import NOTHING, Continuation, Query, verifiable_part

TREE_DEPTH = 24
CACHED_ANSWERS = 10_000
LEAST_PROBABILITY = 0.1
"""vLLM's defaults for suffix decoding: most tokens of a match and its continuation,
answers that are remembered, and how often what follows must have followed before."""

CACHED_TOKENS = 1_000_000
"""Most tokens of all answers that are remembered, however few they are."""


def is_installed() -> bool:
    """Whether there is arctic-inference."""
    return find_spec("arctic_inference") is not None


class SuffixLookup:
    """Suffix trees of each running request, and one of all answers.

    A lookup takes the same time whatever a request's length.
    """

    def __init__(self, vocab_size: int) -> None:
        """Start without any text.

        Args:
            vocab_size: How many logits the model has.
        """
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self._cache = SuffixDecodingCache(TREE_DEPTH, CACHED_ANSWERS)
        self._vocab_size = vocab_size
        # By request, how many of its tokens the trees have, and had at first.
        self._known: dict[str, int] = {}
        self._first: dict[str, int] = {}
        # Tokens of finished answers that the common tree keeps, oldest first.
        self._answers: dict[str, int] = {}
        self._kept = 0

    def find(self, query: Query) -> Continuation:
        """Look up; see :class:`adadecode_vllm.method.lookup.Lookup`."""
        self._follow(query.request_id, query.context)
        last = (*query.context[-TREE_DEPTH:].tolist(), *query.drafts)[-TREE_DEPTH:]
        found = self._cache.speculate(
            query.request_id,
            last,
            max_spec_tokens=query.most,
            min_token_prob=LEAST_PROBABILITY,
        )
        tokens = verifiable_part(
            list(found.token_ids), query.stop_token_ids, self._vocab_size
        )
        if not tokens or found.match_len < query.fewest_matches:
            return NOTHING
        # How often each of them followed elsewhere, the trees do not tell.
        matches = range(found.match_len, found.match_len + len(tokens))
        return Continuation(tokens, [evidence(n, Agreement.LIKELY) for n in matches])

    def _follow(self, request_id: str, context: np.ndarray) -> None:
        """Take in a request's new tokens."""
        known = self._known.get(request_id)
        if known is None or known > len(context):
            self._begin(request_id, context)
        elif known < len(context):
            self._cache.add_active_response(request_id, context[known:].tolist())
        self._known[request_id] = len(context)

    def _begin(self, request_id: str, context: np.ndarray) -> None:
        """Start a request, whose name may have been that of another one."""
        self.forget([request_id])
        self._evict(request_id)
        self._cache.start_request(request_id, context.tolist())
        self._first[request_id] = len(context)

    def forget(self, request_ids: Collection[str]) -> None:
        """Release the prompts of finished requests; their answers stay for others."""
        # In the same order on every rank, so that all evict the same answers (I7).
        for request_id in sorted(request_ids):
            known = self._known.pop(request_id, None)
            if known is None:
                continue
            self._cache.stop_request(request_id)
            if answer := known - self._first.pop(request_id):
                self._answers[request_id] = answer
                self._kept += answer
        while self._kept > CACHED_TOKENS:
            self._evict(next(iter(self._answers)))

    def forget_answers(self) -> None:
        """Let go of all answers, and look in each request alone from now on.

        For measurements, which ask for the same texts again and again.
        """
        self._cache = type(self._cache)(TREE_DEPTH, 0)
        self._known.clear()
        self._first.clear()
        self._answers.clear()
        self._kept = 0

    def _evict(self, request_id: str) -> None:
        """Let go of a finished answer, if it is remembered."""
        self._kept -= self._answers.pop(request_id, 0)
        if request_id in self._cache.cached_requests:
            self._cache.evict_cached_response(request_id)
