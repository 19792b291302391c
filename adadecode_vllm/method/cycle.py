# SPDX-License-Identifier: Apache-2.0
"""The requests of a drafting cycle, and their windows while they grow."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from adadecode_vllm.method.admission import Admission
from adadecode_vllm.method.executor import TokenSubset
from adadecode_vllm.method.ledger import Window


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
        slots_left: (R,) int64, KV slots that belong to the request from the newest
            token's position on. With more than its early predictions need, the last of
            these may be prefetched; None for never.
        thresholds: (R, K) the requests' own thresholds on the exits' probabilities;
            None for the policy's.
        alone: Whether the next step will hold these requests only, as far as is known.
        contexts: R requests' verified tokens, (n,) int32 each, where drafts by n-gram
            lookup follow the early predictions, and None where none do; None for
            nowhere. With any, nothing of the next step is prefetched: they have to run.
        ways: R strings, how requests use the lookup: `first`, before the exits; `tail`,
            behind them; `chain`, beside them, token by token; or `off`. None where none
            does.
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
    slots_left: np.ndarray | None = None
    thresholds: np.ndarray | None = None
    alone: bool = False
    contexts: Sequence[np.ndarray | None] | None = None
    ways: Sequence[str] | None = None
    final_states: torch.Tensor | None = None
    final_rows: np.ndarray | None = None
    admission: Admission | None = None

    @property
    def least(self) -> np.ndarray:
        """(R,) float64, what drafts must promise; NaN where thresholds decide."""
        if self.admission is None:
            return np.full(len(self.rows), np.nan)
        return self.admission.least

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
            slots_left=None if self.slots_left is None else self.slots_left[requests],
            thresholds=None if self.thresholds is None else self.thresholds[requests],
            contexts=None
            if self.contexts is None
            else [self.contexts[request] for request in requests],
            ways=None
            if self.ways is None
            else [self.ways[request] for request in requests],
            final_states=self.final_states,
            final_rows=None if self.final_rows is None else self.final_rows[requests],
            admission=self.admission and self.admission.select(requests),
        )


class Cycle:
    """The windows of R requests while they grow.

    By I1 the tokens of a window that stand at a level are next to each other, lower
    levels further back, so their number per level says it all. Every round of a cycle
    costs the host a fixed handful of array operations.

    Attributes:
        by_costs: (R,) bool, whether costs decide for the request, and not thresholds.
        active: (R,) bool, whether the request goes on.
        front_level: (R,) int64, level of the front token; -1 where the exit that reads
            the embedding has not scored it.
        promised: (R,) what the last exit promised of the next token, where costs
            decide.
        asking_cost: (R,) what asking the exits has taken, in tokens, where costs
            decide.
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
        self.promised = np.zeros(size)
        self.asking_cost = np.zeros(size)
        self._length = np.ones(size, np.int64)
        self._count = np.zeros((num_segments + 1, size), np.int64)
        self._count[0] = 1
        self._limit = requests.limits + 1
        self._front = np.array(requests.token_ids, np.int64)
        self._least = requests.least
        self.by_costs = ~np.isnan(self._least)
        self.active = requests.limits > 0
        self.front_level = np.full(size, first_level, np.int64)

    def fronts(self, chosen: np.ndarray) -> tuple[TokenSubset, np.ndarray, np.ndarray]:
        """The front tokens of some requests, (r,); as `standing`."""
        return self._last(chosen, np.ones_like(chosen))

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

    @property
    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """(R, W) and (R,) int64: the windows, and how many of their tokens count."""
        return self._token_ids, self._length

    def prospects(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What decides whether a draft of some requests pays; (r,) each.

        Returns:
            How probably all their drafts are right; what a further one has to promise,
            NaN where thresholds decide.
        """
        return self._survival[chosen], self._least[chosen]

    def room(self, chosen: np.ndarray) -> np.ndarray:
        """How many drafts some requests may still make; (r,) int64."""
        return self._limit[chosen] - self._length[chosen]

    def predict(
        self,
        chosen: np.ndarray,
        token_ids: np.ndarray,
        exits: np.ndarray,
        expected: np.ndarray | None,
        promise: np.ndarray | None,
        least_ratio: float = 1.0,
    ) -> None:
        """Append drafts.

        Args:
            chosen: (r,) int64, the requests.
            token_ids: (r,) int64, a token for each.
            exits: (r,) see :class:`Window`.
            expected: (r,) see :class:`Window`; None where nobody asks.
            promise: (r,) how probably it is accepted where those before it are, with
                what is known of the request; None as well.
            least_ratio: How many times what a draft must promise it has to be probable
                that all drafts are right, where costs decide, for a request to go on.
        """
        length = self._length[chosen]
        self._token_ids[chosen, length] = token_ids
        self._exits[chosen, length] = exits
        survival = self._survival[chosen]
        if expected is not None and promise is not None:
            self._expected[chosen, length] = expected
            survival *= promise
            self._survival[chosen] = survival
        self._front[chosen] = token_ids
        self.front_level[chosen] = self._first_level
        self._count[0][chosen] += 1
        length += 1
        self._length[chosen] = length
        goes_on = self.active[chosen] & (length < self._limit[chosen])
        # Below, no further draft would pay its time, whatever an exit said.
        goes_on &= ~(survival <= least_ratio * self._least[chosen])
        stops = self._requests.stop_token_ids
        for index, (request, token) in enumerate(
            zip(chosen.tolist(), token_ids.tolist(), strict=True)
        ):
            if token in stops[request]:
                goes_on[index] = False
        self.active[chosen] = goes_on

    def fresh_drafts(self) -> np.ndarray:
        """Requests whose newest prediction has not run and has a KV slot; (r,)."""
        if self._requests.slots_left is None:
            return np.empty(0, np.int64)
        fresh = (self.front_level <= 0) & (self._length > 1)
        return np.flatnonzero(fresh & (self._length <= self._requests.slots_left))

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows."""
        return int(self._length.sum())

    def has_slots(self) -> bool:
        """Whether every token has a KV slot: that of a new prediction may not."""
        slots_left = self._requests.slots_left
        return slots_left is not None and bool(
            ((self.front_level > 0) | (self._length <= slots_left)).all()
        )

    def window(self) -> Window:
        """The windows as they are now."""
        levels = np.zeros(self._token_ids.shape, np.int8)
        if self._count[1:].any():
            used = np.arange(self._width) < self._length[:, None]
            # The oldest tokens have come furthest.
            descending = np.arange(len(self._count), dtype=np.int8)[::-1]
            levels[used] = np.repeat(
                np.tile(descending, len(self._length)), self._count[::-1].T.ravel()
            )
        window = Window(
            self._requests.positions,
            self._length,
            self._token_ids,
            levels,
            self._exits,
        )
        if self._requests.admission is None:
            return window
        return replace(
            window,
            expected=self._expected,
            survival=self._survival,
            asking_cost=self.asking_cost,
        )
