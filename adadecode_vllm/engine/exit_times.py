# SPDX-License-Identifier: Apache-2.0
"""How long it takes to ask an exit, by the worker's own clock."""

from __future__ import annotations

from collections import deque
from statistics import median

import numpy as np

_KEPT = 31
"""Times of which the median is taken: one that was held up then says nothing."""


class ExitTimes:
    """What one more token takes at each exit, the layers that lead to it included."""

    def __init__(self) -> None:
        """Start without any."""
        self._lately: list[deque[float]] = []
        self._usual: list[float] = []

    def add(self, seconds: np.ndarray, tokens: np.ndarray) -> None:
        """Note some steps.

        Args:
            seconds: (K,) float64, what their draft steps took, by exit.
            tokens: (K,) the tokens that exits scored in them.
        """
        while len(self._lately) < len(tokens):
            self._lately.append(deque(maxlen=_KEPT))
        for lately, took, scored in zip(
            self._lately, seconds.tolist(), tokens.tolist(), strict=True
        ):
            if scored > 0:
                lately.append(took / scored)
        self._usual = [
            median(lately) if lately else float("nan") for lately in self._lately
        ]

    def in_tokens(self, rate: float) -> list[float]:
        """What it costs to ask each exit for a token.

        Args:
            rate: Tokens per second of the engine.

        Returns:
            (K,) tokens that the engine yields in the time; NaN where that is not known.
        """
        rate = rate or float("nan")
        return [seconds * rate for seconds in self._usual]


class ExitClock:
    """Tells what was added to the counters that a worker sends now and then."""

    def __init__(self) -> None:
        """Start before the first step."""
        self._read: np.ndarray | None = None
        self._size: int | None = None
        self._mixed = False

    def step(self, size: int, counters: np.ndarray | None) -> np.ndarray | None:
        """Note a step.

        Args:
            size: What kind of step it was, by its number of requests.
            counters: (2, K) float64, seconds of draft steps and the tokens that were
                scored in them, by exit; None where the worker sent none.

        Returns:
            What was added since the worker last sent some; None where it sent none now
            or before, where steps of another kind came in between, and where counters
            were set to zero.
        """
        self._mixed |= size != self._size
        self._size = size
        if counters is None:
            return None
        mixed, self._mixed = self._mixed, False
        before, self._read = self._read, np.array(counters)
        if mixed or before is None or (self._read < before).any():
            return None
        return self._read - before
