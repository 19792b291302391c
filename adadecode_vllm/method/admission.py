# SPDX-License-Identifier: Apache-2.0
"""From when on a draft pays, and how far probabilities of acceptance can be trusted."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

_PRIOR_DRAFTS = 4.0
"""What is known of all requests weighs as much as so many drafts of one of them."""

_MEMORY = 256.0
"""Verified drafts by lookup that the engine's record remembers."""

_TRUST = (0.2, 1.25)

_SCORING_COST = 0.4
"""What the exits' scoring takes of the time that verifying a draft adds to a step."""

_SCORINGS_BEFORE = 8
"""Cycles in which the exits score for a request before its record decides."""

_SCORINGS_KEPT = 0.95
"""Share of a request's record of scoring that a further cycle keeps."""

_TRY_EVERY = 16
"""What does nothing for a request is tried again in one of so many cycles at most."""

_TRY_COST = 0.01
"""Share of a request's tokens that trying a draft which comes to nothing may cost."""

_DECIDED = (1 - _SCORINGS_KEPT**_SCORINGS_BEFORE) / (1 - _SCORINGS_KEPT)


@dataclass(frozen=True)
class Admission:
    """What a draft must promise, for R requests.

    Attributes:
        least: (R,) float64, the probability that a draft and all before it are right
            above which it pays; NaN for requests with thresholds of their own.
        trust: (R,) float64, factors on the exits' probabilities of acceptance.
        lookup: (R,) float64, the probability that a draft by n-gram lookup is right
            where those before it are.
        use_exits: (R,) bool, whether scoring with the exits has paid lately, or is due.
        due: (R,) bool, whether a draft by lookup is due though it promises too little:
            what is never tried is never found out.
    """

    least: np.ndarray
    trust: np.ndarray
    lookup: np.ndarray
    use_exits: np.ndarray
    due: np.ndarray

    def select(self, requests: np.ndarray) -> Admission:
        """Some of the requests, in the given order; (r,) int64."""
        return Admission(
            self.least[requests],
            self.trust[requests],
            self.lookup[requests],
            self.use_exits[requests],
            self.due[requests],
        )

    def survival(self, request: int, expected: np.ndarray) -> float:
        """The probability that early predictions are all right.

        Args:
            request: The request.
            expected: (m,) how probably the exits say that each is accepted where those
                before it are.
        """
        return float(np.minimum(expected * self.trust[request], 1.0).prod())

    def looked_up(self, request: int, survival: float, most: int) -> int:
        """How many drafts by lookup pay.

        Args:
            request: The request.
            survival: Probability that all drafts before them are right.
            most: Most drafts.

        Returns:
            0 .. ``most``.
        """
        least = self.least[request]
        if most < 1 or np.isnan(least):
            return max(most, 0)
        pays = 0
        if survival > least:
            pays = int(np.log(least / survival) / np.log(self.lookup[request]))
        return min(most, max(pays, int(self.due[request])))


@dataclass
class _Record:
    """Verified drafts of one request: expected and found to be right.

    Attributes:
        expected: Sum of what the exits said of compared early predictions.
        right: How many of these were right.
        looked_up: Compared drafts by lookup.
        looked_up_right: How many of these were right.
        least: What its drafts had to promise lately; NaN where thresholds decide.
        scorings: Cycles in which the exits scored, the older the less.
        gain: Tokens that this brought, less those of the time that drafts took.
        passed: Cycles since the exits scored.
        not_looked_up: Cycles since drafts by lookup were verified.
    """

    expected: float = 0.0
    right: int = 0
    looked_up: int = 0
    looked_up_right: int = 0
    least: float = np.nan
    scorings: float = 0.0
    gain: float = 0.0
    passed: int = 0
    not_looked_up: int = 0

    def is_due(self, cycles: int) -> bool:
        """Whether a draft is worth a try after so many cycles without.

        It takes the time of as many tokens as it would have to promise, and a cycle
        yields one at least.
        """
        # In this order NaN, where thresholds decide, leaves the first.
        return cycles >= max(_TRY_EVERY, self.least / _TRY_COST)

    @property
    def uses_exits(self) -> bool:
        """Whether the exits shall score in this cycle."""
        if np.isnan(self.least) or self.scorings < _DECIDED or self.is_due(self.passed):
            return True
        return self.gain > _SCORING_COST * self.least * self.scorings


