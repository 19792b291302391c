# SPDX-License-Identifier: Apache-2.0
"""Early prediction over a whole batch: step 2 of a cycle."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from adadecode_vllm.core.executor import SegmentExecutor, TokenSubset
from adadecode_vllm.core.ledger import Window
from adadecode_vllm.core.policy import ThresholdPolicy
from adadecode_vllm.core.states import PendingStates
from adadecode_vllm.core.stats import Stats


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
    """

    rows: np.ndarray
    token_ids: np.ndarray
    positions: np.ndarray
    limits: np.ndarray
    stop_token_ids: list[Collection[int]]

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
            requests: The requests. Every limit must be positive.

        Returns:
            Their windows; ``length - 1`` early predictions each.
        """
        started = time.perf_counter()
        num_requests = len(requests.rows)
        width = self.states.window
        token_ids = np.zeros((num_requests, width), np.int64)
        token_ids[:, 0] = requests.token_ids
        levels = np.zeros((num_requests, width), np.int8)
        exits = np.full((num_requests, width), -1, np.int8)
        length = np.ones(num_requests, np.int64)
        active = requests.limits > 0
        everyone = np.arange(num_requests)
        last_exit = self.executor.num_segments - 2

        while active.any():
            front_level = levels[everyone, length - 1]
            segment = int(front_level[active].min())
            chosen = np.flatnonzero(active & (front_level == segment))
            predicted, confidence = self._step(
                requests, chosen, segment, token_ids, levels, length
            )
            confident = self.policy.confident(segment, confidence)

            predicts = confident
            if segment == last_exit:
                active[chosen[~confident]] = False
                predicts = confident | self.policy.worth_a_guess(confidence)
            moved = chosen[predicts]
            token_ids[moved, length[moved]] = self.policy.spoil(
                predicted[predicts], self._random
            )
            exits[moved, length[moved]] = segment
            length[moved] += 1
            self.stats.early_predictions[segment] += len(moved)
            active[moved] &= length[moved] - 1 < requests.limits[moved]
            for request in moved[active[moved]]:
                token = int(token_ids[request, length[request] - 1])
                active[request] = token not in requests.stop_token_ids[request]

        self.stats.drafting_seconds += time.perf_counter() - started
        return Window(requests.positions, length, token_ids, levels, exits)

    def _step(
        self,
        requests: DraftRequests,
        chosen: np.ndarray,
        segment: int,
        token_ids: np.ndarray,
        levels: np.ndarray,
        length: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run a segment for all tokens of the chosen requests that stand at it.

        Levels never increase with the position (I1), so these tokens are a suffix of
        each window; ``levels`` is updated in place.

        Returns:
            The head's tokens (r,) int64 and their probabilities (r,) float32 for the
            chosen requests' front tokens.
        """
        started = time.perf_counter()
        width = self.states.window
        standing = levels[chosen] == segment
        standing &= np.arange(width) < length[chosen, None]
        count = standing.sum(1)
        request, offset = np.nonzero(standing)
        states = chosen[request] * width + offset
        subset = TokenSubset(
            rows=requests.rows[chosen],
            first=requests.positions[chosen] + length[chosen] - count,
            count=count,
        )
        ids = token_ids[chosen[request], offset]
        steps = self.executor.steps
        answer = steps.draft(segment, subset, states, ids) if steps else None
        if answer is None:
            front_states = self._run_segment(segment, subset, states, ids)
            gate_started = time.perf_counter()
            self.stats.draft_segment_seconds[segment] += gate_started - started
            answer = self.executor.gate(segment, *front_states)
            self.stats.gate_seconds[segment] += time.perf_counter() - gate_started
        else:
            self.stats.draft_segment_seconds[segment] += time.perf_counter() - started
        levels[chosen[request], offset] = segment + 1
        self.stats.count_segment(segment, len(states))
        self.stats.gates[segment] += len(chosen)
        return answer

    def _run_segment(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a segment where nothing holds the whole step.

        Args:
            segment: The segment.
            subset: Its n tokens.
            states: (n,) int64, where their states are kept.
            token_ids: (n,) int64.

        Returns:
            Hidden states and residuals of the requests' last tokens, (r, d).
        """
        index = self._to_device(states)
        if segment == 0:
            hidden = self.executor.embed(self._to_device(token_ids))
            residual = None
        else:
            hidden, residual = self.states.read(index)
        hidden, residual = self.executor.run(segment, subset, hidden, residual)
        assert residual is not None, "only the last segment, never drafted, ends it"
        self.states.write(index, hidden, residual)
        if subset.num_tokens == subset.num_requests:
            return hidden, residual
        front = self._to_device(np.cumsum(subset.count) - 1)
        return hidden.index_select(0, front), residual.index_select(0, front)

    def _to_device(self, index: np.ndarray) -> torch.Tensor:
        return async_tensor_h2d(index, device=self.states.hidden.device)
