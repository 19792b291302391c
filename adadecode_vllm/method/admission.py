# SPDX-License-Identifier: Apache-2.0
"""From when on a draft pays, and how far probabilities of acceptance can be trusted."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import isnan

import numpy as np

from adadecode_vllm.method.evidence import KINDS, RIGHT
from adadecode_vllm.method.trust import Trust, trusted

_MEMORY = 256.0
"""Verified drafts by lookup that the record remembers, by the evidence for them."""

_LOOKED_UP = 8.0
"""Drafts by lookup that the record begins with, by the evidence for them."""

SCORING_COST = 0.4
"""What the exits' scoring is taken to cost until steps have told, as a share of the
time that verifying a draft adds to a step."""

_SCORINGS_BEFORE = 8
"""Cycles in which the exits score for a request before its record decides."""

_SCORINGS_KEPT = 0.95
"""Share of a request's record of scoring that a further cycle keeps."""

_TO_BRING = 0.5
"""Share of its time that asking the exits for a request has to bring. What it brings
varies much, and stopping too early costs more than stopping too late."""

TRY_EVERY = 16
"""What does nothing for a request is tried again in one of so many cycles at most."""

TRY_COST = 0.01
"""Share of a request's tokens that trying a draft which comes to nothing may cost."""

_DECIDED = (1 - _SCORINGS_KEPT**_SCORINGS_BEFORE) / (1 - _SCORINGS_KEPT)


@dataclass(frozen=True)
class Admission:
    """What a draft must promise, for R requests.

    Attributes:
        least: (R,) float64, the probability that a draft and all before it are right
            above which it pays; NaN for requests with thresholds of their own.
        trust: (R,) float64, factors on the odds that the exits' tokens are accepted.
        lookup: (R, KINDS) float64, the probability that a draft by n-gram lookup is
            right where those before it are, by the evidence for it.
        use_exits: (R,) bool, whether scoring with the exits has paid lately, or is due.
        exits_due: (R,) bool, whether a draft by the exits is due though they are not
            trusted that far: what is never verified is never found to be right.
        due: (R,) bool, whether a draft by lookup is due though it promises too little:
            what is never tried is never found out.
        exit_costs: (K,) float64, what asking each exit for a token takes, the layers
            before it included, in tokens; NaN where it is not known. Empty where
            nothing is.
    """

    least: np.ndarray
    trust: np.ndarray
    lookup: np.ndarray
    use_exits: np.ndarray
    exits_due: np.ndarray
    due: np.ndarray
    exit_costs: np.ndarray = field(default_factory=lambda: np.empty(0))

    def select(self, requests: np.ndarray) -> Admission:
        """Some of the requests, in the given order; (r,) int64."""
        return Admission(
            self.least[requests],
            self.trust[requests],
            self.lookup[requests],
            self.use_exits[requests],
            self.exits_due[requests],
            self.due[requests],
            self.exit_costs,
        )

    def exit_cost(self, exit_index: int) -> float:
        """What asking an exit takes, in tokens; NaN where it is not known."""
        if exit_index < len(self.exit_costs):
            return float(self.exit_costs[exit_index])
        return float("nan")

    def asking(self, exit_index: int, least: float) -> float:
        """What asking an exit takes, in tokens, by a guess where it is not known.

        Args:
            exit_index: The exit.
            least: What a draft must promise; NaN where thresholds decide.
        """
        return _asking(self.exit_cost(exit_index), float(least))

    def looked_up(self, request: int, survival: float, evidence: Sequence[int]) -> int:
        """How many drafts by lookup pay.

        Args:
            request: The request.
            survival: Probability that all drafts before them are right.
            evidence: What speaks for each of them.

        Returns:
            0 .. all of them.
        """
        least = self.least[request]
        if np.isnan(least):
            return len(evidence)
        for pays, promise in enumerate(self.lookup[request, evidence].tolist()):
            survival *= promise
            if not survival > least:
                return max(pays, int(self.due[request]))
        return len(evidence)


@dataclass
class _Record:
    """Verified drafts of one request: expected and found to be right.

    Attributes:
        exits: How far what the exits say is trusted.
        lookup: The same of what is known of all drafts by lookup.
        least: What its drafts had to promise lately; NaN where thresholds decide.
        scorings: Cycles in which the exits scored, the older the less.
        gain: Tokens that this brought, less those of the time that it had to bring.
        passed: Cycles since the exits scored.
        not_drafted: Cycles since the exits drafted.
        not_looked_up: Cycles since the lookup drafted.
    """

    exits: Trust = field(default_factory=Trust)
    lookup: Trust = field(default_factory=Trust)
    least: float = np.nan
    scorings: float = 0.0
    gain: float = 0.0
    passed: int = 0
    not_drafted: int = 0
    not_looked_up: int = 0

    def begin_cycle(self, least: float) -> None:
        """Count a cycle, whose drafts must promise `least`."""
        self.least = least
        self.passed += 1
        self.not_drafted += 1
        self.not_looked_up += 1

    def is_due(self, cycles: int, asking: float = 0.0) -> bool:
        """Whether a draft is worth a try after so many cycles without.

        It takes the time of as many tokens as it would have to promise, and a cycle
        yields one at least.

        Args:
            cycles: Their number.
            asking: What asking an exit for the draft takes, in tokens.
        """
        # In this order NaN, where thresholds decide, leaves the first.
        return cycles >= max(TRY_EVERY, (self.least + asking) / TRY_COST)

    def uses_exits(self, asking: float) -> bool:
        """Whether the exits shall score in this cycle.

        Args:
            asking: What asking one takes, in tokens.
        """
        return (
            isnan(self.least)
            or self.scorings < _DECIDED
            or self.gain > 0
            or self.is_due(self.passed, asking)
        )


