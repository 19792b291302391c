# SPDX-License-Identifier: Apache-2.0
"""Drafting only where it pays, found out by timing the engine's own steps.

What a verified row costs, how often drafts are right and what the host adds depend on
the machine, the text and the number of requests. All of it is in one figure that the
scheduler can take: tokens per second, with drafts and without.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger("vllm.adadecode")

SETTLE_STEPS = 2
"""Steps after a change that are not counted: one verifies what an earlier one drafted,
and with asynchronous scheduling one was scheduled before the change."""

FIRST_STEPS = 24
"""Counted steps with drafts before the first without."""

PROBE_STEPS = 12
"""Counted steps of a look at the other way."""

PROBE_COST = 0.01
"""Share of time that looking at the slower way may cost."""

LONGEST = 4096
"""Most steps between two looks."""

BETTER = 1.01
"""How much faster the other way must be for a change."""

WINDOW_STEPS = 32
"""Steps that an average remembers."""


@dataclass
class _Rate:
    """Tokens per second over the last steps."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        keep = 1.0 - 1.0 / WINDOW_STEPS
        self.tokens = keep * self.tokens + tokens
        self.seconds = keep * self.seconds + seconds

    @property
    def value(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class _Size:
    """One range of batch sizes: which way is faster, and when to look again.

    Attributes:
        drafts: Whether the next step drafts.
    """

    def __init__(self) -> None:
        self.drafts = True
        self.rates = {True: _Rate(), False: _Rate()}
        self._best = True
        self._left = FIRST_STEPS

    def count(self, drafted: bool, tokens: int, seconds: float) -> bool:
        """Note a step, and whether the next ones go another way."""
        self.rates[drafted].add(tokens, seconds)
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
        self._left = int(min(max(pause, 2 * FIRST_STEPS), LONGEST))
        changed = self.drafts is not self._best
        self.drafts = self._best
        return changed


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
        self._sizes = [_Size() for _ in range(most_requests.bit_length())]
        self._ended: float | None = None
        self._drafted: bool | None = None
        self._same = 0

    def drafts(self, requests: int) -> bool:
        """Whether a step of so many requests drafts; at least one."""
        return self._sizes[requests.bit_length() - 1].drafts

    def step(
        self, *, requests: int, drafted: bool, tokens: int, decodes: bool, busy: bool
    ) -> bool:
        """Note the end of a step.

        Args:
            requests: Its requests.
            drafted: Whether it was to draft.
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
            changed = size.count(drafted, tokens, self._ended - began)
            if changed:
                logger.debug(
                    "adadecode: steps of about %d requests %s drafts: %.1f tokens/s "
                    "with, %.1f without",
                    requests,
                    "have" if size.drafts else "have no",
                    size.rates[True].value,
                    size.rates[False].value,
                )
        if not busy:
            self._ended = None
        return changed
