# SPDX-License-Identifier: Apache-2.0
"""Drafting only where and as far as it pays, by timing the engine's own steps.

What a verified row costs, how often drafts are right and what the host adds depend on
the machine, the text and the number of requests. The scheduler sees two figures that
hold all of it. Tokens per second with drafts and without tell whether to draft at all.
By how much steps with more drafts take longer tells what one more has to promise: in
that time the engine would otherwise yield so many tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adadecode_vllm.engine.exit_times import ExitClock, ExitTimes
from adadecode_vllm.engine.step_times import (
    USUAL_COST,
    USUAL_PROMISE,
    Rate,
    StepTimes,
)

logger = logging.getLogger("vllm.adadecode")

SETTLE_STEPS = 2
"""Steps after a change that are not counted: one verifies what an earlier one drafted,
and with asynchronous scheduling one was scheduled before the change."""

MANY = 16
"""Requests from which on drafts have to be found to pay first.

Fewer begin with drafts. So many seldom gain much, and while their prompts are computed,
of which nothing can be learnt, drafts make others wait for their first token.
"""

FIRST_STEPS = 12
"""Counted steps before the first look at the other way."""

PROBE_STEPS = 12
"""Counted steps of a look at the other way."""

CLEAR_STEPS = 4
CLEAR = 1.3
"""From so many counted steps on a look at steps without drafts ends where these are so
many times slower. They are much alike, unlike those with drafts."""

PROBE_COST = 0.01
"""Share of time that looking at the slower way may cost."""

SHORTEST = 48
LONGEST = 4096
"""Fewest and most steps between two looks."""

LONGER = 4
"""How many times longer than the last a pause may be, the first one than the shortest:
an answer's beginning says little of the rest."""

WORTH = 1.03
"""How much faster steps with drafts must be than those without to be worth as much.

Tokens per second of a step say a little too much of drafts: they end some requests
early, and where nothing waits for the room, the others go on in smaller steps, of which
each token takes more.
"""

BETTER = 1.01
"""How much more the other way must be worth for a change."""

ADMISSION = (0.02, 1.0)
"""Bounds of what a draft must promise."""


class _Size:
    """One range of batch sizes: which way is faster, and when to look again.

    Attributes:
        drafts: Whether the next step drafts.
        times: What requests and drafts add to a step.
        exits: How long it takes to ask them.
        rates: By whether they drafted, what steps yielded.
    """

    def __init__(self, drafts: bool) -> None:
        self.drafts = self._best = drafts
        self.times = StepTimes()
        self.exits = ExitTimes()
        self.rates = {True: Rate(), False: Rate()}
        self._left = FIRST_STEPS
        self._pause = SHORTEST

    def admission(self, requests: int) -> float:
        """What a draft must promise: the tokens of the time that it takes."""
        rate = self.rates[True].at(requests, self.times.request_seconds)
        # Until something is known, a step yields a token for each request.
        promise = (
            self.times.draft_seconds * rate
            if rate
            else min(USUAL_COST * requests, USUAL_PROMISE)
        )
        return min(max(promise, ADMISSION[0]), ADMISSION[1])

    def exit_costs(self, requests: int) -> list[float]:
        """What asking each exit takes, in tokens; NaN where that is not known."""
        rate = self.rates[True].at(requests, self.times.request_seconds)
        return self.exits.in_tokens(rate)

    def compare(
        self, requests: int, drafted: bool, tokens: int, seconds: float
    ) -> Compared:
        """A step beside one without drafts, where the speed of these is known."""
        own = self.rates[drafted]
        seconds = min(seconds, own.longest)
        if not drafted:
            return Compared(seconds, seconds)
        plain = self.rates[False].at(requests, self.times.request_seconds)
        return Compared(seconds, tokens / plain) if plain else Compared()

    def count(
        self,
        requests: int,
        drafted: bool,
        drafts: int,
        tokens: int,
        seconds: float,
        drafting: float,
    ) -> bool:
        """Note a step, and whether the next ones go another way.

        Args:
            requests: Its requests.
            drafted: Whether it was to draft.
            drafts: Drafts that it verified.
            tokens: Tokens that it yielded.
            seconds: What it took.
            drafting: What of that the making of drafts did.
        """
        self.rates[drafted].add(requests, tokens, seconds)
        if drafted:
            self.times.add(requests, drafts, max(seconds - drafting, 0.0))
        if drafted is not self.drafts:
            return False
        self._left -= 1
        if self._left > 0 and not self._ends_early(requests):
            return False
        if self.drafts is self._best:
            # Look at the other way, as it is now.
            self.drafts = not self._best
            self.rates[self.drafts] = Rate()
            self._left = PROBE_STEPS
            return True
        steps = PROBE_STEPS - self._left
        known, other = self._worth(requests)
        if other > BETTER * known:
            self._best = self.drafts
        slower, faster = sorted((known, other))
        loss = 1.0 - slower / faster if faster else 0.0
        pause = (steps + SETTLE_STEPS) * loss / PROBE_COST
        longest = min(self._pause * LONGER, LONGEST)
        self._left = self._pause = int(min(max(pause, SHORTEST), longest))
        changed = self.drafts is not self._best
        self.drafts = self._best
        return changed

    def _worth(self, requests: int) -> tuple[float, float]:
        """What the way that is taken for better, and the other, are worth."""
        known, other = (
            self.rates[way].at(requests, self.times.request_seconds)
            * (1.0 if way else WORTH)
            for way in (self._best, not self._best)
        )
        return known, other

    def _ends_early(self, requests: int) -> bool:
        """Whether a look has seen enough of steps without drafts."""
        looks = self._best and not self.drafts
        if not looks or PROBE_STEPS - self._left < CLEAR_STEPS:
            return False
        known, other = self._worth(requests)
        return known > CLEAR * other