class AcceptanceRecord:
    """What became of drafts, by request, against what was expected of them."""

    def __init__(self) -> None:
        """Start without any."""
        self._records: dict[str, _Record] = {}
        # As if half of a few had been right.
        self._looked_up = 2 * _PRIOR_DRAFTS
        self._looked_up_right = _PRIOR_DRAFTS

    def admission(self, request_ids: Sequence[str], least: np.ndarray) -> Admission:
        """What requests' drafts must promise, and can.

        Args:
            request_ids: R requests.
            least: (R,) see :class:`Admission`.
        """
        known = self._looked_up_right / self._looked_up
        trust = np.ones(len(request_ids))
        lookup = np.full(len(request_ids), known)
        use_exits = np.ones(len(request_ids), bool)
        due = np.zeros(len(request_ids), bool)
        for index, request_id in enumerate(request_ids):
            record = self._records.get(request_id)
            if record is not None:
                record.least = least[index]
                record.passed += 1
                record.not_looked_up += 1
                use_exits[index] = record.uses_exits
                due[index] = record.is_due(record.not_looked_up)
                trust[index] = (record.right + _PRIOR_DRAFTS) / (
                    record.expected + _PRIOR_DRAFTS
                )
                lookup[index] = (record.looked_up_right + _PRIOR_DRAFTS * known) / (
                    record.looked_up + _PRIOR_DRAFTS
                )
        return Admission(
            least, trust.clip(*_TRUST), lookup.clip(0.01, 0.99), use_exits, due
        )

    def record_scoring(self, request_id: str, least: float) -> None:
        """Note that the exits score for a request.

        Args:
            request_id: The request.
            least: What its drafts must promise; NaN where thresholds decide.
        """
        record = self._records.setdefault(request_id, _Record())
        record.least = least
        record.scorings = _SCORINGS_KEPT * record.scorings + 1
        record.gain *= _SCORINGS_KEPT
        record.passed = 0

    def record_acceptance(
        self,
        request_id: str,
        exits: np.ndarray,
        expected: np.ndarray,
        accepted: int,
    ) -> None:
        """Note the outcome of one request's verified drafts.

        Args:
            request_id: The request.
            exits: (m,) int8, the exit of each, in order; -1 for those by lookup.
            expected: (m,) the exits' calibrated probabilities of acceptance, without
                trust; those by lookup are not looked at.
            accepted: Number of drafts that were accepted, 0 .. m.
        """
        record = self._records.setdefault(request_id, _Record())
        # What follows a rejected draft was never compared.
        compared = min(accepted + 1, len(exits))
        early = exits[:compared] >= 0
        right = np.arange(compared) < accepted
        record.expected += float(expected[:compared][early].sum())
        early_right = int(right[early].sum())
        record.right += early_right
        if not np.isnan(record.least):
            record.gain += early_right - record.least * np.count_nonzero(exits >= 0)
        looked_up = compared - int(early.sum())
        if looked_up:
            record.not_looked_up = 0
            looked_up_right = int(right[~early].sum())
            record.looked_up += looked_up
            record.looked_up_right += looked_up_right
            keep = max(0.0, 1.0 - looked_up / _MEMORY)
            self._looked_up = keep * self._looked_up + looked_up
            self._looked_up_right = keep * self._looked_up_right + looked_up_right

    def forget(self, request_ids: Collection[str]) -> None:
        """Release what is remembered of finished requests."""
        for request_id in request_ids:
            self._records.pop(request_id, None)
