# SPDX-License-Identifier: Apache-2.0
"""Which tokens are pending, how far each has come, and when that stops being true.

The ledger holds one drafting cycle. Its entries may be used in the engine step right
after the one that wrote them and in no other (I2): in that step vLLM schedules the
window of every request that goes on, and whatever it does not schedule (preempted,
aborted, skipped, truncated by a grammar) is gone. Dropping an entry is always correct:
its tokens then run from the first layer and rewrite the same KV.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REASONS = (
    "skipped_step",
    "not_scheduled",
    "moved",
    "truncated",
    "changed",
    "weights_reloaded",
    "weights_updated",
    "slept",
)
"""Why pending tokens are dropped."""


@dataclass(frozen=True)
class Window:
    """The drafting state of R requests, one row each, W tokens wide.

    Attributes:
        first_position: (R,) int64, position of the newest sampled token.
        length: (R,) int64, 1 + number of early predictions.
        token_ids: (R, W) int64; columns at and beyond ``length`` are undefined.
        levels: (R, W) int8, segments run per token; undefined as ``token_ids``.
        exits: (R, W) int8, the exit that predicted the token. -1 less the evidence for
            it where it was looked up; -1 for column 0.
        expected: (R, W) float64, how probably the token is accepted where those before
            it are, as its exit was calibrated; 1 for column 0 and where it was looked
            up. None where nobody asks.
        survival: (R,) float64, the probability that all drafts of a request are right;
            None where nobody asks.
        asking_cost: (R,) float64, what asking the exits for the request's next tokens
            took, in tokens; None where nobody asks.
    """

    first_position: np.ndarray
    length: np.ndarray
    token_ids: np.ndarray
    levels: np.ndarray
    exits: np.ndarray
    expected: np.ndarray | None = None
    survival: np.ndarray | None = None
    asking_cost: np.ndarray | None = None

    @property
    def begun(self) -> np.ndarray:
        """(R, W) bool, tokens that some segment has run for."""
        columns = np.arange(self.levels.shape[1])
        return (columns < self.length[:, None]) & (self.levels > 0)

    @property
    def pending(self) -> np.ndarray:
        """(R,) bool, requests with such a token."""
        return self.begun.sum(axis=1) > 0


@dataclass(frozen=True)
class Resumable:
    """Pending tokens that the current step may resume.

    Attributes:
        requests: (M,) int64, batch rows of the current step.
        slots: (M,) int64, the requests' rows in the drafting cycle's buffers.
        levels: (M, W) int8, the tokens' levels; 0 beyond the agreeing prefix.
    """

    requests: np.ndarray
    slots: np.ndarray
    levels: np.ndarray


class Ledger:
    """Pending tokens of one drafting cycle.

    Attributes:
        dropped: Requests whose pending tokens were discarded, by reason: one of
            `REASONS`.
        dropped_tokens: Those tokens, by reason.
    """

    def __init__(self) -> None:
        """Start with nothing pending."""
        self.dropped: Counter[str] = Counter()
        self.dropped_tokens: Counter[str] = Counter()
        self._request_ids: list[str] = []
        self._pending: list[str] = []
        self._window: Window | None = None
        self._step = -1

    def __len__(self) -> int:
        """Number of requests with pending tokens."""
        return len(self._pending)

    @property
    def request_ids(self) -> Sequence[str]:
        """The requests with pending tokens."""
        return self._pending

    def record(self, step: int, request_ids: Sequence[str], window: Window) -> None:
        """Replace the ledger's content by a new cycle's.

        Args:
            step: Number of the engine step that drafted.
            request_ids: The requests, in the order of the window's rows.
            window: Their state when drafting ended.
        """
        self._request_ids = list(request_ids)
        self._pending = []
        if window.levels.any():
            self._pending = [
                request_id
                for request_id, begun in zip(request_ids, window.pending, strict=True)
                if begun
            ]
        self._window = window
        self._step = step

    def clear(self, reason: str) -> None:
        """Drop everything, e.g. because the weights change.

        Args:
            reason: Key under which the drop is counted.
        """
        window = self._window
        if window is not None:
            self._count(reason, window.begun[window.pending])
        self._forget()

    def _forget(self) -> None:
        self._request_ids, self._pending, self._window = [], [], None

    def reset_counts(self) -> None:
        """Start counting drops from zero."""
        self.dropped.clear()
        self.dropped_tokens.clear()

    def take(
        self,
        step: int,
        batch_rows: dict[str, int],
        first_position: np.ndarray,
        count: np.ndarray,
        token_ids: np.ndarray | None,
    ) -> Resumable | None:
        """Hand out what may be resumed in this step and forget the rest.

        Args:
            step: Number of the current engine step.
            batch_rows: Request id to batch row, without requests whose KV cache was
                rebuilt since (new ones and those resumed after a preemption).
            first_position: (B,) int64, first scheduled position per batch row.
            count: (B,) int64, number of scheduled tokens per batch row.
            token_ids: (B, T) token ids by absolute position; a view of vLLM's own
                table is enough. None where the runner keeps the drafts itself, so that
                what it schedules is a prefix of the window by construction.

        Returns:
            The resumable tokens, or None when there are none.
        """
        window, request_ids = self._window, self._request_ids
        if window is None or not self._pending:
            return None
        if step != self._step + 1:
            self.clear("skipped_step")
            return None
        self._forget()

        rows = np.fromiter(
            (batch_rows.get(request_id, -1) for request_id in request_ids),
            dtype=np.int64,
            count=len(request_ids),
        )
        scheduled = rows >= 0
        slots = np.flatnonzero(scheduled)
        rows = rows[slots]
        begun = window.begun
        pending = window.pending
        self._count("not_scheduled", begun[pending & ~scheduled])

        aligned = first_position[rows] == window.first_position[slots]
        moved = slots[~aligned]
        self._count("moved", begun[moved[pending[moved]]])
        rows, slots = rows[aligned], slots[aligned]
        if not len(rows):
            return None

        offsets = np.arange(window.token_ids.shape[1])
        within = offsets < count[rows, None]
        past = begun[slots] & ~within
        self._count("truncated", past[past.any(axis=1)])
        prefix = (offsets < window.length[slots, None]) & within
        if token_ids is not None:
            positions = window.first_position[slots, None] + offsets
            # Columns past the table's end are past the scheduled tokens as well.
            positions = np.minimum(positions, token_ids.shape[1] - 1)
            scheduled_ids = token_ids[rows[:, None], positions]
            valid, agrees = prefix, prefix & (scheduled_ids == window.token_ids[slots])
            prefix = np.logical_and.accumulate(agrees, axis=1)
            cut = (prefix.sum(1) < valid.sum(1)) & pending[slots]
            self._count("changed", (begun[slots] & valid & ~prefix)[cut])

        levels = np.where(prefix, window.levels[slots], 0).astype(np.int8)
        useful = levels[:, 0] > 0
        if not useful.any():
            return None
        return Resumable(rows[useful], slots[useful], levels[useful])

    def _count(self, reason: str, lost: np.ndarray) -> None:
        """Count what is dropped: (r, W) bool, the tokens whose work is lost."""
        if len(lost):
            self.dropped[reason] += len(lost)
            self.dropped_tokens[reason] += int(np.count_nonzero(lost))
