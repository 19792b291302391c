# SPDX-License-Identifier: Apache-2.0
"""Early predictions and n-gram lookup in one window."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np

from adadecode_vllm.method.admission import AcceptanceRecord
from adadecode_vllm.method.cycle import DraftRequests
from adadecode_vllm.method.drafting import Drafter
from adadecode_vllm.method.ledger import Window
from adadecode_vllm.method.stats import Stats


class Lookup(Protocol):
    """Finds what followed the same tokens before."""

    def extend(
        self,
        context: np.ndarray,
        early: Sequence[int],
        most: int,
        stop_token_ids: Collection[int],
    ) -> list[int]:
        """Draft what followed the same last tokens earlier in a request.

        Args:
            context: (n,) int32, the request's verified tokens.
            early: Its early predictions, which follow them.
            most: Most tokens to draft.
            stop_token_ids: Tokens after which nothing will be kept.

        Returns:
            0 .. ``most`` tokens.
        """


class Drafts(NamedTuple):
    """A request's drafts.

    Attributes:
        token_ids: m tokens.
        exits: (m,) int8, the exit of each; -1 for those by n-gram lookup.
        expected: (m,) float64, how probably each early prediction is accepted where
            those before it are; None where nobody asks.
    """

    token_ids: list[int]
    exits: np.ndarray
    expected: np.ndarray | None = None


class CombinedDrafter:
    """Drafts with the exits and by lookup, each where it is its turn."""

    def __init__(
        self,
        drafter: Drafter,
        record: AcceptanceRecord,
        stats: Stats,
        lookup: Callable[[], Lookup],
    ) -> None:
        """Wire the sources of drafts.

        Args:
            drafter: Drafts with the exits.
            record: What became of requests' drafts.
            stats: Counters to add to.
            lookup: Returns what looks up, once a request wants it.
        """
        self._drafter = drafter
        self._record = record
        self._stats = stats
        self._lookup = lookup

    def draft(
        self, request_ids: Sequence[str], requests: DraftRequests
    ) -> tuple[Window, list[Drafts]]:
        """One drafting cycle.

        Args:
            request_ids: R request ids.
            requests: Their state. All of them go on.

        Returns:
            The windows with the early predictions, and each request's drafts: early
            predictions, then those by n-gram lookup.
        """
        looked_up = self._look_up_first(requests)
        if found := [row for row, tail in looked_up.items() if tail]:
            # What was found costs no layer: the exits are skipped.
            limits = requests.limits.copy()
            limits[found] = 0
            requests = replace(requests, limits=limits)
        if (admission := requests.admission) is not None:
            for row in np.flatnonzero((requests.limits > 0) & admission.use_exits):
                self._record.record_scoring(request_ids[row], admission.least[row])
        window = self._drafter.draft(requests)
        drafts: list[Drafts] = []
        for row in range(len(request_ids)):
            predicted = slice(1, window.length[row])
            early = window.token_ids[row, predicted].tolist()
            exits = window.exits[row, predicted]
            expected = window.expected
            if expected is not None:
                expected = expected[row, predicted]
            if early or row not in looked_up:
                tail = self._look_up(requests, row, early, expected)
            else:
                tail = looked_up[row]
            if tail:
                exits = np.concatenate((exits, np.full(len(tail), -1, exits.dtype)))
                if expected is not None:
                    expected = np.concatenate((expected, np.ones(len(tail))))
            drafts.append(Drafts(early + tail, exits, expected))
        return window, drafts

    def _look_up_first(self, requests: DraftRequests) -> dict[int, list[int]]:
        """Drafts, if any, of the requests whose lookup comes before the exits."""
        if requests.lookup_first is None:
            return {}
        return {
            int(row): self._look_up(requests, row, [], None)
            for row in np.flatnonzero(requests.lookup_first)
        }

    def _look_up(
        self,
        requests: DraftRequests,
        row: int,
        early: list[int],
        expected: np.ndarray | None,
    ) -> list[int]:
        """Drafts by n-gram lookup behind a request's early predictions."""
        context = None if requests.contexts is None else requests.contexts[row]
        if context is None:
            return []
        most = int(requests.limits[row]) - len(early)
        if (admission := requests.admission) is not None:
            survival = 1.0 if expected is None else admission.survival(row, expected)
            most = admission.looked_up(row, survival, most)
        tail = self._lookup().extend(context, early, most, requests.stop_token_ids[row])
        self._stats.ngram_drafts += len(tail)
        return tail
