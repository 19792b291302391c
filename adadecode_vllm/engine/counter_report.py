# SPDX-License-Identifier: Apache-2.0
"""What a step's counters say, from the worker to the API server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adadecode_vllm.method.ledger import REASONS
from adadecode_vllm.method.stats import REPORTED, REPORTED_PER_EXIT

COMPARED_KEY = "adadecode_compared"
"""Of a step's statistics: seconds of :class:`~adadecode_vllm.engine.adaptive.Compared`
and plain seconds, added since the last."""


class CounterReport:
    """What a worker's counters gained since they were last taken."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._taken: np.ndarray | None = None
        self._newest: np.ndarray | None = None

    def update(self, counters: np.ndarray | None) -> None:
        """Note a step's counters; None where the step had none.

        Args:
            counters: :meth:`adadecode_vllm.engine.adadecode.AdaDecode.counters`.
        """
        if counters is not None:
            # A copy: arrays that came through Ray may lie in memory that it needs back.
            self._newest = np.array(counters)

    def take(self) -> list[float] | None:
        """What was added since the last call; None for nothing."""
        newest, taken = self._newest, self._taken
        if newest is None or newest is taken:
            return None
        if taken is not None and (newest < taken).any():
            taken = None  # they were set to zero in between
        added = newest if taken is None else newest - taken
        self._taken = newest
        return added.tolist() if added.any() else None


_DRAFTING = REPORTED.index("drafting_seconds") - len(REPORTED) - len(REASONS)


def drafting_seconds(counters: np.ndarray) -> float:
    """Seconds of drafting, of a step's counters; see :func:`split_counters`."""
    return float(counters[_DRAFTING])


def split_counters(
    counters: Sequence[float] | np.ndarray,
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, float]]:
    """Name the numbers of a report.

    Args:
        counters: (4 K + 17,) as :meth:`AdaDecode.counters` orders them.

    Returns:
        By name K numbers per exit, by name the totals, and by reason the dropped
        tokens.
    """
    numbers = np.asarray(counters, np.float64)
    per_exit, totals, dropped = np.split(
        numbers, [-len(REPORTED) - len(REASONS), -len(REASONS)]
    )
    rows = per_exit.reshape(len(REPORTED_PER_EXIT), -1)
    return (
        dict(zip(REPORTED_PER_EXIT, rows.tolist(), strict=True)),
        dict(zip(REPORTED, totals.tolist(), strict=True)),
        dict(zip(REASONS, dropped.tolist(), strict=True)),
    )
