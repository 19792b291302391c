# SPDX-License-Identifier: Apache-2.0
"""When to predict early and when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ThresholdPolicy:
    """The paper's gate: predict early when the head's top probability exceeds gamma.

    The gate looks at the head's distribution and at nothing that was sampled from
    it, so verification stays lossless at any temperature (I5).

    Attributes:
        thresholds: gamma of each exit, in [0, 1]; the paper's is the same for all. At 1
            no probability exceeds it: if all are 1 nothing is ever predicted early and
            drafting is not even started.
        max_early_predictions: Largest number of unverified tokens of a request.
        last_guess: Whether the last exit's token is predicted even below its threshold,
            after which the request stops.
    """

    thresholds: Sequence[float]
    max_early_predictions: int
    last_guess: bool = False

    @property
    def can_predict(self) -> bool:
        """Whether any early prediction can happen at all."""
        return min(self.thresholds) < 1.0

    def confident(self, exit_index: int, confidence: np.ndarray) -> np.ndarray:
        """Decide for each request at an exit.

        Args:
            exit_index: Index of the exit, 0 .. K - 1.
            confidence: (n,) float32, top probability under the exit head.

        Returns:
            (n,) bool.
        """
        return confidence > self.thresholds[exit_index]
