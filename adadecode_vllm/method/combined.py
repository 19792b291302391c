# SPDX-License-Identifier: Apache-2.0
"""Early predictions and n-gram lookup together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from adadecode_vllm.method.admission import AcceptanceRecord
from adadecode_vllm.method.cycle import DraftRequests
from adadecode_vllm.method.drafting import Drafter
from adadecode_vllm.method.ledger import Window
from adadecode_vllm.method.lookup import (
    NOTHING,
    Candidates,
    Contexts,
    Continuation,
    Lookup,
)
from adadecode_vllm.method.stats import Stats


class Drafts(NamedTuple):
    """A request's drafts.

    Attributes:
        token_ids: m tokens.
        exits: (m,) int8, the exit of each. For those by n-gram lookup, -1 less the
            evidence for it.
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
            The windows, and each request's drafts: those of its window, then what was
            looked up behind them.
        """
        contexts = None
        if requests.contexts:
            contexts = Contexts(request_ids, requests, self._lookup)
        none = np.empty(0, np.int64)
        first: dict[int, Continuation] = {}
        candidates = None
        if contexts is not None:
            first = {
                row: self._as_far_as_it_pays(requests, row, contexts.find(row, none))
                for row, way in enumerate(contexts.ways)
                if way == "first"
            }
            if "chain" in contexts.ways:
                candidates = Candidates(contexts)
        if found := [row for row, tail in first.items() if tail.token_ids]:
            # What was found costs no layer: the exits are skipped.
            limits = requests.limits.copy()
            limits[found] = 0
            requests = replace(requests, limits=limits)
        window = self._drafter.draft(requests, candidates)
        self._record_scoring(request_ids, requests, window)
        drafts: list[Drafts] = []
        for row, length in enumerate(window.length.tolist()):
            in_window = slice(1, length)
            tokens = window.token_ids[row, in_window]
            exits = window.exits[row, in_window]
            expected = window.expected
            if expected is not None:
                expected = expected[row, in_window]
            self._stats.ngram_drafts += int(np.count_nonzero(exits < 0))
            tail = first.get(row, NOTHING)
            if contexts is not None and (len(tokens) or row not in first):
                behind = None
                if candidates is not None:
                    behind = candidates.found_behind(row, len(tokens))
                if behind is None:
                    behind = contexts.find(row, tokens)
                survival = 1.0 if window.survival is None else window.survival[row]
                tail = self._as_far_as_it_pays(requests, row, behind, float(survival))
            if tail.token_ids:
                by_lookup = -1 - np.array(tail.evidence, exits.dtype)
                exits = np.concatenate((exits, by_lookup))
                if expected is not None:
                    expected = np.concatenate((expected, np.ones(len(by_lookup))))
            drafts.append(Drafts(tokens.tolist() + tail.token_ids, exits, expected))
        if all(
            len(own.exits) == length - 1
            for own, length in zip(drafts, window.length, strict=True)
        ):
            window = self._drafter.prefetch() or window
        return window, drafts

    def _record_scoring(
        self,
        request_ids: Sequence[str],
        requests: DraftRequests,
        window: Window,
    ) -> None:
        """Note the requests that the exits scored for."""
        if (admission := requests.admission) is None:
            return
        assert window.asking_cost is not None, "costs decide for some"
        for row in np.flatnonzero(window.asking_cost).tolist():
            self._record.record_scoring(
                request_ids[row],
                float(admission.least[row]),
                float(window.asking_cost[row]),
            )

    def _as_far_as_it_pays(
        self,
        requests: DraftRequests,
        row: int,
        found: Continuation,
        survival: float = 1.0,
    ) -> Continuation:
        """What to draft of what was found behind a request's other drafts.

        Args:
            requests: The requests.
            row: The request.
            found: What was found.
            survival: The probability that all drafts before it are right.
        """
        if found.token_ids and (admission := requests.admission) is not None:
            pays = admission.looked_up(row, survival, found.evidence)
            found = Continuation(found.token_ids[:pays], found.evidence[:pays])
        self._stats.ngram_drafts += len(found.token_ids)
        return found