def _asking(exit_cost: float, least: float) -> float:
    """What asking an exit takes, in tokens, by a guess where it is not known."""
    return SCORING_COST * least if isnan(exit_cost) else exit_cost


_NEW = _Record()
"""Of a request without verified drafts."""


class AcceptanceRecord:
    """What became of drafts, by request, against what was expected of them."""

    def __init__(self) -> None:
        """Start without any."""
        self._records: dict[str, _Record] = {}
        # Of all requests, by evidence: drafts by lookup, and how many were right.
        self._looked_up = [_LOOKED_UP] * KINDS
        self._looked_up_right = [_LOOKED_UP * share for share in RIGHT]

    def admission(
        self,
        request_ids: Sequence[str],
        least: np.ndarray,
        exit_costs: Sequence[float] = (),
    ) -> Admission:
        """What requests' drafts must promise, and can.

        Args:
            request_ids: R requests.
            least: (R,) see :class:`Admission`.
            exit_costs: (K,) see there; empty where nothing is known.
        """
        exit_cost = exit_costs[0] if exit_costs else float("nan")
        records, uses_exits = [], []
        for request_id, own in zip(request_ids, least.tolist(), strict=True):
            record = self._records.get(request_id, _NEW)
            if record is not _NEW:
                record.begin_cycle(own)
            records.append(record)
            uses_exits.append(record.uses_exits(_asking(exit_cost, own)))
        known = np.array(self._looked_up_right) / self._looked_up
        lookup = np.array([record.lookup.factor for record in records])
        return Admission(
            least,
            np.array([record.exits.factor for record in records]),
            trusted(known, lookup[:, None]).clip(0.01, 0.99),
            np.array(uses_exits, bool),
            np.array([record.is_due(record.not_drafted) for record in records], bool),
            np.array([record.is_due(record.not_looked_up) for record in records], bool),
            np.array(exit_costs, np.float64),
        )

    def record_scoring(self, request_id: str, least: float, asking: float) -> None:
        """Note that the exits scored for a request.

        Args:
            request_id: The request.
            least: What its drafts must promise; NaN where thresholds decide.
            asking: What that took, in tokens.
        """
        record = self._records.setdefault(request_id, _Record())
        record.least = least
        record.scorings = _SCORINGS_KEPT * record.scorings + 1
        record.gain = _SCORINGS_KEPT * record.gain - _TO_BRING * asking
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
            exits: (m,) int8, the exit of each, in order; for those by lookup, -1 less
                the evidence for it.
            expected: (m,) the exits' calibrated probabilities of acceptance, without
                trust; those by lookup are not looked at.
            accepted: Number of drafts that were accepted, 0 .. m.
        """
        record = self._records.setdefault(request_id, _Record())
        first_early: int | None = None
        looked_up: list[tuple[int, bool]] = []
        for position, (own, said) in enumerate(
            zip(exits.tolist(), expected.tolist(), strict=True)
        ):
            # What follows a rejected draft was never compared.
            right, compared = position < accepted, position <= accepted
            if own >= 0:
                if first_early is None:
                    first_early = position
                if compared:
                    record.exits.learn(said, right)
            else:
                # A try counts whether it was compared or not: it took its time.
                record.not_looked_up = 0
                if compared:
                    looked_up.append((-1 - own, right))
        if first_early is not None:
            record.not_drafted = 0
            if not isnan(record.least):
                # What follows an exit's draft is right because that is.
                brought = max(accepted - first_early, 0)
                record.gain += brought - record.least * (len(exits) - first_early)
        self._record_lookups(record, looked_up)

    def _record_lookups(
        self, record: _Record, looked_up: Sequence[tuple[int, bool]]
    ) -> None:
        """Note compared drafts by lookup.

        Args:
            record: The request's.
            looked_up: For each, the evidence for it, and whether it was right.
        """
        for evidence, right in looked_up:
            known = self._looked_up_right[evidence] / self._looked_up[evidence]
            record.lookup.learn(known, right)
        keep = 1.0 - 1.0 / _MEMORY
        for evidence, right in looked_up:
            self._looked_up[evidence] = keep * self._looked_up[evidence] + 1.0
            self._looked_up_right[evidence] *= keep
            self._looked_up_right[evidence] += right

    def forget(self, request_ids: Collection[str]) -> None:
        """Release what is remembered of finished requests."""
        for request_id in request_ids:
            self._records.pop(request_id, None)
