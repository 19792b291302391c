# SPDX-License-Identifier: Apache-2.0
"""Early prediction over a whole batch: step 2 of a cycle."""

from __future__ import annotations

import time

import numpy as np
import torch

from adadecode_vllm.method.cycle import Cycle, DraftRequests
from adadecode_vllm.method.decisions import Decisions, Said
from adadecode_vllm.method.executor import SegmentExecutor, StepRunner, TokenSubset
from adadecode_vllm.method.ledger import Window
from adadecode_vllm.method.lookup import Candidates
from adadecode_vllm.method.policy import ThresholdPolicy
from adadecode_vllm.method.states import Finished, PendingStates
from adadecode_vllm.method.stats import Stats

MAX_PREFETCHED_REQUESTS = 8
"""Most requests whose next forward is prefetched.

With more, a request that joins them is due in many of the steps, and what it computes
would need a pass over the weights of its own.
"""


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
            executor: Runs segments and exit heads.
            states: Receives the hidden states of all tokens that were run.
            policy: Decides at each exit.
            stats: Counters to add to.
        """
        self.executor = executor
        self.states = states
        self.stats = stats
        self.decisions = Decisions(policy, stats.exit_layers)
        self._drafted: tuple[Cycle, bool] | None = None

    def draft(
        self, requests: DraftRequests, candidates: Candidates | None = None
    ) -> Window:
        """Predict early for a batch.

        All requests move together. Each round takes the lowest level at which some
        active request's front token stands and runs that segment for those front
        tokens and for their pending tokens at the same level, so deferred layers of
        several tokens and requests share one pass over the weights.

        Args:
            requests: The requests. Those whose limit is 0 are left alone.
            candidates: What an n-gram lookup says of the next tokens; None where none
                is asked beside the exits.

        Returns:
            Their windows; ``length - 1`` drafts each. A request whose candidate is sure
            stops: it is for the caller to go on with the lookup.
        """
        started = time.perf_counter()
        executor = self.executor
        at_embedding = executor.exits_at_embedding
        cycle = Cycle(
            requests, self.states.window, executor.num_segments, -at_embedding
        )
        cycle.active &= self.decisions.policy.may_predict(requests.thresholds)
        if requests.admission is not None:
            cycle.active &= requests.admission.use_exits
        waiting = self._waiting(cycle, candidates)
        began = time.perf_counter()
        if self.states.memory is not None and len(waiting):
            self.states.begin_memory(self._sampled_from(requests))
        while len(waiting):
            front_level = cycle.front_level[waiting]
            segment = int(front_level.min())
            chosen = waiting[front_level == segment]
            predicted, confidence = self._step(cycle, chosen, segment)
            said = Said(chosen, segment + at_embedding, predicted, confidence)
            self.decisions.decide(cycle, requests, candidates, said)
            waiting = self._waiting(cycle, candidates)
            asked = time.perf_counter()
            self.stats.asking_seconds[said.exit_index] += asked - began
            began = asked
        ended = time.perf_counter()
        self.states.finished = None
        self._drafted = cycle, requests.alone
        window = cycle.window()
        for exit_index in range(len(self.stats.exit_layers)):
            predictions = np.count_nonzero(window.exits == exit_index)
            self.stats.early_predictions[exit_index] += predictions
        self.stats.drafting_seconds += ended - started
        return window

    def _waiting(self, cycle: Cycle, candidates: Candidates | None) -> np.ndarray:
        """Requests that go on, (r,) int64, with what the lookup says of them."""
        waiting = np.flatnonzero(cycle.active)
        if candidates is not None and len(waiting):
            candidates.look_up(waiting, *cycle.tokens, self.decisions.scoring.sure)
            cycle.active[waiting] = ~candidates.sure[waiting]
            waiting = np.flatnonzero(cycle.active)
        return waiting

    def _sampled_from(self, requests: DraftRequests) -> torch.Tensor | None:
        """(R, d) the final states that the newest tokens were sampled from."""
        if requests.final_states is None or requests.final_rows is None:
            return None
        rows = self.executor.to_device(requests.final_rows)
        return requests.final_states.index_select(0, rows)

    def prefetch(self) -> Window | None:
        """Let the device work while the host schedules the next step.

        Called once it is known that the windows just drafted are all that the step will
        verify. Nothing waits for it. Where the step will hold these requests only, all
        of its forward runs now, and the step finds it done. Otherwise the last early
        predictions run the first segment, which they will in any case; the rest waits
        for the other requests, to share a pass over the weights with them.

        Returns:
            The windows as they are then; None where nothing was run.
        """
        steps, drafted = self.executor.steps, self._drafted
        self._drafted = None
        if steps is None or drafted is None:
            return None
        cycle, alone = drafted
        if (
            alone
            and len(cycle.active) <= MAX_PREFETCHED_REQUESTS
            and cycle.num_tokens <= steps.max_tokens
            and cycle.has_slots()
        ):
            self._finish(cycle, steps)
            return cycle.window()
        if self.executor.num_segments == 1:
            return None
        chosen = cycle.fresh_drafts()
        if len(chosen) and (tokens := cycle.standing(chosen, 0))[0].num_tokens <= (
            steps.max_tokens
        ):
            steps.prefetch_segment(0, *tokens)
            cycle.advance(chosen, 0)
            self.stats.count_segment(0, tokens[0].num_tokens)
            return cycle.window()
        return None

    def _finish(self, cycle: Cycle, steps: StepRunner) -> None:
        """Run everything that is left of all tokens."""
        last = self.executor.num_segments - 1
        for segment in range(last + 1):
            subset, states, token_ids = cycle.up_to(segment)
            if subset.num_tokens:
                outcome = steps.prefetch_segment(segment, subset, states, token_ids)
                self.stats.count_segment(segment, subset.num_tokens)
        first = np.concatenate(([0], np.cumsum(subset.count)[:-1]))
        self.states.finished = Finished(outcome, first)
        cycle.finish()

    def _step(
        self, cycle: Cycle, chosen: np.ndarray, segment: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run a segment for all tokens of the chosen requests that stand at it.

        Before the first segment, at -1, only the exit there scores the fronts.

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
            answer = self._score_exit(exit_index, *fronts)
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

    def _score_exit(
        self,
        exit_index: int,
        index: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score front tokens with an exit head; see `_run_segment`."""
        memory = self.states.read_memory(index)
        answer = self.executor.score_exit(exit_index, hidden, residual, memory)
        if answer.output is not None:
            self.states.write_memory(index, answer.output)
        return answer.token_ids, answer.confidence
