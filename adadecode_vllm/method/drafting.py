# SPDX-License-Identifier: Apache-2.0
"""Early prediction over a whole batch: step 2 of a cycle."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adadecode_vllm.method.admission import Admission
from adadecode_vllm.method.executor import SegmentExecutor, StepRunner, TokenSubset
from adadecode_vllm.method.ledger import Window
from adadecode_vllm.method.policy import ThresholdPolicy
from adadecode_vllm.method.states import Finished, PendingStates
from adadecode_vllm.method.stats import Stats

MOST_AHEAD = 8
"""Most requests whose next forward runs ahead.

With more, a request that joins them is due in many of the steps, and what it computes
would need a pass over the weights of its own.
"""


@dataclass(frozen=True)
class DraftRequests:
    """The requests that may predict early, R of them.

    Attributes:
        rows: (R,) int64, rows in the block tables.
        token_ids: (R,) int64, the newest sampled tokens.
        positions: (R,) int64, their positions; none has KV yet.
        limits: (R,) int64, most early predictions each request may make: 0 .. cap.
            KV slots up to ``positions + limits - 1`` must belong to the request (I3).
        stop_token_ids: R collections of tokens after which nothing will be kept.
        room: (R,) int64, KV slots that belong to the request from the newest token's
            position on. With more than its early predictions need, the last of these
            may run ahead of its verification; None for never.
        thresholds: (R, K) the requests' own thresholds on the exits' probabilities;
            None for the policy's.
        alone: Whether the next step will hold these requests only, as far as is known.
        contexts: R requests' verified tokens, (n,) int32 each, where drafts by n-gram
            lookup follow the early predictions, and None where none do; None for
            nowhere. With any, nothing runs ahead of the next step: they have to run.
        lookup_first: (R,) bool, whether the lookup comes before the exits; None for
            nowhere.
        final_states: (N, d) on the device, what the final norm returned in the step
            that sampled the newest tokens; None where no head has memory.
        final_rows: (R,) int64, the rows that the newest tokens were sampled from.
        admission: What a draft must promise, by the costs of steps; None where
            thresholds decide alone.
    """

    rows: np.ndarray
    token_ids: np.ndarray
    positions: np.ndarray
    limits: np.ndarray
    stop_token_ids: list[Collection[int]]
    room: np.ndarray | None = None
    thresholds: np.ndarray | None = None
    alone: bool = False
    contexts: Sequence[np.ndarray | None] | None = None
    lookup_first: np.ndarray | None = None
    final_states: torch.Tensor | None = None
    final_rows: np.ndarray | None = None
    admission: Admission | None = None

    def going_on(self) -> np.ndarray:
        """The requests, (r,) int64, that may predict and have not just ended."""
        return np.array(
            [
                request
                for request, (token, limit) in enumerate(
                    zip(self.token_ids.tolist(), self.limits.tolist(), strict=True)
                )
                if limit > 0 and token not in self.stop_token_ids[request]
            ],
            np.int64,
        )

    def select(self, requests: np.ndarray) -> DraftRequests:
        """Some of the requests, in the given order; (r,) int64."""
        return DraftRequests(
            rows=self.rows[requests],
            token_ids=self.token_ids[requests],
            positions=self.positions[requests],
            limits=self.limits[requests],
            stop_token_ids=[self.stop_token_ids[request] for request in requests],
            room=None if self.room is None else self.room[requests],
            thresholds=None if self.thresholds is None else self.thresholds[requests],
            contexts=None
            if self.contexts is None
            else [self.contexts[request] for request in requests],
            lookup_first=None
            if self.lookup_first is None
            else self.lookup_first[requests],
            final_states=self.final_states,
            final_rows=None if self.final_rows is None else self.final_rows[requests],
            admission=self.admission and self.admission.select(requests),
        )


class _Cycle:
    """The windows of R requests while they grow.

    By I1 the tokens of a window that stand at a level are next to each other, lower
    levels further back, so their number per level says it all. Every round of a cycle
    costs the host a fixed handful of array operations.

    Attributes:
        active: (R,) bool, whether the request goes on.
        front_level: (R,) int64, level of the front token; -1 where the exit that reads
            the embedding has not been asked about it.
    """

    def __init__(
        self, requests: DraftRequests, width: int, num_segments: int, first_level: int
    ) -> None:
        self._requests = requests
        self._width = width
        self._first_level = first_level
        size = len(requests.rows)
        self._token_ids = np.zeros((size, width), np.int64)
        self._token_ids[:, 0] = requests.token_ids
        self._exits = np.full((size, width), -1, np.int8)
        self._expected = np.ones((size, width))
        # Probability that all predictions of a request are right.
        self._survival = np.ones(size)
        self._length = np.ones(size, np.int64)
        self._count = np.zeros((num_segments + 1, size), np.int64)
        self._count[0] = 1
        self._limit = requests.limits + 1
        self._front = np.array(requests.token_ids, np.int64)
        self.active = requests.limits > 0
        self.front_level = np.full(size, first_level, np.int64)

    def fronts(self, chosen: np.ndarray) -> tuple[TokenSubset, np.ndarray, np.ndarray]:
        """The front tokens of some requests, (r,); as `standing`."""
        return self._last(chosen, np.ones(len(chosen), np.int64))

    def standing(
        self, chosen: np.ndarray, level: int
    ) -> tuple[TokenSubset, np.ndarray, np.ndarray]:
        """The tokens of some requests at their front's level.

        Args:
            chosen: (r,) int64, the requests.
            level: Where all their front tokens stand.

        Returns:
            The n tokens, where their states are kept (n,) and their ids (n,).
        """
        return self._last(chosen, self._count[level][chosen])

    def up_to(self, level: int) -> tuple[TokenSubset, np.ndarray, np.ndarray]:
        """The tokens of all requests that stand at a level or below; as above."""
        count = self._count[: level + 1].sum(0)
        chosen = np.flatnonzero(count)
        return self._last(chosen, count[chosen])

    def _last(
        self, chosen: np.ndarray, count: np.ndarray
    ) -> tuple[TokenSubset, np.ndarray, np.ndarray]:
        """So many last tokens of some requests; (r,) both."""
        requests, width = self._requests, self._width
        length = self._length[chosen]
        offset = length - count
        subset = TokenSubset(
            requests.rows[chosen], requests.positions[chosen] + offset, count
        )
        states = chosen * width + offset
        num_tokens = int(count.sum())
        if num_tokens == len(chosen):
            return subset, states, self._front[chosen]
        skipped = states - np.cumsum(count) + count
        states = np.repeat(skipped, count) + np.arange(num_tokens)
        return subset, states, self._token_ids.ravel()[states]

    def advance(self, chosen: np.ndarray, level: int) -> None:
        """Note that these requests' tokens at a level have run its segment."""
        if level >= 0:
            self._count[level + 1][chosen] += self._count[level][chosen]
            self._count[level][chosen] = 0
        self.front_level[chosen] = level + 1

    def finish(self) -> None:
        """Note that all tokens have run all segments."""
        self._count[-1] = self._count.sum(0)
        self._count[:-1] = 0
        self.front_level[:] = len(self._count) - 1

    def paying(self, chosen: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Whether one more draft of some requests pays.

        Args:
            chosen: (r,) int64, the requests.
            expected: (r,) how probably it is accepted where those before it are.

        Returns:
            (r,) bool; False for requests whose thresholds decide.
        """
        admission = self._requests.admission
        assert admission is not None, "asked by the caller"
        promised = self._survival[chosen] * admission.trust[chosen] * expected
        return promised > admission.least[chosen]

    def predict(
        self,
        chosen: np.ndarray,
        token_ids: np.ndarray,
        exit_index: int,
        expected: np.ndarray | None,
    ) -> None:
        """Append early predictions; (r,) requests, tokens and their acceptance."""
        length = self._length[chosen]
        self._token_ids[chosen, length] = token_ids
        self._exits[chosen, length] = exit_index
        admission = self._requests.admission
        if expected is not None and admission is not None:
            self._expected[chosen, length] = expected
            self._survival[chosen] *= np.minimum(expected * admission.trust[chosen], 1)
        self._front[chosen] = token_ids
        self.front_level[chosen] = self._first_level
        self._count[0][chosen] += 1
        length += 1
        self._length[chosen] = length
        goes_on = self.active[chosen] & (length < self._limit[chosen])
        if admission is not None:
            # Whatever an exit said, no further draft would pay.
            goes_on &= ~(self._survival[chosen] <= admission.least[chosen])
        stops = self._requests.stop_token_ids
        for index, (request, token) in enumerate(
            zip(chosen.tolist(), token_ids.tolist(), strict=True)
        ):
            if token in stops[request]:
                goes_on[index] = False
        self.active[chosen] = goes_on

    def fresh_predictions(self) -> np.ndarray:
        """Requests whose newest prediction has not run and has a KV slot; (r,)."""
        if self._requests.room is None:
            return np.empty(0, np.int64)
        fresh = (self.front_level <= 0) & (self._length > 1)
        return np.flatnonzero(fresh & (self._length <= self._requests.room))

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows."""
        return int(self._length.sum())

    def has_slots(self) -> bool:
        """Whether every token has a KV slot: that of a new prediction may not."""
        room = self._requests.room
        return room is not None and bool(
            ((self.front_level > 0) | (self._length <= room)).all()
        )

    def window(self) -> Window:
        """The windows as they are now."""
        used = np.arange(self._width) < self._length[:, None]
        levels = np.zeros(used.shape, np.int8)
        # The oldest tokens have come furthest.
        descending = np.arange(len(self._count), dtype=np.int8)[::-1]
        levels[used] = np.repeat(
            np.tile(descending, len(self._length)), self._count[::-1].T.ravel()
        )
        return Window(
            self._requests.positions,
            self._length,
            self._token_ids,
            levels,
            self._exits,
            None if self._requests.admission is None else self._expected,
        )


class Drafter:
    """Runs front tokens from exit to exit and predicts where a head is confident."""

    def __init__(
        self,
        executor: SegmentExecutor,
        states: PendingStates,
        policy: ThresholdPolicy,
        stats: Stats,
    ) -> None:
        """Wire the drafter.

        Args:
            executor: Runs segments and gates.
            states: Receives the hidden states of all tokens that were run.
            policy: Decides at each gate.
            stats: Counters to add to.
        """
        self.executor = executor
        self.states = states
        self.policy = policy
        self.stats = stats
        self._random = np.random.default_rng(0)

    def draft(self, requests: DraftRequests) -> Window:
        """Predict early for a batch.

        All requests move together. Each round takes the lowest level at which some
        active request's front token stands and runs that segment for those front
        tokens and for their pending tokens at the same level, so deferred layers of
        several tokens and requests share one pass over the weights.

        Args:
            requests: The requests. Those whose limit is 0 are left alone.

        Returns:
            Their windows; ``length - 1`` early predictions each.
        """
        started = time.perf_counter()
        executor = self.executor
        at_embedding = executor.exits_at_embedding
        cycle = _Cycle(
            requests, self.states.window, executor.num_segments, -at_embedding
        )
        cycle.active &= self.policy.may_predict(requests.thresholds)
        if self.states.memory is not None:
            self.states.begin_memory(self._sampled_from(requests))
        last_exit = executor.num_segments - 2 + at_embedding
        while len(waiting := np.flatnonzero(cycle.active)):
            front_level = cycle.front_level[waiting]
            segment = int(front_level.min())
            chosen = waiting[front_level == segment]
            predicted, confidence = self._step(cycle, chosen, segment)
            exit_index = segment + at_embedding
            own = requests.thresholds
            confident = self.policy.confident(
                exit_index, confidence, None if own is None else own[chosen, exit_index]
            )
            guess = self.policy.worth_a_guess(confidence)
            expected = None
            if requests.admission is not None:
                expected = self.policy.acceptance(exit_index, confidence)
                by_costs = ~np.isnan(requests.admission.least[chosen])
                confident &= ~by_costs
                confident |= cycle.paying(chosen, expected)
                guess &= ~by_costs
            if exit_index == last_exit:
                cycle.active[chosen[~confident]] = False
                confident |= guess
            if confident.any():
                token_ids = self.policy.spoil(predicted[confident], self._random)
                cycle.predict(
                    chosen[confident],
                    token_ids,
                    exit_index,
                    None if expected is None else expected[confident],
                )
        ended = time.perf_counter()
        self.states.finished = None
        if requests.contexts is None:
            self._run_ahead(cycle, requests.alone)
        window = cycle.window()
        for exit_index in range(last_exit + 1):
            predictions = np.count_nonzero(window.exits == exit_index)
            self.stats.early_predictions[exit_index] += predictions
        self.stats.drafting_seconds += ended - started
        return window

    def _sampled_from(self, requests: DraftRequests) -> torch.Tensor | None:
        """(R, d) the final states that the newest tokens were sampled from."""
        if requests.final_states is None or requests.final_rows is None:
            return None
        rows = self.executor.to_device(requests.final_rows)
        return requests.final_states.index_select(0, rows)

    def _run_ahead(self, cycle: _Cycle, alone: bool) -> None:
        """Let the device work while the host schedules the next step.

        Nothing waits for it. Where the next step will hold these requests only, all of
        its forward runs now, and the step finds it done. Otherwise the last early
        predictions run the first segment, which they will in any case; the rest waits
        for the other requests, to share a pass over the weights with them.

        Args:
            cycle: The windows.
            alone: Whether the next step will hold these requests only.
        """
        steps = self.executor.steps
        if steps is None:
            return
        if (
            alone
            and len(cycle.active) <= MOST_AHEAD
            and cycle.num_tokens <= steps.max_tokens
            and cycle.has_slots()
        ):
            self._finish(cycle, steps)
            return
        if self.executor.num_segments == 1:
            return
        chosen = cycle.fresh_predictions()
        if len(chosen) and (tokens := cycle.standing(chosen, 0))[0].num_tokens <= (
            steps.max_tokens
        ):
            steps.ahead(0, *tokens)
            cycle.advance(chosen, 0)
            self.stats.count_segment(0, tokens[0].num_tokens)

    def _finish(self, cycle: _Cycle, steps: StepRunner) -> None:
        """Run everything that is left of all tokens."""
        last = self.executor.num_segments - 1
        for segment in range(last + 1):
            subset, states, token_ids = cycle.up_to(segment)
            if subset.num_tokens:
                outcome = steps.ahead(segment, subset, states, token_ids)
                self.stats.count_segment(segment, subset.num_tokens)
        first = np.concatenate(([0], np.cumsum(subset.count)[:-1]))
        self.states.finished = Finished(outcome, first)
        cycle.finish()

    def _step(
        self, cycle: _Cycle, chosen: np.ndarray, segment: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run a segment for all tokens of the chosen requests that stand at it.

        Before the first segment, at -1, only the exit there is asked about the fronts.

        Returns:
            The head's tokens (r,) int64 and their probabilities (r,) float32 for the
            chosen requests' front tokens.
        """
        started = time.perf_counter()
        subset, states, token_ids = (
            cycle.standing(chosen, segment) if segment >= 0 else cycle.fronts(chosen)
        )
        steps = self.executor.steps
        answer = steps.draft(segment, subset, states, token_ids) if steps else None
        exit_index = segment + self.executor.exits_at_embedding
        ended = time.perf_counter()
        if answer is None:
            fronts = self._run_segment(segment, subset, states, token_ids)
            ended = time.perf_counter()
            answer = self._ask(exit_index, *fronts)
            self.stats.gate_seconds[exit_index] += time.perf_counter() - ended
        self.stats.draft_segment_seconds[exit_index] += ended - started
        if segment >= 0:
            self.stats.count_segment(segment, len(states))
        self.stats.draft_steps[exit_index] += 1
        self.stats.gates[exit_index] += len(chosen)
        cycle.advance(chosen, segment)
        return answer

    def _run_segment(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run a segment where nothing holds the whole step.

        Args:
            segment: The segment; -1 for none.
            subset: Its n tokens.
            states: (n,) int64, where their states are kept.
            token_ids: (n,) int64.

        Returns:
            Of the requests' last tokens: where their states are kept (r,), hidden
            states and residuals, (r, d); no residual before the first segment.
        """
        index = self.executor.to_device(states)
        residual = None
        if segment <= 0:
            hidden = self.executor.embed(self.executor.to_device(token_ids))
            if segment < 0:
                return index, hidden, None
        else:
            hidden, residual = self.states.read(index)
        hidden, residual = self.executor.run(segment, subset, hidden, residual)
        assert residual is not None, "only the last segment, never drafted, ends it"
        self.states.write(index, hidden, residual)
        if subset.num_tokens == subset.num_requests:
            return index, hidden, residual
        front = self.executor.to_device(np.cumsum(subset.count) - 1)
        return (
            index.index_select(0, front),
            hidden.index_select(0, front),
            residual.index_select(0, front),
        )

    def _ask(
        self,
        exit_index: int,
        index: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ask an exit head about front tokens; see `_run_segment`."""
        memory = self.states.read_memory(index)
        answer = self.executor.gate(exit_index, hidden, residual, memory)
        if answer.output is not None:
            self.states.write_memory(index, answer.output)
        return answer.token_ids, answer.confidence
