# SPDX-License-Identifier: Apache-2.0
"""How many requests a closed loop keeps in the engine."""

from __future__ import annotations

ROUNDS_OF_A_PHASE = 2


class Concurrency:
    """Requests at a time: always the same number, or two numbers in turn.

    A phase ends when each of its places has seen two requests end. The next one begins
    with what is still running, as a server's load does.

    Attributes:
        limit: Requests to run at a time now.
    """

    def __init__(self, high: int, low: int | None = None) -> None:
        """Begin with the high number.

        Args:
            high: Most requests at a time.
            low: The number of every other phase; None for one phase without end.
        """
        self.limit = high
        self._numbers = (high, high if low is None else low)
        self._finished = 0

    def finished(self) -> None:
        """Count a request that ended."""
        self._finished += 1
        if self._finished >= ROUNDS_OF_A_PHASE * self.limit:
            high, low = self._numbers
            self.limit = low if self.limit == high else high
            self._finished = 0
