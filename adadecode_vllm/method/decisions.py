# SPDX-License-Identifier: Apache-2.0
"""What becomes of the tokens that an exit names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adadecode_vllm.method.cycle import Cycle, DraftRequests
from adadecode_vllm.method.deepening import Deepening
from adadecode_vllm.method.lookup import Candidates
from adadecode_vllm.method.policy import ThresholdPolicy
from adadecode_vllm.method.scoring import Scoring
from adadecode_vllm.method.trust import trusted


class Said(NamedTuple):
    """What an exit says of the next tokens of r requests.

    Attributes:
        requests: (r,) int64.
        exit_index: The exit.
        token_ids: (r,) int64, its top tokens.
        confidence: (r,) float32, their probabilities.
    """

    requests: np.ndarray
    exit_index: int
    token_ids: np.ndarray
    confidence: np.ndarray

    def of(self, chosen: np.ndarray) -> Said:
        """Of some of the requests; (r,) bool."""
        return Said(
            self.requests[chosen],
            self.exit_index,
            self.token_ids[chosen],
            self.confidence[chosen],
        )


class Decisions:
    """Takes what exits say as drafts, leaves it, or lets a token run on.

    Attributes:
        policy: Thresholds, and what exits' probabilities were calibrated to.
        scoring: When asking an exit is worth its time.
    """

    def __init__(self, policy: ThresholdPolicy, exit_layers: Sequence[int]) -> None:
        """Begin without anything learnt of requests.

        Args:
            policy: See the attribute.
            exit_layers: Layer counts of the K exits, strictly increasing.
        """
        self.policy = policy
        self._deepening = Deepening(exit_layers)
        self.scoring = Scoring()
        self._last_exit = len(exit_layers) - 1
        self._random = np.random.default_rng(0)

    def decide(
        self,
        cycle: Cycle,
        requests: DraftRequests,
        candidates: Candidates | None,
        said: Said,
    ) -> None:
        """Take what an exit says of some requests' next tokens, or do not.

        Args:
            cycle: The windows.
            requests: All requests.
            candidates: What the lookup says.
            said: What it says of some of them.
        """
        # Embeddings that a request brings may hold NaN, which must not stay in what is
        # learnt over all requests.
        said = said._replace(confidence=np.fmax(said.confidence, 0.0))
        by_costs = cycle.by_costs[said.requests]
        for decide, own in (
            (self._decide_by_costs, by_costs),
            (self._decide_by_thresholds, ~by_costs),
        ):
            if own.all():
                decide(cycle, requests, candidates, said)
            elif own.any():
                decide(cycle, requests, candidates, said.of(own))

    def _decide_by_thresholds(
        self,
        cycle: Cycle,
        requests: DraftRequests,
        candidates: Candidates | None,
        said: Said,
    ) -> None:
        """Take what exceeds its threshold; see :meth:`decide`."""
        chosen, exit_index, own = said.requests, said.exit_index, requests.thresholds
        takes = self.policy.confident(
            exit_index,
            said.confidence,
            None if own is None else own[chosen, exit_index],
        )
        looked_up = expected = None
        if requests.admission is not None:
            # Costs may decide for them later.
            expected = self.policy.acceptance(exit_index, said.confidence)
        if exit_index == self._last_exit:
            if candidates is not None:
                # Where the exits are not sure.
                looked_up = ~takes & (candidates.token_ids[chosen] >= 0)
                takes |= looked_up
            cycle.active[chosen[~takes]] = False
            takes |= self.policy.worth_a_guess(said.confidence)
        self._take(cycle, candidates, said, takes, looked_up, expected, expected)

    def _decide_by_costs(
        self,
        cycle: Cycle,
        requests: DraftRequests,
        candidates: Candidates | None,
        said: Said,
    ) -> None:
        """Take what promises more than it costs; see :meth:`decide`."""
        chosen, admission = said.requests, requests.admission
        assert admission is not None, "costs decide for these"
        expected = self.policy.acceptance(said.exit_index, said.confidence)
        own_promise = trusted(expected, admission.trust[chosen])
        promise, looked_up = own_promise, None
        if candidates is not None:
            # The more probable of the two.
            of_lookup = candidates.promises[chosen]
            looked_up = of_lookup >= own_promise
            promise = np.maximum(own_promise, of_lookup)
        survival, least = cycle.prospects(chosen)
        asking = admission.asking(0, least[0])
        took = asking
        if said.exit_index:
            took = admission.asking(said.exit_index, least[0])
        cycle.asking_cost[chosen] += took
        pays = survival * promise > least
        runs_on = None
        if self._last_exit:
            deeper_cost = admission.exit_cost(said.exit_index + 1)
            runs_on = self._runs_on(
                cycle, said, own_promise, promise, deeper_cost, asking
            )
        if admission.exits_due.any():
            # Behind such a draft the request's own record counts again.
            tried = admission.exits_due[chosen] & (survival * expected > least) & ~pays
            promise = np.where(tried, own_promise, promise)
            pays |= tried
            if looked_up is not None:
                looked_up &= ~tried
        cycle.active[chosen] = pays if runs_on is None else pays | runs_on
        own = own_promise if runs_on is None else own_promise[~runs_on]
        self.scoring.said(own, float(least[0]), asking)
        if runs_on is not None:
            pays &= ~runs_on
            early = pays if looked_up is None else pays & ~looked_up
            self._deepening.drafted(promise[early])
        self._take(cycle, candidates, said, pays, looked_up, expected, promise)

    def _runs_on(
        self,
        cycle: Cycle,
        said: Said,
        own_promise: np.ndarray,
        promise: np.ndarray,
        deeper_cost: float,
        asking: float,
    ) -> np.ndarray:
        """Which tokens shall run on to the next exit, by costs; remembers what came.

        Args:
            cycle: The windows.
            said: What the exit said of them, r.
            own_promise: (r,) how probably its tokens are accepted.
            promise: (r,) the same of what would be drafted now.
            deeper_cost: What asking the next exit takes, in tokens; NaN where it is not
                known.
            asking: What asking the first one takes.

        Returns:
            (r,) bool.
        """
        chosen, exit_index = said.requests, said.exit_index
        if exit_index:
            before = cycle.promised[chosen]
            self._deepening.ran_on(exit_index - 1, before, own_promise)
        if exit_index == self._last_exit:
            return np.zeros(len(chosen), bool)
        runs_on = self._deepening.pays(
            exit_index,
            own_promise,
            promise,
            *cycle.prospects(chosen),
            cycle.room(chosen),
            deeper_cost,
            asking,
        )
        self._deepening.stayed(exit_index, own_promise[~runs_on])
        cycle.promised[chosen] = own_promise
        return runs_on

    def _take(
        self,
        cycle: Cycle,
        candidates: Candidates | None,
        said: Said,
        takes: np.ndarray,
        looked_up: np.ndarray | None,
        expected: np.ndarray | None,
        promise: np.ndarray | None,
    ) -> None:
        """Append drafts to windows.

        Args:
            cycle: The windows.
            candidates: What the lookup says.
            said: What the exit said of r requests' next tokens.
            takes: (r,) bool, where there is a draft.
            looked_up: (r,) bool, where it is the lookup's; None for nowhere.
            expected: (r,) how probably the exit's tokens are accepted, as it was
                calibrated; None where nobody asks.
            promise: (r,) how probably the drafts are; None as well.
        """
        if not takes.any():
            return
        chosen, token_ids = said.requests, said.token_ids
        exits = np.full(len(chosen), said.exit_index, np.int8)
        if candidates is not None and looked_up is not None and looked_up.any():
            token_ids = np.where(looked_up, candidates.token_ids[chosen], token_ids)
            exits[looked_up] = -1 - candidates.evidence[chosen[looked_up]]
            if expected is not None:
                expected = np.where(looked_up, 1.0, expected)
        if not takes.all():
            chosen, token_ids, exits = chosen[takes], token_ids[takes], exits[takes]
            expected = None if expected is None else expected[takes]
            promise = None if promise is None else promise[takes]
        token_ids = self.policy.corrupt(token_ids, self._random)
        least_ratio = self.scoring.least_ratio
        cycle.predict(chosen, token_ids, exits, expected, promise, least_ratio)
