# SPDX-License-Identifier: Apache-2.0
"""How long the device works on parts of a cycle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Pairs of events that wait to be read; enough for minutes of decoding.
_MOST_OPEN = 20_000


class DeviceTimer:
    """Sums the time between CUDA events, by name.

    The host's clock sees when work was handed over, not when it was done, except where
    the host waits for it. Two events cost a few microseconds, so this is for
    measurements.
    """

    def __init__(self) -> None:
        """Start with nothing measured."""
        self._open: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: Counter[str] = Counter()
        self._times: Counter[str] = Counter()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure what is launched on the current stream meanwhile.

        Args:
            name: Under which to add it.
        """
        first = torch.cuda.Event(enable_timing=True)
        last = torch.cuda.Event(enable_timing=True)
        first.record()
        try:
            yield
        finally:
            last.record()
            self._open.append((name, first, last))
            if len(self._open) >= _MOST_OPEN:
                self._collect()

    def read(self) -> dict[str, tuple[float, int]]:
        """Seconds and number of measurements by name; waits for the device."""
        self._collect()
        return {name: (self._seconds[name], self._times[name]) for name in self._times}

    def reset(self) -> None:
        """Forget what was measured."""
        self._open.clear()
        self._seconds.clear()
        self._times.clear()

    def _collect(self) -> None:
        if self._open:
            self._open[-1][2].synchronize()
        for name, first, last in self._open:
            self._seconds[name] += first.elapsed_time(last) / 1000
            self._times[name] += 1
        self._open.clear()