@dataclass(frozen=True)
class Compared:
    """Steps of which it is known how long they would have taken without drafts.

    Attributes:
        seconds: What they took.
        plain_seconds: What their tokens would have taken without drafts, by the speed
            of the last steps without any and about as many requests.
    """

    seconds: float = 0.0
    plain_seconds: float = 0.0

    def __add__(self, other: Compared) -> Compared:
        """Both together."""
        return Compared(
            self.seconds + other.seconds, self.plain_seconds + other.plain_seconds
        )


class AdaptiveDrafting:
    """Decides for each number of requests whether a step drafts.

    Numbers of requests are taken together by powers of two. Decisions are the
    scheduler's, so that every worker takes the same (I7).
    """

    def __init__(
        self, most_requests: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Begin with drafting where requests are few.

        Args:
            most_requests: Most requests of a step.
            clock: Seconds.
        """
        self._clock = clock
        self._sizes = [
            _Size(drafts=1 << bits < MANY) for bits in range(most_requests.bit_length())
        ]
        self._ended: float | None = None
        self._drafted: bool | None = None
        self._same = 0
        self._compared = Compared()
        self._exit_clock = ExitClock()
        self._drafting_before = 0.0

    def drafts(self, requests: int) -> bool:
        """Whether a step of so many requests drafts; at least one."""
        return self._sizes[requests.bit_length() - 1].drafts

    def admission(self, requests: int) -> float:
        """The least probability of a draft that pays in a step of so many requests."""
        return self._sizes[requests.bit_length() - 1].admission(requests)

    def exit_costs(self, requests: int) -> list[float]:
        """What asking each exit takes in a step of so many requests, in tokens."""
        return self._sizes[requests.bit_length() - 1].exit_costs(requests)

    def take_compared(self) -> Compared | None:
        """What was compared since the last call; None for nothing."""
        taken, self._compared = self._compared, Compared()
        return taken if taken.seconds else None

    def pause(self) -> None:
        """Time nothing up to the next step, as others decide who drafts."""
        self._ended = self._drafted = None

    def step(
        self,
        *,
        requests: int,
        drafted: bool,
        drafts: int,
        tokens: int,
        decodes: bool,
        busy: bool,
        drafting_seconds: float | None = None,
        exit_seconds: np.ndarray | None = None,
    ) -> bool:
        """Note the end of a step.

        Args:
            requests: Its requests.
            drafted: Whether it was to draft.
            drafts: Drafts that it verified.
            tokens: Tokens that it yielded.
            decodes: Whether it held no part of a prompt, which says nothing of drafts.
            busy: Whether another step follows at once.
            drafting_seconds: What drafting has taken so far; None where nobody knows.
            exit_seconds: (2, K) what asking the exits has taken so far; see
                :meth:`adadecode_vllm.method.stats.Stats.exit_seconds`. None in most
                steps.

        Returns:
            Whether :meth:`drafts` answers differently now.
        """
        began, self._ended = self._ended, self._clock()
        self._same = self._same + 1 if drafted is self._drafted else 0
        self._drafted = drafted
        drafting = self._drafting(drafting_seconds)
        changed = False
        asked = self._exit_clock.step(requests.bit_length(), exit_seconds)
        if asked is not None and requests:
            self._sizes[requests.bit_length() - 1].exits.add(*asked)
        if began is not None and requests and decodes and self._same >= SETTLE_STEPS:
            size = self._sizes[requests.bit_length() - 1]
            seconds = self._ended - began
            changed = size.count(requests, drafted, drafts, tokens, seconds, drafting)
            self._compared += size.compare(requests, drafted, tokens, seconds)
            if changed:
                logger.debug(
                    "adadecode: steps of about %d requests %s drafts: %.1f tokens/s "
                    "with, %.1f without; a draft pays above %.2f",
                    requests,
                    "have" if size.drafts else "have no",
                    size.rates[True].at(requests, size.times.request_seconds),
                    size.rates[False].at(requests, size.times.request_seconds),
                    size.admission(requests),
                )
        if not busy:
            self._ended = None
        return changed

    def _drafting(self, so_far: float | None) -> float:
        """What drafting took since it was known last; 0 where it is not known."""
        if so_far is None:
            return 0.0
        before, self._drafting_before = self._drafting_before, so_far
        # Counters may have been set to zero in between.
        return max(so_far - before, 0.0)
