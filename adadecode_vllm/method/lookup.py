# SPDX-License-Identifier: Apache-2.0
"""Drafts by lookup: what followed the same tokens before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from adadecode_vllm.method.cycle import DraftRequests

FEWEST_MATCHES = 2
"""Last tokens that must have occurred before; for `chain`, which knows what a match is
worth, one is enough."""


class Continuation(NamedTuple):
    """What followed the same tokens before.

    Attributes:
        token_ids: 0 or more tokens.
        evidence: As many: what speaks for each where those before it are right; see
            :mod:`adadecode_vllm.method.evidence`.
    """

    token_ids: list[int]
    evidence: list[int]


NOTHING = Continuation([], [])


def verifiable_part(
    token_ids: list[int], stop_token_ids: Collection[int], vocab_size: int
) -> list[int]:
    """Tokens up to the first one after which nothing will be kept.

    They end before one without a logit, too: a prompt may hold ids of a tokenizer that
    knows more tokens than the model.
    """
    for index, token in enumerate(token_ids):
        if token >= vocab_size:
            return token_ids[:index]
        if token in stop_token_ids:
            return token_ids[: index + 1]
    return token_ids


class Query(NamedTuple):
    """What to look up.

    Attributes:
        request_id: The request.
        context: (n,) int32, its verified tokens.
        drafts: Those behind them.
        fewest_matches: Last tokens that must have occurred before.
        most: Most tokens to draft.
        stop_token_ids: Tokens after which nothing will be kept.
    """

    request_id: str
    context: np.ndarray
    drafts: Sequence[int]
    fewest_matches: int
    most: int
    stop_token_ids: Collection[int]


class Lookup(Protocol):
    """Finds what followed the same tokens before."""

    def find(self, query: Query) -> Continuation:
        """The tokens that followed where most of the last ones match."""

    def forget(self, request_ids: Collection[str]) -> None:
        """Release what is remembered of finished requests."""


class Contexts:
    """Requests' tokens, to look up in.

    Attributes:
        ways: R strings, how requests look up: `first`, `tail`, `chain` or `off`.
    """

    def __init__(
        self,
        request_ids: Sequence[str],
        requests: DraftRequests,
        lookup: Callable[[], Lookup],
    ) -> None:
        """Start with what is verified.

        Args:
            request_ids: R request ids.
            requests: Their state.
            lookup: Returns what looks up, once a request wants it.
        """
        size = len(requests.rows)
        self.ways: Sequence[str] = requests.ways or ["off"] * size
        self._request_ids = request_ids
        self._requests = requests
        self._lookup = lookup
        self._by_costs = (~np.isnan(requests.least)).tolist()

    def find(self, request: int, drafts: np.ndarray) -> Continuation:
        """Look up behind a request's drafts.

        Args:
            request: The request.
            drafts: (m,) its drafts so far.

        Returns:
            What to draft next, up to its limit.
        """
        contexts = self._requests.contexts
        context = None if contexts is None else contexts[request]
        most = int(self._requests.limits[request]) - len(drafts)
        stops = self._requests.stop_token_ids[request]
        if context is None or most < 1 or (len(drafts) and drafts[-1] in stops):
            return NOTHING
        one_is_enough = self._by_costs[request] and self.ways[request] == "chain"
        return self._lookup().find(
            Query(
                self._request_ids[request],
                context,
                drafts.tolist(),
                1 if one_is_enough else FEWEST_MATCHES,
                most,
                stops,
            )
        )

    def promise(self, request: int, found: Continuation) -> float:
        """How probably the first token that was found is right.

        Args:
            request: The request.
            found: What was found for it.

        Returns:
            The probability; -1 for nothing, or where thresholds decide.
        """
        admission = self._requests.admission
        if admission is None or not self._by_costs[request] or not found.token_ids:
            return -1.0
        return float(admission.lookup[request, found.evidence[0]])


class Candidates:
    """What the lookup says of the next tokens of requests that draft token by token.

    Attributes:
        token_ids: (R,) int64, by request, the token; -1 for none.
        evidence: (R,) int64, what speaks for it; see `Continuation`.
        promises: (R,) float64, how probably it is right where the drafts before it are;
            -1 for none, or where thresholds decide.
        sure: (R,) bool, where no exit shall score in its place.
    """

    def __init__(self, contexts: Contexts) -> None:
        """Start without any; `contexts` says what to look up in."""
        size = len(contexts.ways)
        self.token_ids = np.full(size, -1, np.int64)
        self.evidence = np.zeros(size, np.int64)
        self.promises = np.full(size, -1.0)
        self.sure = np.zeros(size, bool)
        self._contexts = contexts
        # By request, after how many drafts it was looked up last, and what was found.
        self._found: dict[int, tuple[int, Continuation]] = {}
        # Tokens of the window behind which was looked up last; more than there will be
        # where nothing is to be looked up here.
        all_seen = np.iinfo(np.int64).max
        self._seen = [0 if way == "chain" else all_seen for way in contexts.ways]

    def found_behind(self, request: int, drafts: int) -> Continuation | None:
        """What was found behind so many drafts; None where that was not looked up."""
        behind, found = self._found.get(request, (-1, NOTHING))
        return found if behind == drafts else None

    def look_up(
        self,
        requests: np.ndarray,
        token_ids: np.ndarray,
        length: np.ndarray,
        sure: float,
    ) -> None:
        """Find what follows the drafts of some requests.

        Args:
            requests: (r,) int64, the requests.
            token_ids: (R, W) int64, the windows of all.
            length: (R,) int64, their tokens that count.
            sure: Probability of a draft by lookup from which on no exit shall score in
                its place.
        """
        for request, tokens in zip(
            requests.tolist(), length[requests].tolist(), strict=True
        ):
            if tokens <= self._seen[request]:
                continue
            self._seen[request] = tokens
            found = self._contexts.find(request, token_ids[request, 1:tokens])
            self._found[request] = tokens - 1, found
            self.token_ids[request] = -1
            if found.token_ids:
                self.token_ids[request] = found.token_ids[0]
                self.evidence[request] = found.evidence[0]
            promise = self._contexts.promise(request, found)
            self.promises[request] = promise
            self.sure[request] = promise >= sure
