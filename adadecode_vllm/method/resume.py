# SPDX-License-Identifier: Apache-2.0
"""The forward that verifies: every token goes on from its own level (step 4)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from adadecode_vllm.method.executor import SegmentExecutor, TokenSubset
from adadecode_vllm.method.ledger import Resumable
from adadecode_vllm.method.states import PendingStates
from adadecode_vllm.method.stats import Stats


@dataclass(frozen=True)
class ScheduledBatch:
    """The tokens of one engine step, request by request.

    Attributes:
        rows: (B,) int64, the requests' rows in the block tables.
        first: (B,) int64, first scheduled position.
        count: (B,) int64, scheduled tokens, all positive; N in all.
        token_ids: (N,) int64 on the device; unused where ``embeddings`` is given.
        embeddings: (N, d) prompt embeddings and embedded tokens, or None.
    """

    rows: np.ndarray
    first: np.ndarray
    count: np.ndarray
    token_ids: torch.Tensor
    embeddings: torch.Tensor | None = None


class Resumer:
    """Runs deferred layers and new tokens in one batch per segment."""

    def __init__(
        self, executor: SegmentExecutor, states: PendingStates, stats: Stats
    ) -> None:
        """Wire the resumer.

        Args:
            executor: Runs segments.
            states: Holds the pending tokens' hidden states.
            stats: Counters to add to.
        """
        self.executor = executor
        self.states = states
        self.stats = stats

    def forward(self, batch: ScheduledBatch, resumable: Resumable) -> torch.Tensor:
        """Run the rest of the model for a batch with pending tokens.

        Segment j runs every token at level <= j: prompt chunks and new tokens from
        segment 0 on, pending tokens from where drafting left them.

        Args:
            batch: All scheduled tokens.
            resumable: Which of them have come how far.

        Returns:
            (N, d) final hidden states, as the model's own forward returns them.
        """
        started = time.perf_counter()
        width = self.states.window
        starts = np.concatenate(([0], np.cumsum(batch.count)))
        num_tokens = int(starts[-1])
        levels = np.zeros(num_tokens, np.int8)
        # A request's rows in the pending states; those that resume nothing get one as
        # well, which whole steps use for their new tokens.
        rows = np.full(len(batch.count), -1, np.int64)
        rows[resumable.requests] = resumable.slots
        for request, row in zip(resumable.requests, resumable.levels, strict=True):
            # Bounded by the number of requests; no tensor is touched here.
            count = min(int((row > 0).sum()), int(batch.count[request]))
            levels[starts[request] : starts[request] + count] = row[:count]
        others = np.flatnonzero(rows < 0)
        free = np.setdiff1d(np.arange(len(rows)), resumable.slots)
        rows[others] = free[: len(others)]
        within = np.arange(num_tokens) - np.repeat(starts[:-1], batch.count)
        states = np.repeat(rows * width, batch.count) + within
        self.stats.resumed_forwards += 1
        self.stats.resumed_tokens += int((levels > 0).sum())

        done = levels == self.executor.num_segments
        hidden = (
            self._join(batch, starts, levels, states, done)
            if done.any()
            else self._run(batch, starts, levels, states)
        )
        self.stats.verifying_seconds += time.perf_counter() - started
        return hidden

    def _run(
        self,
        batch: ScheduledBatch,
        starts: np.ndarray,
        levels: np.ndarray,
        states: np.ndarray,
    ) -> torch.Tensor:
        if self.runs_in_steps(batch):
            return self._run_steps(batch, starts, levels, states)
        return self._run_segments(batch, starts, levels, states)

    def _join(
        self,
        batch: ScheduledBatch,
        starts: np.ndarray,
        levels: np.ndarray,
        states: np.ndarray,
        done: np.ndarray,
    ) -> torch.Tensor:
        """Put prefetched tokens and what is left of the batch together."""
        finished = self.states.finished
        assert finished is not None, (
            "tokens with all segments behind them were prefetched"
        )
        width = self.states.window
        rows = finished.first[states[done] // width] + states[done] % width
        if done.all():
            if np.array_equal(rows, np.arange(len(rows))):
                return finished.hidden[: len(rows)]
            return finished.hidden.index_select(0, self.executor.to_device(rows))
        # Before the rest, which may need the same buffer.
        known = finished.hidden.index_select(0, self.executor.to_device(rows))
        tokens = np.flatnonzero(~done)
        index = self.executor.to_device(tokens)
        subset = _suffix(batch, starts, tokens)
        rest = ScheduledBatch(
            rows=subset.rows,
            first=subset.first,
            count=subset.count,
            token_ids=batch.token_ids.index_select(0, index),
            embeddings=None
            if batch.embeddings is None
            else batch.embeddings.index_select(0, index),
        )
        starts = np.concatenate(([0], np.cumsum(subset.count)))
        ran = self._run(rest, starts, levels[tokens], states[tokens])
        hidden = ran.new_empty((len(done), ran.shape[1]))
        hidden.index_copy_(0, self.executor.to_device(np.flatnonzero(done)), known)
        return hidden.index_copy_(0, index, ran)

    def runs_in_steps(self, batch: ScheduledBatch) -> bool:
        """Whether a batch runs in whole steps, which need no forward context."""
        steps = self.executor.steps
        return (
            steps is not None
            and int(batch.count.sum()) <= steps.max_tokens
            and int(batch.count.max()) <= self.states.window
            and batch.embeddings is None
        )

    def _run_steps(
        self,
        batch: ScheduledBatch,
        starts: np.ndarray,
        levels: np.ndarray,
        states: np.ndarray,
    ) -> torch.Tensor:
        """Let hidden states flow through the pending states' buffer."""
        steps = self.executor.steps
        assert steps is not None, "checked by the caller"
        hidden = None
        for segment in range(self.executor.num_segments):
            tokens = np.flatnonzero(levels <= segment)
            if not len(tokens):
                continue
            token_ids = None
            if segment == 0:
                index = self.executor.to_device(tokens)
                token_ids = batch.token_ids.index_select(0, index)
            hidden = steps.resume(
                segment, _suffix(batch, starts, tokens), states[tokens], token_ids
            )
            self.stats.count_segment(segment, len(tokens))
        assert hidden is not None, "the last segment runs every token"
        return hidden

    def _run_segments(
        self,
        batch: ScheduledBatch,
        starts: np.ndarray,
        levels: np.ndarray,
        states: np.ndarray,
    ) -> torch.Tensor:
        """Carry hidden states from segment to segment; pending tokens join in."""
        hidden = residual = None
        previous = np.empty(0, np.int64)
        for segment in range(self.executor.num_segments):
            tokens = np.flatnonzero(levels <= segment)
            if not len(tokens):
                continue
            waiting = tokens[levels[tokens] == segment]
            if segment == 0:
                hidden, residual = self._embed(batch, waiting), None
            elif len(waiting):
                index = self.executor.to_device(states[waiting])
                hidden, residual = self._merge(
                    tokens, previous, hidden, residual, waiting, index
                )
            subset = _suffix(batch, starts, tokens)
            assert hidden is not None, "a segment with tokens has their states"
            hidden, residual = self.executor.run(segment, subset, hidden, residual)
            self.stats.count_segment(segment, len(tokens))
            previous = tokens

        assert hidden is not None, "the last segment runs every token"
        return hidden

    def _embed(self, batch: ScheduledBatch, tokens: np.ndarray) -> torch.Tensor:
        index = self.executor.to_device(tokens)
        if batch.embeddings is not None:
            return batch.embeddings.index_select(0, index)
        return self.executor.embed(batch.token_ids.index_select(0, index))

    def _merge(
        self,
        tokens: np.ndarray,
        previous: np.ndarray,
        hidden: torch.Tensor | None,
        residual: torch.Tensor | None,
        waiting: np.ndarray,
        index: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put tokens that ran so far and those that join now into batch order."""
        joined_hidden, joined_residual = self.states.read(index)
        if hidden is None or residual is None:
            return joined_hidden, joined_residual
        order = np.argsort(np.concatenate((previous, waiting)), kind="stable")
        permutation = self.executor.to_device(order)
        return (
            torch.cat((hidden, joined_hidden)).index_select(0, permutation),
            torch.cat((residual, joined_residual)).index_select(0, permutation),
        )


def _suffix(
    batch: ScheduledBatch, starts: np.ndarray, tokens: np.ndarray
) -> TokenSubset:
    """Describe batch tokens, a suffix of each request by I1, as a subset.

    Args:
        batch: The batch.
        starts: (B + 1,) index of each request's first token.
        tokens: (n,) sorted indices into the batch's tokens.

    Returns:
        The subset, without requests that have no token in it.
    """
    bounds = np.searchsorted(tokens, starts)
    count = np.diff(bounds)
    present = count > 0
    return TokenSubset(
        rows=batch.rows[present],
        first=(batch.first + batch.count - count)[present],
        count=count[present],
    )
