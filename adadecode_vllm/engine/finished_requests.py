# SPDX-License-Identifier: Apache-2.0
"""What became of the requests that ended lately, from the scheduler to the API server.

It travels with a step's statistics, as the counters do. With several API servers a
step's statistics reach one of them, so each knows of some of the requests.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import astuple, dataclass
from typing import Any

FINISHED_KEY = "adadecode_finished"
"""Where the requests stand in ``ec_connector_stats``, beside the counters."""

REMEMBERED = 200
"""Requests that are remembered, the newest ones."""


@dataclass(frozen=True)
class FinishedRequest:
    """A request that ended.

    Attributes:
        request_id: The engine's, which begins with the one in the response.
        ended: When, in seconds since 1970.
        seconds: From its arrival to its end.
        reason: ``stop``, ``length``, ``abort`` and so on. A stop string is found by the
            API server, which aborts the request.
        prompt_tokens: Tokens of the prompt.
        tokens: Tokens that were generated.
        drafted: Drafts that were verified: early predictions, and those by n-gram
            lookup where that is on.
        accepted: Of those, confirmed by the final layer; at most ``tokens``.
    """

    request_id: str
    ended: float
    seconds: float
    reason: str
    prompt_tokens: int
    tokens: int
    drafted: int
    accepted: int


class RequestLog:
    """The scheduler's side: drafts of running requests, and those that ended."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._drafts: dict[str, tuple[int, int]] = {}
        self._ended: list[tuple[Any, ...]] = []

    def count(self, request_id: str, drafted: int, accepted: int) -> None:
        """Note the drafts of one step of a request."""
        before = self._drafts.get(request_id, (0, 0))
        self._drafts[request_id] = (before[0] + drafted, before[1] + accepted)

    def end(self, request: Any) -> None:
        """Note the end of a request.

        Args:
            request: vLLM's.
        """
        drafted, accepted = self._drafts.pop(request.request_id, (0, 0))
        now = time.time()
        tokens = request.num_output_tokens
        ended = FinishedRequest(
            request_id=request.request_id,
            ended=now,
            seconds=now - request.arrival_time,
            reason=str(request.get_finished_reason()),
            prompt_tokens=request.num_prompt_tokens,
            tokens=tokens,
            drafted=drafted,
            # What follows the end of a text was accepted, but is not part of it.
            accepted=min(accepted, tokens),
        )
        self._ended.append(astuple(ended))

    def take(self) -> list[tuple[Any, ...]]:
        """The requests that ended since the last call, as plain values."""
        taken, self._ended = self._ended, []
        return taken


class RecentRequests:
    """The API server's side: the requests that ended last."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        """Start with nothing.

        Args:
            remembered: How many are kept.
        """
        self._requests: deque[FinishedRequest] = deque(maxlen=remembered)

    def add(self, ended: list[tuple[Any, ...]]) -> None:
        """Remember what :meth:`RequestLog.take` gave."""
        self._requests.extend(FinishedRequest(*values) for values in ended)

    def newest(self) -> list[FinishedRequest]:
        """The requests, newest first."""
        return list(self._requests)[::-1]


RECENT = RecentRequests()
"""Those of this process; its loggers write them, its page reads them."""
