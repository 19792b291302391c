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

logger = logging.getLogger("vllm.adadecode")

SETTLE_STEPS = 2
"""Steps after a change that are not counted: one verifies what an earlier one drafted,
and with asynchronous scheduling one was scheduled before the change."""

FIRST_STEPS = 12
"""Counted steps with drafts before the first without."""

PROBE_STEPS = 12
"""Counted steps of a look at the other way."""

PROBE_COST = 0.01
"""Share of time that looking at the slower way may cost."""

SHORTEST = 48
LONGEST = 4096
"""Fewest and most steps between two looks."""

BETTER = 1.01
"""How much faster the other way must be for a change."""

WINDOW_STEPS = 32
"""Steps that an average remembers."""

COST_STEPS = 128
"""Steps that the cost of a draft is estimated from."""

USUAL_COST = 0.05
"""Share of a step that a draft is taken to cost until steps have told, or as much as
one of the step's requests if that is less."""

USUAL_SPREAD = 64.0
"""Weight of that beside steps: their number times the variance of their drafts."""

USUAL_STEPS = 8
"""Steps from which on one that takes much longer than they did is cut short."""

ADMISSION = (0.02, 0.9)
"""Bounds of what a draft must promise."""


@dataclass
class _Rate:
    """Tokens per second over the last steps."""

    tokens: float = 0.0
    seconds: float = 0.0
    steps: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        seconds = _usual(seconds, self.seconds, self.steps)
        keep = 1.0 - 1.0 / WINDOW_STEPS
        self.steps = keep * self.steps + 1
        self.tokens = keep * self.tokens + tokens
        self.seconds = keep * self.seconds + seconds

    @property
    def value(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def _usual(seconds: float, before: float, steps: float) -> float:
    """A step's time, bounded by thrice the average of some steps before.

    What something else held up says nothing of drafts.
    """
    return seconds if steps < USUAL_STEPS else min(seconds, 3 * before / steps)


class _DraftCost:
    """What one more draft adds to a step, by least squares over the last steps.

    Attributes:
        usual: Share of a step that is assumed until steps have told.
    """

    def __init__(self, usual: float) -> None:
        self.usual = usual
        # Sums over steps: 1, drafts, seconds, drafts squared, drafts times seconds.
        self._sums = np.zeros(5)

    def add(self, drafts: int, seconds: float) -> None:
        seconds = _usual(seconds, self._sums[2], self._sums[0])
        keep = 1.0 - 1.0 / COST_STEPS
        terms = (1, drafts, seconds, drafts * drafts, drafts * seconds)
        self._sums = keep * self._sums + terms

    @property
    def seconds(self) -> float:
        steps, drafts, seconds, squares, products = self._sums.tolist()
        if not steps:
            return 0.0
        spread = squares - drafts * drafts / steps
        usual = self.usual * seconds / steps
        found = products - drafts * seconds / steps + usual * USUAL_SPREAD
        return max(found / (spread + USUAL_SPREAD), 0.0)


class _Size:
    """One range of batch sizes: which way is faster, and when to look again.

    Attributes:
        drafts: Whether the next step drafts.
        draft_cost: What one more draft costs.
    """

    def __init__(self, requests: int) -> None:
        self._requests = requests
        self.drafts = True
        self.draft_cost = _DraftCost(min(USUAL_COST, 1.0 / requests))
        self.rates = {True: _Rate(), False: _Rate()}
        self._best = True
        self._left = FIRST_STEPS

    @property
    def admission(self) -> float:
        """What a draft must promise: the tokens of the time that it takes."""
        rate = self.rates[True].value
        promise = self.draft_cost.seconds * rate
        if not rate:
            # Nothing is known yet: a step yields a token for each request.
            promise = self.draft_cost.usual * self._requests
        return min(max(promise, ADMISSION[0]), ADMISSION[1])

    def compare(self, drafted: bool, tokens: int, seconds: float) -> Compared:
        """A step beside one without drafts, where the speed of these is known."""
        plain, own = self.rates[False], self.rates[drafted]
        seconds = _usual(seconds, own.seconds, own.steps)
        if not drafted:
            return Compared(seconds, seconds)
        if not plain.tokens:
            return Compared()
        return Compared(seconds, tokens / plain.value)

    def count(self, drafted: bool, drafts: int, tokens: int, seconds: float) -> bool:
        """Note a step, and whether the next ones go another way."""
        self.rates[drafted].add(tokens, seconds)
        if drafted:
            self.draft_cost.add(drafts, seconds)
        if drafted is not self.drafts:
            return False
        self._left -= 1
        if self._left > 0:
            return False
        if self.drafts is self._best:
            # Look at the other way.
            self.drafts = not self._best
            self._left = PROBE_STEPS
            return True
        known, other = (self.rates[way].value for way in (self._best, self.drafts))
        if other > BETTER * known:
            self._best = self.drafts
        slower, faster = sorted((known, other))
        loss = 1.0 - slower / faster if faster else 0.0
        pause = (PROBE_STEPS + SETTLE_STEPS) * loss / PROBE_COST
        self._left = int(min(max(pause, SHORTEST), LONGEST))
        changed = self.drafts is not self._best
        self.drafts = self._best
        return changed


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
        """Begin with drafting everywhere.

        Args:
            most_requests: Most requests of a step.
            clock: Seconds.
        """
        self._clock = clock
        self._sizes = [_Size(1 << power) for power in range(most_requests.bit_length())]
        self._ended: float | None = None
        self._drafted: bool | None = None
        self._same = 0
        self._compared = Compared()

    def drafts(self, requests: int) -> bool:
        """Whether a step of so many requests drafts; at least one."""
        return self._sizes[requests.bit_length() - 1].drafts

    def admission(self, requests: int) -> float:
        """The least probability of a draft that pays in a step of so many requests."""
        return self._sizes[requests.bit_length() - 1].admission

    def take_compared(self) -> Compared | None:
        """What was compared since the last call; None for nothing."""
        taken, self._compared = self._compared, Compared()
        return taken if taken.seconds else None

    def step(
        self,
        *,
        requests: int,
        drafted: bool,
        drafts: int,
        tokens: int,
        decodes: bool,
        busy: bool,
    ) -> bool:
        """Note the end of a step.

        Args:
            requests: Its requests.
            drafted: Whether it was to draft.
            drafts: Drafts that it verified.
            tokens: Tokens that it yielded.
            decodes: Whether it held no part of a prompt, which says nothing of drafts.
            busy: Whether another step follows at once.

        Returns:
            Whether :meth:`drafts` answers differently now.
        """
        began, self._ended = self._ended, self._clock()
        self._same = self._same + 1 if drafted is self._drafted else 0
        self._drafted = drafted
        changed = False
        if began is not None and requests and decodes and self._same >= SETTLE_STEPS:
            size = self._sizes[requests.bit_length() - 1]
            seconds = self._ended - began
            changed = size.count(drafted, drafts, tokens, seconds)
            self._compared += size.compare(drafted, tokens, seconds)
            if changed:
                logger.debug(
                    "adadecode: steps of about %d requests %s drafts: %.1f tokens/s "
                    "with, %.1f without; a draft pays above %.2f",
                    requests,
                    "have" if size.drafts else "have no",
                    size.rates[True].value,
                    size.rates[False].value,
                    size.admission,
                )
        if not busy:
            self._ended = None
        return changed
