# SPDX-License-Identifier: Apache-2.0
"""What steps yield and take, by how many requests and drafts they hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

WINDOW_STEPS = 32
"""Steps that an average remembers."""

COST_STEPS = 128
"""Steps that the cost of a draft is estimated from."""

USUAL_COST = 0.05
"""Share of a step that a draft or a request is taken to cost until steps have told."""

USUAL_PROMISE = 0.9
"""The most that a draft is taken to have to promise until then."""

USUAL_SPREAD = 64.0
"""Weight of that beside steps: their number times the variance of what they hold."""

USUAL_STEPS = 8
"""Steps from which on one that takes much longer than they did is cut short."""


@dataclass
class Rate:
    """Tokens per second over the last steps.

    Attributes:
        tokens: What they yielded, the older the less.
        seconds: What they took.
        requests: How many requests they had.
        steps: Their number.
        first: What the first ones took.
    """

    tokens: float = 0.0
    seconds: float = 0.0
    requests: float = 0.0
    steps: float = 0.0
    first: list[float] = field(default_factory=list)

    def add(self, requests: int, tokens: int, seconds: float) -> None:
        """Note a step: its requests, what it yielded and what it took."""
        keep = 1.0 - 1.0 / WINDOW_STEPS
        if len(self.first) < USUAL_STEPS:
            # The very first may be the one that was held up.
            self.first.append(seconds)
            self.seconds = 0.0
            for earlier in _bounded(self.first):
                self.seconds = keep * self.seconds + earlier
        else:
            self.seconds = keep * self.seconds + min(seconds, self.longest)
        self.steps = keep * self.steps + 1
        self.tokens = keep * self.tokens + tokens
        self.requests = keep * self.requests + requests

    @property
    def longest(self) -> float:
        """The most that a step is taken to last: what is above says nothing of it."""
        if len(self.first) < USUAL_STEPS:
            return 3 * median(self.first)
        return 3 * self.seconds / self.steps

    def at(self, requests: float, request_seconds: float) -> float:
        """Tokens per second of steps with another number of requests.

        Args:
            requests: Their number.
            request_seconds: What one more adds to a step; at most its share of one.
        """
        if not self.seconds:
            return 0.0
        usual, seconds = self.requests / self.steps, self.seconds / self.steps
        seconds += min(request_seconds, seconds / usual) * (requests - usual)
        return self.tokens / self.steps * requests / usual / seconds


def _bounded(seconds: list[float]) -> list[float]:
    """Times of the first steps, each at most thrice what is usual of them."""
    longest = 3 * median(seconds)
    return [min(own, longest) for own in seconds]


class StepTimes:
    """What one more request, and one more draft, adds to a step with drafts.

    By least squares over the last steps. Both at once: while a batch empties, requests
    and drafts change together.

    Attributes:
        request_seconds: For a request.
        draft_seconds: For a draft, the making not included.
    """

    def __init__(self) -> None:
        """Start without any."""
        # Over steps, in plain floats: so few are slower in arrays.
        self._sums = [0.0] * 9
        # Of the first steps: requests and drafts, and seconds.
        self._held: list[tuple[int, int]] = []
        self._first: list[float] = []
        self.request_seconds = self.draft_seconds = 0.0

    def add(self, requests: int, drafts: int, seconds: float) -> None:
        """Note a step: requests, drafts and what it took without their making."""
        if len(self._first) < USUAL_STEPS:
            self._held.append((requests, drafts))
            self._first.append(seconds)
            self._sums = [0.0] * 9
            for held, own in zip(self._held, _bounded(self._first), strict=True):
                self._sum_up(*held, own)
        else:
            longest = 3 * self._sums[3] / self._sums[0]
            self._sum_up(requests, drafts, min(seconds, longest))
        self._solve()

    def _sum_up(self, requests: int, drafts: int, seconds: float) -> None:
        terms = (
            1.0,
            requests,
            drafts,
            seconds,
            requests * requests,
            requests * drafts,
            drafts * drafts,
            requests * seconds,
            drafts * seconds,
        )
        keep = 1.0 - 1.0 / COST_STEPS
        self._sums = [
            keep * old + new for old, new in zip(self._sums, terms, strict=True)
        ]

    def _solve(self) -> None:
        steps, r, d, s, rr, rd, dd, rs, ds = self._sums
        usual = USUAL_SPREAD * min(USUAL_COST, USUAL_PROMISE * steps / r) * s / steps
        rr += USUAL_SPREAD - r * r / steps
        dd += USUAL_SPREAD - d * d / steps
        rd -= r * d / steps
        rs += usual - r * s / steps
        ds += usual - d * s / steps
        both = rr * dd - rd * rd
        self.request_seconds = max((rs * dd - ds * rd) / both, 0.0)
        self.draft_seconds = max((ds * rr - rs * rd) / both, 0.0)
