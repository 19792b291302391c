# SPDX-License-Identifier: Apache-2.0
"""When to predict early and when to stop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ThresholdPolicy:
    """The paper's gate: predict early when the head's top probability exceeds gamma.

    The gate looks at the head's distribution and at nothing that was sampled from
    it, so verification stays lossless at any temperature (I5).

    Attributes:
        threshold: gamma in [0, 1]. At 1 no probability exceeds it: nothing is ever
            predicted early and drafting is not even started.
        max_early_predictions: Largest number of unverified tokens of a request.
    """

    threshold: float
    max_early_predictions: int

    @property
    def can_predict(self) -> bool:
        """Whether any early prediction can happen at all."""
        return self.threshold < 1.0

    def confident(self, confidence: np.ndarray) -> np.ndarray:
        """Decide for each gate.

        Args:
            confidence: (n,) float32, top probability under the exit head.

        Returns:
            (n,) bool.
        """
        return confidence > self.threshold
